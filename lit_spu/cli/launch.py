"""Callbacks and a logger that record a launch in its run directory, from its first step on."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import Logger

from lit_spu.callbacks.first_step import FirstStep
from lit_spu.checkpoints import run_dir
from lit_spu.files import write_text


class SaveRun(FirstStep, SaveConfigCallback):
    """Callback that writes the settings of the run, and its command line and versions into `launches.jsonl`.

    The loggers of the Trainer are held back until then. The metrics of an earlier launch are kept under another name.
    """

    def __init__(self, *args: Any, command: Sequence[str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.command = command

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write nothing yet, unlike Lightning's callback."""
        self.has_begun = False

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir)  # not trainer.log_dir, which waits for all ranks
            run_dir.keep_metrics(folder)
            write_text(folder / "config.yaml", self.parser.dump(self.config, skip_none=False))
            launches = folder / "launches.jsonl"
            earlier = launches.read_text() if launches.exists() else ""
            write_text(launches, f"{earlier}{json.dumps(run_dir.describe_launch(self.command))}\n")
        trainer.loggers = [logger.release() if isinstance(logger, HeldLogger) else logger for logger in trainer.loggers]


class HeldLogger(Logger):
    """Logger that holds back what it gets for another one. Lightning makes a logger's files before anything is logged.

    Args:
        logger: The other logger. None of its files is touched before `release`.
    """

    def __init__(self, logger: Logger) -> None:
        super().__init__()
        self._logger = logger
        self._calls: list[Callable[[], Any]] = []

    @property
    def name(self) -> str | None:
        return self._logger.name

    @property
    def version(self) -> int | str | None:
        return self._logger.version

    @property
    def save_dir(self) -> str | None:
        return self._logger.save_dir

    @property
    def log_dir(self) -> str | None:
        return self._logger.log_dir

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        self._calls.append(partial(self._logger.log_metrics, *args, **kwargs))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        self._calls.append(partial(self._logger.log_hyperparams, *args, **kwargs))

    def log_graph(self, *args: Any, **kwargs: Any) -> None:
        self._calls.append(partial(self._logger.log_graph, *args, **kwargs))

    @property
    def experiment(self) -> Any:
        """The other logger's experiment, whose calls are held back as well. Lightning reads it before training."""
        return HeldCalls(self._calls, lambda: self._logger.experiment)  # type: ignore[attr-defined]

    def __getattr__(self, name: str) -> Any:
        """Return what only the other logger has, such as its `log_dir`."""
        if name.startswith("_"):
            raise AttributeError(name)
        return getattr(self._logger, name)

    def release(self) -> Logger:
        """Pass on what was held back, and return the other logger."""
        for call in self._calls:
            call()
        return self._logger


class HeldCalls:
    """Object in place of another one, whose calls, and those of its attributes, are held back.

    Args:
        calls: List of the calls that are held back.
        find: Function that returns the other object.
    """

    def __init__(self, calls: list[Callable[[], Any]], find: Callable[[], Any]) -> None:
        self._calls, self._find = calls, find

    def __getattr__(self, name: str) -> HeldCalls:
        return HeldCalls(self._calls, lambda: getattr(self._find(), name))

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        """Hold a call back."""
        self._calls.append(lambda: self._find()(*args, **kwargs))
