"""Run a command line in this process, and check what every command line must hold."""

from __future__ import annotations

import contextlib
import io
import os
import resource
import signal
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

from jsonargparse import Namespace
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import SingleDeviceStrategy

from lit_spu import ranges
from lit_spu.__main__ import main
from lit_spu.cli import commands
from lit_spu.cli.parser import Parser
from lit_spu.cli.subcommands import RUNS
from lit_spu.data.glue import GLUE
from lit_spu.study import grid

SECONDS = 60
"""Time of one command line."""

LINES = 6
"""Lines of a message."""

EXTRA_MEMORY = 6 * 2**30
"""Bytes that a command line may add to the address space: a rank of a million must not fill the machine."""


class Hang(BaseException):
    """The command line took too long."""


@dataclass(frozen=True)
class Ended:
    """End of a command line: its exit status, what it printed on stderr, and the traceback of an error in the code."""

    code: int
    errors: str
    crash: str
    accepted: Sequence[str]
    """Settings that a declared range refuses, but the command line accepted."""

    @property
    def problem(self) -> str:
        """Return the property that this end violates, or an empty text."""
        message = [line for line in self.errors.splitlines() if line.strip()]
        if self.crash:
            return f"traceback: {self.crash}"
        if self.code and len(message) > LINES:
            return f"a message of {len(message)} lines: {message[:2]}"
        if self.code and not any("error: " in line for line in message):
            return f"exit status {self.code} without an error message: {message}"
        if not self.code and any(line.startswith("error: ") for line in message):
            return f"an error message, but exit status 0: {message}"
        return f"accepted out of range: {', '.join(self.accepted)}" if self.accepted else ""


def run_line(line: Sequence[str], folder: Path, *, steps: bool) -> Ended:
    """Run a command line in a folder.

    Args:
        line: The arguments.
        folder: Working directory.
        steps: Train or evaluate one batch. Without, a run ends when everything is made.
    """
    errors, code, crash = io.StringIO(), 0, ""
    accepted: list[str] = []
    environment, directory = dict(os.environ), Path.cwd()
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("default")
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        stack.enter_context(contextlib.redirect_stderr(errors))
        stack.enter_context(_short_runs(accepted, steps))
        stack.enter_context(_limits())
        os.chdir(folder)
        try:
            main(line)
        except SystemExit as exit_:
            code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
        except Hang as error:
            crash = f"more than {SECONDS} s {_last_frame(error)}"
        except BaseException as error:
            crash = f"{type(error).__name__}: {' '.join(str(error).split())[:200]} {_last_frame(error)}"
        finally:
            os.chdir(directory)
            for number, handler in handlers.items():
                signal.signal(number, handler)
            os.environ.clear()
            os.environ.update(environment)
    if not crash and time.monotonic() - started > SECONDS:
        crash = f"{time.monotonic() - started:.0f} s"
    return Ended(code, errors.getvalue(), crash, accepted)


def _last_frame(error: BaseException) -> str:
    """Return the innermost place in this project of an error's traceback."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "lit_spu/" in frame.filename]
    return f"({frames[-1].filename.rpartition('lit_spu/')[2]}:{frames[-1].lineno})" if frames else ""


@contextlib.contextmanager
def _limits() -> Iterator[None]:
    """Limit time and memory."""

    def stop(*_: object) -> None:
        raise Hang

    before, used = resource.getrlimit(resource.RLIMIT_AS), _address_space()
    previous = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    resource.setrlimit(resource.RLIMIT_AS, (used + EXTRA_MEMORY, before[1]))
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
        resource.setrlimit(resource.RLIMIT_AS, before)


def _address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


@contextlib.contextmanager
def _short_runs(accepted: list[str], steps: bool) -> Iterator[None]:
    """End runs after a batch, or before it; estimate one method alone; note accepted settings that are out of range."""

    def shorten(original: Any) -> Any:
        @wraps(original)  # LightningCLI reads the signature
        def run(self: Trainer, *args: Any, **kwargs: Any) -> Any:
            if not steps or not isinstance(self.strategy, SingleDeviceStrategy):
                return None
            self.fit_loop.max_epochs, self.fit_loop.epoch_loop.max_steps = 1, 1
            self.limit_train_batches = self.limit_val_batches = self.limit_test_batches = self.limit_predict_batches = 1
            data = kwargs["datamodule"]
            data.num_workers = 0
            for name in ("limit_train", "limit_validation", "limit_test"):
                setattr(data, name, min(16, getattr(data, name) or 16))
            return original(self, *args, **kwargs)

        return run

    parse, find = Parser.parse_args, grid.method_configs

    def parse_and_check(self: Parser, *args: Any, **kwargs: Any) -> Any:
        config = parse(self, *args, **kwargs)
        accepted.extend(map(str, _out_of_range(config)))
        return config

    with contextlib.ExitStack() as stack:
        for name in RUNS:
            stack.enter_context(patch.object(Trainer, name, shorten(getattr(Trainer, name))))
        stack.enter_context(patch.object(Parser, "parse_args", parse_and_check))
        stack.enter_context(patch.object(commands, "method_configs", lambda given: dict([*find(given).items()][:1])))
        yield


def _out_of_range(config: Any) -> Iterator[ranges.Refusal]:
    """Yield the parsed settings that a declared range refuses."""
    run = config[config.subcommand] if "subcommand" in config else config
    for key in ("model", "data", "trainer"):
        section = run.get(key)
        if not isinstance(section, Namespace):  # a section of a file that is no settings: refused later
            continue
        if key == "data":
            hints = ranges.declared(GLUE)
            for name, value in vars(section).items():
                yield from ranges.refusals(hints.get(name, Any), value, f"data.{name}")
        elif key == "trainer":
            yield from ranges.refusals(Any, section.callbacks, "trainer.callbacks")
        else:
            yield from ranges.refusals(Any, section, key)
