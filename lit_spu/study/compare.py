"""Running a study: each cell in a process of its own, so that its peaks are its own, and none twice."""

from __future__ import annotations

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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lit_spu.measure import cores
from lit_spu.study.grid import Cell

RECORD = "cell.json"
"""In a cell's directory: how its process ended."""

TEST = "test"
"""In its run directory: that of its score on test."""


@dataclass(frozen=True)
class Outcome:
    """How a cell's process ended."""

    cell: Cell
    run: Path  # its run directory; what it printed is beside it
    returncode: int
    seconds: float

    @property
    def done(self) -> bool:
        """Whether it has a result."""
        return self.returncode == 0

    @property
    def problem(self) -> str:
        """What went wrong, in a line."""
        if self.returncode < 0:
            return f"killed by {signal.Signals(-self.returncode).name}"
        lines = self.log.read_text(errors="replace").splitlines() if self.log.exists() else []
        errors = [line.strip() for line in lines if "rror: " in line]
        return f"{errors[-1] if errors else f'exit status {self.returncode}'} ({self.log})"

    @property
    def log(self) -> Path:
        """What its process printed."""
        return self.run.with_suffix(".log")


def known(cell: Cell, out: Path) -> Outcome | None:
    """How the cell ended when it was run before, if it was; one that was in flight when its study ended was not."""
    folder = out / "cells" / cell.folder
    try:
        record: dict[str, Any] = json.loads((folder / RECORD).read_text())
    except FileNotFoundError:
        return None
    return Outcome(cell, folder / record["run"], record["returncode"], record["seconds"])


class Runner:
    """Runs cells, as many at a time as `jobs`, with the cores shared among them.

    Left early, it ends the processes that are still running, whose cells are run anew next time.
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
        """Run the cells in order, and give each one's outcome when it ends."""
        pool = ThreadPoolExecutor(self.jobs)
        try:
            futures = [pool.submit(self._run, cell) for cell in cells]
            for future in as_completed(futures):
                yield future.result()
        finally:
            self._stop()
            pool.shutdown(cancel_futures=True)

    def _run(self, cell: Cell) -> Outcome:
        folder = self.out / "cells" / cell.folder
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        # a name of its own: the process of a study that was killed may still be writing into its directory
        run = folder / f"run-{time.time_ns():x}"
        commands = [[*cell.args, f"--run_dir={run}"]]
        if cell.tested and cell.args[0] == "fit":
            commands.append(["test", f"--ckpt_path={run}", f"--run_dir={run / TEST}"])
        began, returncode = time.perf_counter(), 0
        for arguments in commands:
            returncode = returncode or self._end_of([*arguments, "--trainer.enable_progress_bar=false"], run)
        outcome = Outcome(cell, run, returncode, time.perf_counter() - began)
        with self._lock:
            if not self._stopped:
                record = {
                    "args": cell.args,
                    "run": run.name,
                    "returncode": outcome.returncode,
                    "seconds": outcome.seconds,
                    "threads": self.threads,
                }
                partial = folder / f"{RECORD}.partial"
                partial.write_text(json.dumps(record, indent=2) + "\n")
                partial.rename(folder / RECORD)  # whole or not at all
        return outcome

    def _end_of(self, arguments: Sequence[str], run: Path) -> int:
        """Run a command line, and give how its process ended."""
        environment = {**os.environ, "OMP_NUM_THREADS": str(self.threads)}
        with run.with_suffix(".log").open("ab") as log, self._lock:
            if self._stopped:
                raise KeyboardInterrupt
            # a session of its own: Ctrl-C reaches the study alone, which then ends its cells
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
        with self._lock:
            self._stopped = True
            running = list(self._running)
        for process in running:
            process.terminate()
        deadline = time.monotonic() + 20
        for process in running:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()


class Forecast:
    """How long the cells that are left will take, from those that have ended."""

    def __init__(self, before: Iterable[Outcome], jobs: int) -> None:
        self._jobs = jobs
        self._seconds: dict[str, list[float]] = {}
        for outcome in before:
            self.add(outcome)

    def add(self, outcome: Outcome) -> None:
        """A cell has ended."""
        if outcome.done:
            self._seconds.setdefault(outcome.cell.row, []).append(outcome.seconds)

    def left(self, cells: Sequence[Cell]) -> float | None:
        """Seconds for these cells: each as long as those of its row, or as all if there is none of its row yet."""
        if not self._seconds:
            return None
        overall = statistics.mean(second for row in self._seconds.values() for second in row)
        return sum(statistics.mean(self._seconds.get(cell.row, [overall])) for cell in cells) / self._jobs

    def says(self, cells: Sequence[Cell]) -> str:
        """The same in words."""
        seconds = self.left(cells)
        time = "" if seconds is None else f", about {max(1, round(seconds / 60))} min"
        return f"{len(cells)} run{'' if len(cells) == 1 else 's'} left{time}"
