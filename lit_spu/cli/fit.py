"""The command line: LightningCLI over every method and GLUE, with one directory for all that a run writes."""

from __future__ import annotations

import argparse
import inspect
import json
import logging
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import yaml
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only

from lit_spu import registry
from lit_spu.__main__ import SUBCOMMANDS
from lit_spu.callbacks.finish_validation import FinishValidation
from lit_spu.callbacks.last_checkpoint import LastCheckpoint
from lit_spu.callbacks.predictions import Predictions
from lit_spu.callbacks.run_summary import RunSummary
from lit_spu.checkpoints import run_dir, trained_weights
from lit_spu.cli.messages import Parser, answered, say
from lit_spu.data.glue import GLUE
from lit_spu.errors import UserError
from lit_spu.methods.base import Method
from lit_spu.tasks import load_task

DEFAULTS = Path(__file__).with_name("defaults.yaml")
"""The settings below every config file and flag; in the package, so that they are found from anywhere."""


class SaveRun(SaveConfigCallback):
    """Saves the settings as run, and what else is needed to run the same again."""

    def __init__(self, *args: Any, command: Sequence[str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.command = command

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # not trainer.log_dir: that asks all ranks, and this is called on the first alone
        with Path(trainer.default_root_dir, "launches.jsonl").open("a") as file:
            file.write(json.dumps(run_dir.launch(self.command)) + "\n")


class SpuCLI(LightningCLI):
    """fit, validate, test and predict for every method on every task.

    Settings, later ones win: defaults.yaml; what the checkpoint of `--ckpt_path` was made with; config files; flags.
    The task is given once, as `data.task`, and linked to the model.
    """

    def __init__(self, args: Sequence[str]) -> None:
        for package in ("methods", "callbacks"):  # short names resolve for imported classes only
            list(registry.classes(f"lit_spu.{package}"))
        self.args = Parser.given = list(args)
        peek = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
        peek.add_argument("--ckpt_path")
        peek.add_argument("--model.task", "--model.init_args.task", dest="model_task")
        peek.add_argument("-c", "--config", action="append", default=[])
        self.flags = peek.parse_known_args(self.args)[0]
        self.file: Path | None = None  # the checkpoint
        self.made_with: dict[str, Any] = {}  # its settings
        self.differences: list[str] = []  # what is set otherwise now
        self.resumed: Path | None = None  # the run directory that goes on
        self.run_dir: Path | None = None
        defaults = [str(DEFAULTS)]
        super().__init__(
            Method,
            GLUE,
            save_config_callback=SaveRun,
            save_config_kwargs={"command": self.args, "overwrite": True},  # a resumed run's, perhaps of more epochs
            seed_everything_default=42,
            parser_kwargs={"prog": "lit-spu"}
            | {name: {"description": text, "default_config_files": defaults} for name, text in SUBCOMMANDS.items()},
            parser_class=Parser,
            subclass_mode_model=True,
            args=self.args,
            auto_configure_optimizers=False,
        )

    # -- settings ---------------------------------------------------------------------------------------------------

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--run_dir", type=str, default=run_dir.PATTERN, help="All that the run writes goes here.")
        parser.link_arguments(("data.task", "model"), "model.init_args.task", compute_fn=self._one_task)

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        parser.set_defaults({"weights_only": True})  # a checkpoint is data: it must not be able to run code
        if subcommand in ("validate", "test"):
            parser.set_defaults({"verbose": False})  # RunSummary prints the same
        if subcommand == "predict":
            parser.set_defaults({"return_predictions": False})  # Predictions keeps what it needs of them
            parser.add_argument(
                "--output",
                type=str | None,
                help="File for the answers: .jsonl, or .tsv for the GLUE server. By default both in the run directory.",
            )
        return parser

    def _one_task(self, task: Any, model: Namespace | None) -> Any:
        """The data's task, also for the model."""
        if model is None:
            return task
        # a flag or a file may repeat the default, which what is parsed does not tell from nothing given at all
        default = inspect.signature(Method).parameters["task"].default
        spelled = self.flags.model_task or next(filter(None, map(_task_of_model, self.flags.config)), None)
        by_hand = spelled or model.init_args.get("task", default)
        if by_hand != task and (spelled or by_hand != default):
            raise UserError(
                f"--model.task: {by_hand!r}, but the data's task is {task!r}."
                f" Give it once, for both: --data.task={by_hand}"
            )
        return task

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parse, with the settings of a checkpoint below those of files and flags."""
        given = list(self.args)
        if self.flags.ckpt_path not in (None, "null"):
            subcommand = next((arg for arg in given if arg in SUBCOMMANDS), "fit")
            settings = self._recall(self.flags.ckpt_path, subcommand)
            below = given.index(subcommand) + 1
            given[below:below] = ["--config", yaml.safe_dump(settings)]
        self.config = parser.parse_args(given)

    def _recall(self, path: str, subcommand: str) -> dict[str, Any]:
        """The settings that the checkpoint at `path` was made with; to resume a run directory, also its trainer's."""
        self.file = run_dir.checkpoint(path, "last" if subcommand == "fit" else "best")
        self.made_with = run_dir.made_with(self.file)
        config = Path(path, "config.yaml")
        if subcommand != "fit" or not config.exists():
            return self.made_with
        self.resumed = Path(path)
        run = yaml.safe_load(config.read_text())
        return {**self.made_with, "trainer": run["trainer"], "seed_everything": run["seed_everything"]}

    @property
    def exported(self) -> Path | None:
        """The checkpoint, if it is what `lit-spu export` wrote as safetensors."""
        return self.file if self.file and self.file.name == trained_weights.WEIGHTS else None

    def _parse_ckpt_path(self) -> None:
        """Compare the settings with those of the checkpoint; Lightning's own would let the checkpoint win in silence.

        Raises:
            UserError: if a run is to be resumed with other settings, or by another method.
        """
        subcommand = self.config.subcommand
        config = self.config[subcommand]
        if not config.ckpt_path:
            return
        if self.file is None:
            self._recall(config.ckpt_path, subcommand)
        config.ckpt_path = str(self.file)
        if self.exported:
            if subcommand == "fit":
                raise UserError(
                    f"--ckpt_path: {self.file} holds what was trained, and no run that could go on. Give the directory"
                    " of a run, or leave out --ckpt_path to start a new one."
                )
            config.ckpt_path = None  # Lightning cannot read it
        self._dump_config()
        was, now = self.made_with["model"], self.config_dump["model"]
        ours, its = (either["class_path"].rpartition(".")[2] for either in (now, was))
        if ours != its:
            raise UserError(
                f"--model: {ours}, but the checkpoint {self.file} holds {its}. Leave out --model and its config."
            )
        self.differences = [
            f"--model.{name}={now['init_args'].get(name)} (checkpoint: {value})"
            for name, value in was["init_args"].items()
            if now["init_args"].get(name) != value
        ]
        tasks = now["init_args"]["task"], self.made_with["data"]["task"]
        if load_task(tasks[0]) != load_task(tasks[1]):
            self.differences.append(f"--data.task={tasks[0]} (checkpoint: {tasks[1]})")
        if self.differences and subcommand == "fit":
            raise UserError(
                f"--ckpt_path resumes a run with its own settings, but these differ: {', '.join(self.differences)}.\n"
                "Leave them out, or leave out --ckpt_path to start a new run."
            )
        if self.differences:
            print(f"Other than the checkpoint was made with: {', '.join(self.differences)}", file=sys.stderr)

    # -- the run ----------------------------------------------------------------------------------------------------

    def before_instantiate_classes(self) -> None:
        """Ask the method about the trainer, before it is loaded."""
        if self.subcommand == "fit":
            method = resolve_name(self._get(self.config, "model").class_path)
            method.check_trainer(vars(self._get(self.config, "trainer")))

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """A trainer that writes into the run directory alone; with `--data.text`, one that writes nothing.

        Raises:
            UserError: if the trainer refuses its settings.
        """
        given = self._get(self.config_init, "trainer")["callbacks"] or []
        callbacks: list[Callback] = list(given) if isinstance(given, list) else [given]
        callbacks = [c for i, c in enumerate(callbacks) if not any(_replaces(later, c) for later in callbacks[i + 1 :])]
        if self._get(self.config, "trainer").enable_progress_bar is False:
            callbacks = [callback for callback in callbacks if not isinstance(callback, ProgressBar)]
        if self._get(self.config, "data").text is None:
            self.run_dir = self._run_directory()
            kwargs["default_root_dir"] = self.run_dir
            kwargs["callbacks"] = [*callbacks, *self._own_callbacks()]
            if self.subcommand != "fit":
                kwargs["enable_checkpointing"] = False  # else Lightning adds a ModelCheckpoint even to evaluate
            if self._get(self.config, "trainer").logger in (None, True):
                kwargs["logger"] = [  # the first one's directory is trainer.log_dir
                    CSVLogger(self.run_dir, name="", version=""),
                    TensorBoardLogger(self.run_dir, "", "", sub_dir="tensorboard", default_hp_metric=False),
                ]
        else:
            self.save_config_callback = None
            kwargs.update(logger=False, callbacks=[Predictions(self._outputs(), echo=True)])
            kwargs.update(enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False)
        try:
            return super().instantiate_trainer(**kwargs)
        except (ValueError, TypeError) as error:
            raise UserError(f"--trainer: {' '.join(str(error).split())}") from error

    def _run_directory(self) -> Path:
        """The run directory: a resumed run's own, if no other is given."""
        pattern = self._get(self.config, "run_dir")
        if self.resumed is not None and pattern == run_dir.PATTERN:
            return self.resumed
        seed = self._get(self.config, "seed_everything")
        return run_dir.directory(pattern, task=self.model.task.name, method=type(self.model).__name__, seed=seed)

    def _own_callbacks(self) -> list[Callback]:
        """What belongs to every run, whatever callbacks are asked for."""
        if self.subcommand == "predict":
            return [Predictions(self._outputs())]
        if self.subcommand != "fit" or self._get(self.config, "trainer").enable_checkpointing is False:
            return [RunSummary()]
        folder = Path(str(self.run_dir), "checkpoints")  # given, Lightning makes it absolute, and knows it again
        return [
            ModelCheckpoint(
                folder,
                "best",
                self.model.task.monitor,
                mode="max",
                save_on_train_epoch_end=False,  # but behind validation: a resumed epoch may end without its metrics
                enable_version_counter=False,
            ),
            LastCheckpoint(folder),
            FinishValidation(),
            RunSummary(),
        ]

    def _outputs(self) -> list[Path]:
        """The files that predictions go to."""
        output = self._get(self.config, "output")
        if output is None:
            return [self.run_dir / "predictions.jsonl", self.run_dir / "predictions.tsv"] if self.run_dir else []
        if Path(output).suffix not in (".jsonl", ".tsv"):
            raise UserError(f"--output: {output!r} ends in neither .jsonl nor .tsv.")
        return [Path(output)]

    def _run_subcommand(self, subcommand: str) -> None:
        if subcommand != "fit":
            # to evaluate, the states of the callbacks of training are not wanted
            warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`")
            if self.file is None:
                say("No --ckpt_path: this is the method before any training.")
        if exported := self.exported:
            trained_weights.restore(self.model, exported)
        if self.resumed == self.run_dir:
            self._keep_metrics()
        try:
            super()._run_subcommand(subcommand)
        except SystemExit:  # Lightning's answer to an interruption, once callbacks and loggers have finished
            if Path(str(self.run_dir), "checkpoints", "last.ckpt").exists():
                say(f"Interrupted. Continue with: lit-spu fit --ckpt_path {self.run_dir}")
            signalled = signal.SIGTERM if self.trainer.received_sigterm else signal.SIGINT
            raise SystemExit(128 + signalled) from None
        except RuntimeError as error:
            if self.differences and "loading state_dict" in str(error):
                raise UserError(f"{self.file} does not fit these settings: {', '.join(self.differences)}.") from error
            raise
        if subcommand == "predict" and self.run_dir is not None:
            say(f"Predictions: {', '.join(map(str, self._outputs()))}")

    @rank_zero_only
    def _keep_metrics(self) -> None:
        """Move the metrics of a run that is resumed aside, because CSVLogger begins a new file."""
        file = Path(str(self.run_dir), "metrics.csv")
        if file.exists():
            earlier = len(list(file.parent.glob("metrics.*.csv")))
            file.rename(file.with_suffix(f".{earlier + 1}.csv"))


def _replaces(later: Callback, earlier: Callback) -> bool:
    """Whether one of ours is given once more, with other settings (`--trainer.callbacks+=Memory …`)."""
    return type(later) is type(earlier) and type(later).__module__.startswith("lit_spu.")


def _task_of_model(config: str) -> str | None:
    """The task that a config file sets for the model, if it does."""
    try:
        settings = yaml.safe_load(Path(config).read_text())
        return str(settings["model"]["init_args"]["task"])
    except (OSError, yaml.YAMLError, KeyError, TypeError):  # the parser tells what is wrong with a file
        return None


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what Lightning and torch say that no user can act on."""

    def wanted(record: logging.LogRecord) -> bool:
        # advertisements, absent accelerators, and what our table of parameters and our schedule make Lightning say
        noise = ("💡 Tip", "TPU available", "Trainer already configured with model summary", "Loading `train_data")
        return not record.getMessage().startswith(noise)

    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    log.addFilter(wanted)
    with warnings.catch_warnings():
        # Lightning's use of what jsonargparse 5 removes, which we bound it below
        warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"(lightning|jsonargparse)\.")
        # torch on Lightning's use of its pytrees, in every run
        warnings.filterwarnings("ignore", message=".*LeafSpec.* is deprecated")
        # a resumed run goes on in its own directory, and its metrics have been moved aside
        warnings.filterwarnings("ignore", message="(Experiment logs|Checkpoint) directory .* exists and is not empty")
        try:
            yield
        finally:
            log.removeFilter(wanted)


def run(args: Sequence[str]) -> None:
    """Run a command line."""
    with answered(), _quiet():
        SpuCLI(args)
