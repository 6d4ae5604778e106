"""Run the cells of a study, each in its own process, so that its peak memory is its own."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from textwrap import shorten
from typing import Any

from yaml import YAMLError

from lit_spu.errors import UserError
from lit_spu.files import write_text
from lit_spu.measure import cores
from lit_spu.safe_yaml import parse_json
from lit_spu.study.grid import Cell

RECORD = "cell.json"
"""File in a cell's directory that records how the cell's process ended."""

TEST = "test"
"""Subdirectory of a run directory: the run that scores the checkpoint on the test split."""

STOP_SECONDS = 20
"""Seconds after which a process that was asked to terminate is killed."""


@dataclass(frozen=True)
class Outcome:
    """Exit status and duration of a cell's process."""

    cell: Cell
    run: Path
    """Run directory. The log file is next to it."""
    returncode: int
    seconds: float
    fault: str = ""
    """Reason why the results cannot be read, if the process succeeded."""

    @property
    def done(self) -> bool:
        """True if the process succeeded and its results can be read."""
        return self.returncode == 0 and not self.fault

    @property
    def problem(self) -> str:
        """Reason of the failure, in one line."""
        if self.fault:
            return self.fault
        if self.returncode < 0:
            names = {number.value: number.name for number in signal.Signals}
            return f"killed by {names.get(-self.returncode, f'signal {-self.returncode}')}"
        lines = self.log.read_text(errors="replace").splitlines() if self.log.is_file() else []
        errors = [line.strip() for line in lines if "rror: " in line]
        return f"{errors[-1] if errors else f'exit status {self.returncode}'} ({self.log})"

    @property
    def log(self) -> Path:
        """File with the output of the process."""
        return self.run.with_suffix(".log")


def read_outcome(cell: Cell, out: Path) -> Outcome | None:
    """Read the outcome of a cell that ran before; return None if it never ran or was interrupted.

    Raises:
        UserError: If the record is damaged.
    """
    file = out / "cells" / cell.folder / RECORD
    with refuse_damage(file):
        if not file.exists():
            return None
        record: dict[str, Any] = parse_json(file.read_text(encoding="utf-8"))
        run, returncode, seconds = record["run"], record["returncode"], float(record["seconds"])
        if not (isinstance(run, str) and Path(run).name == run and isinstance(returncode, int) and isfinite(seconds)):
            raise ValueError(f"run {run!r}, exit status {returncode!r}, {seconds} seconds")
        return Outcome(cell, file.parent / run, returncode, seconds)


@contextmanager
def refuse_damage(path: Path) -> Iterator[None]:
    """Context manager that turns any error of reading a damaged or foreign file into a UserError."""
    try:
        yield
    except (OSError, ValueError, LookupError, TypeError, AttributeError, YAMLError, csv.Error) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{path} cannot be read: {shorten(reason, 150)}") from error


class Runner:
    """Runner of cells: `jobs` processes at a time share the processor cores.

    If the caller stops early, the running processes are terminated. Their cells run again next time.

    Args:
        out: Directory of the study.
        jobs: Number of processes at a time.
        command: Command that each cell's arguments are appended to.
    """

    def __init__(self, out: Path, jobs: int = 1, command: Sequence[str] = (sys.executable, "-m", "lit_spu")) -> None:
        self.out = out
        self.jobs = jobs
        self.command = command
        self.threads = max(1, cores() // jobs)
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._stopped = False

    def run(self, cells: Sequence[Cell]) -> Iterator[Outcome]:
        """Start the cells in order, and yield the outcome of each cell when it ends."""
        pool = ThreadPoolExecutor(self.jobs)
        try:
            futures = [pool.submit(self._run_cell, cell) for cell in cells]
            for future in as_completed(futures):
                yield future.result()
        finally:
            self._stop()
            pool.shutdown(cancel_futures=True)

    def _run_cell(self, cell: Cell) -> Outcome:
        folder = self.out / "cells" / cell.folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        # a new name each time: a process of a killed study may still write into its own run directory
        run = folder / f"run-{time.time_ns():x}"
        commands = [[*cell.args, f"--run_dir={run}"]]
        if cell.tested and cell.args[0] == "fit":
            commands.append(["test", f"--ckpt_path={run}", f"--run_dir={run / TEST}"])
        started, returncode = time.perf_counter(), 0
        for arguments in commands:
            returncode = returncode or self._run_process([*arguments, "--trainer.enable_progress_bar=false"], run)
        outcome = Outcome(cell, run, returncode, time.perf_counter() - started)
        with self._lock:
            if not self._stopped:
                self._write_record(outcome, folder)
        return outcome

    def _write_record(self, outcome: Outcome, folder: Path) -> None:
        """Write the outcome into the cell's directory."""
        record = {
            "args": outcome.cell.args,
            "run": outcome.run.name,
            "returncode": outcome.returncode,
            "seconds": outcome.seconds,
            "threads": self.threads,
        }
        write_text(folder / RECORD, json.dumps(record, indent=2) + "\n")

    def _run_process(self, arguments: Sequence[str], run: Path) -> int:
        """Run a command line, append its output to the log, and return the exit status."""
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        with run.with_suffix(".log").open("ab") as log, self._lock:
            if self._stopped:
                raise KeyboardInterrupt
            # a new session: Ctrl-C reaches only the study, which then stops its cells
            process = subprocess.Popen(
                [*self.command, *arguments],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,
            )
            self._running.add(process)
        returncode = process.wait()
        with self._lock:
            self._running.discard(process)
        return returncode

    def _stop(self) -> None:
        """Terminate the running processes, and kill those that do not end in time."""
        with self._lock:
            self._stopped = True
            running = list(self._running)
        for process in running:
            process.terminate()
        deadline = time.monotonic() + STOP_SECONDS
        for process in running:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()


class Forecast:
    """Estimate of the time that the remaining cells take, from the durations of finished cells.

    Args:
        finished: Outcomes of cells that ran before.
        jobs: Number of processes at a time.
    """

    def __init__(self, finished: Iterable[Outcome], jobs: int) -> None:
        self._jobs = jobs
        self._seconds: dict[str, list[float]] = {}
        for outcome in finished:
            self.add(outcome)

    def add(self, outcome: Outcome) -> None:
        """Add the duration of a finished cell; failed cells do not count."""
        if outcome.done:
            self._seconds.setdefault(outcome.cell.row, []).append(outcome.seconds)

    def seconds_left(self, cells: Sequence[Cell]) -> float | None:
        """Return the estimated seconds for these cells, or None if no cell has finished yet.

        A cell takes the mean of its row's finished cells. Without one, it takes the mean of all finished cells.
        """
        if not self._seconds:
            return None
        overall = statistics.mean(second for row in self._seconds.values() for second in row)
        return sum(statistics.mean(self._seconds.get(cell.row, [overall])) for cell in cells) / self._jobs

    def describe(self, cells: Sequence[Cell]) -> str:
        """Return the number of remaining cells and the estimated time as text."""
        seconds = self.seconds_left(cells)
        time = "" if seconds is None else f", about {max(1, round(seconds / 60))} min"
        return f"{len(cells)} run{'' if len(cells) == 1 else 's'} left{time}"
