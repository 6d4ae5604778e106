"""Kill runs at random moments, resume them, and compare their weights with those of a run that nobody killed.

    python -m tools.kill_study --kills 40 --out /tmp/kills --configs configs/kladder.yaml configs/mezo.yaml

Temporary files are on another filesystem than the runs (`--tmpdir`, by default /dev/shm), where a move is a copy. A
kill is SIGKILL. After each one all checkpoints must be readable. Then the run is resumed, or run again if there is no
checkpoint yet, and killed again, two to six times, before it may end. A kill comes at any time, after a checkpoint, or
while one is written. Each launch is a fork of this process, which has imported what the command line imports.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from importlib import import_module
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from lit_spu import registry
from lit_spu.__main__ import main as lit_spu
from lit_spu.checkpoints.trained_weights import read_checkpoint
from lit_spu.errors import UserError

FLAGS = (
    "--data.limit_train=64",
    "--data.limit_validation=32",
    "--data.batch_size=8",
    "--trainer.max_epochs=2",
    "--trainer.enable_progress_bar=false",
)
"""Flags of all runs: two epochs of eight steps."""


class KillStudy:
    """Runs of one config that are killed.

    Args:
        config: The config file.
        out: Folder of the runs.
        seed: Seed of the moments.
    """

    def __init__(self, config: Path, out: Path, seed: int) -> None:
        self.config, self.out = config, out / config.stem
        self.random = random.Random(seed)
        self.counts: Counter[str] = Counter()
        self.whole = self.out / "whole"
        shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir(parents=True)
        process = self._start(self._command(self.whole))
        started = time.monotonic()
        process.join()
        if process.exitcode:
            raise SystemExit(f"{config} fails: {(self.out / 'log').read_text()}")
        self.seconds = time.monotonic() - started

    def run(self) -> None:
        """Start a run, kill and continue it up to six times, let it end, and compare its weights."""
        folder = self.out / f"run-{self.counts['runs']}"
        self.counts["runs"] += 1
        for _ in range(self.random.randint(2, 6)):
            started, is_new = time.monotonic(), not self._has_checkpoint(folder)
            process = self._start(self._command(folder))
            self._wait(process, folder)
            if not process.is_alive():
                if is_new:  # the machine may be faster or slower than before
                    self.seconds = time.monotonic() - started
                break
            process.kill()
            process.join()
            self.counts["kills"] += 1
            self.counts["kills before the first checkpoint"] += not self._has_checkpoint(folder)
            self._check_checkpoints(folder)
        last = self._start(self._command(folder))
        last.join()
        if last.exitcode:
            self.counts["refused or failed"] += 1
        elif self._differs(folder):
            self.counts["other weights"] += 1
        else:
            shutil.rmtree(folder)

    def _command(self, folder: Path) -> list[str]:
        resume = [f"--ckpt_path={folder}"] if self._has_checkpoint(folder) else []
        return ["fit", *([] if resume else [f"--config={self.config}", f"--run_dir={folder}", *FLAGS]), *resume]

    def _start(self, arguments: Sequence[str]) -> BaseProcess:
        process = multiprocessing.get_context("fork").Process(target=_launch, args=(arguments, self.out / "log"))
        process.start()
        return process

    def _wait(self, process: BaseProcess, folder: Path) -> None:
        """Wait for a random moment: at any time, after the next checkpoint, or while one is written."""
        checkpoints = folder / "checkpoints"
        moment = self.random.choice(("any", "after", "within"))
        before = self._time_of_last(checkpoints)
        while process.is_alive() and (
            (moment == "after" and self._time_of_last(checkpoints) == before)
            or (moment == "within" and not any(checkpoints.glob("*.partial")))
        ):
            time.sleep(0.001)
        longest = {"any": self.seconds, "after": self.seconds / 8, "within": 0.002}[moment]
        process.join(self.random.uniform(0, longest))
        self.counts[f"moments: {moment}"] += process.is_alive()

    def _time_of_last(self, checkpoints: Path) -> int:
        file = checkpoints / "last.ckpt"
        return file.stat().st_mtime_ns if file.exists() else 0

    def _has_checkpoint(self, folder: Path) -> bool:
        return any(folder.glob("checkpoints/*.ckpt"))

    def _check_checkpoints(self, folder: Path) -> None:
        for file in folder.glob("checkpoints/*.ckpt"):
            self.counts["checkpoints read"] += 1
            try:
                read_checkpoint(file)
            except UserError as error:
                print(error, file=sys.stderr)
                self.counts["unreadable"] += 1

    def _differs(self, folder: Path) -> bool:
        """Return whether any weight differs by a bit from that of the run that nobody killed."""
        for name in ("best", "last"):
            one, other = (read_checkpoint(run / f"checkpoints/{name}.ckpt") for run in (self.whole, folder))
            weights, others = one["state_dict"], other["state_dict"]
            if one["global_step"] != other["global_step"] or weights.keys() != others.keys():
                return True
            if not all(torch.equal(weight, others[name]) for name, weight in weights.items()):
                return True
        return False


def _launch(arguments: Sequence[str], log: Path) -> None:
    """Run a command line in a process of its own, with its output in a file."""
    with log.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    lit_spu(list(arguments))


def main(args: Sequence[str] | None = None) -> Counter[str]:
    """Run the study, print its counts, and exit with status 1 if anything was lost."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--kills", type=int, default=40, help="least number of kills, over all configs")
    parser.add_argument("--configs", type=Path, nargs="+", default=[Path("configs/kladder.yaml")])
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs; removed first")
    parser.add_argument("--tmpdir", type=Path, default=Path("/dev/shm"), help="folder of temporary files")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments")
    given = parser.parse_args(args)
    import_module("lit_spu.cli.fit")
    list(registry.classes("lit_spu.methods"))
    if given.tmpdir.stat().st_dev == given.out.absolute().parent.stat().st_dev:
        print("--tmpdir is on the filesystem of --out: a move is not a copy there.", file=sys.stderr)
    os.environ["TMPDIR"], tempfile.tempdir = str(given.tmpdir), None
    studies = [KillStudy(config, given.out, given.seed) for config in given.configs]
    total: Counter[str] = Counter()
    while total["kills"] < given.kills:
        for study in studies:
            study.run()
        total = sum((study.counts for study in studies), Counter())
        print(", ".join(f"{name}: {count}" for name, count in total.items()), flush=True)
    shutil.rmtree(given.out)
    if any(total[name] for name in ("unreadable", "refused or failed", "other weights")):
        raise SystemExit(1)
    return total


if __name__ == "__main__":
    main()
