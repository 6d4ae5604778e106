"""A full disk leaves every file that was there before whole, and is reported in a line."""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from lit_spu import files
from lit_spu.callbacks.predictions import Predictions
from lit_spu.callbacks.run_summary import RunSummary
from lit_spu.checkpoints import run_dir
from lit_spu.checkpoints.whole_files import WholeFiles
from lit_spu.cli.launch import SaveRun
from lit_spu.data import text
from lit_spu.errors import UserError
from lit_spu.export import load, writers
from lit_spu.methods.lora import LoRA
from lit_spu.optim.trajectory import Recorder
from lit_spu.study import results
from lit_spu.study.compare import Outcome, Runner
from lit_spu.study.grid import Cell
from lit_spu.tasks import TASKS
from tests.test_run_directory import contents

Tiny = Callable[[str], str]


@contextmanager
def sync_fails() -> Iterator[None]:
    """Context manager in which data reaches no disk."""

    def fail(path: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "_sync", fail)
        yield


@contextmanager
def small_files(limit: int = 2000) -> Iterator[None]:
    """Context manager in which no file can be longer than a limit in bytes."""
    before, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before, most))


CELL = Cell("full", "sst2", "mini-bert", 1, 1.0, ("fit",))


def write_checkpoint(folder: Path, number: int) -> None:
    WholeFiles().save_checkpoint({"state_dict": {"w": torch.full((5000,), number)}}, folder / "last.ckpt")


def write_summary(folder: Path, number: int) -> None:
    summary = RunSummary()
    summary._folder = folder
    record: dict[str, Any] = {"metrics": {"x": number}, "measured": {}, "best_score": None, "wall_seconds": 1.0}
    summary._record = lambda trainer: record  # type: ignore[method-assign]
    stage = SimpleNamespace(fn=SimpleNamespace(value="x"))
    state: Any = SimpleNamespace(state=stage, is_global_zero=True, loggers=[], fast_dev_run=False)
    summary._write(state, "completed")


def write_predictions(folder: Path, number: int) -> None:
    rows = [{"sentence": "text " * 100, "label": 0}] * 20
    predicted = {i: (number % 2, [0.5, 0.5]) for i in range(20)}
    Predictions([folder / "predictions.jsonl"])._write("", rows, predicted, TASKS["sst2"])


def write_launch(folder: Path, number: int) -> None:
    parser: Any = SimpleNamespace(dump=lambda *_, **__: f"number: {number}\n" * 500)
    trainer: Any = SimpleNamespace(is_global_zero=True, default_root_dir=str(folder), loggers=[])
    SaveRun(parser, None, command=["fit"]).begin(trainer, None)  # type: ignore[arg-type]


def write_trajectory(folder: Path, number: int) -> None:
    optimizer: Any = SimpleNamespace(history=[[float(number)]] * 1000)
    Recorder(folder, {"groups": 1}, optimizer).write()


def write_tokens(folder: Path, number: int) -> None:
    tokens = text.Tokens(np.full(1000, number, np.int32), np.array([0, 1000]), None)
    text._write_tokens(folder / "tokens.npz", tokens)


def write_cell(folder: Path, number: int) -> None:
    Runner(folder)._write_record(Outcome(CELL, folder / ("run" * 1000), number, 1.0), folder)


def write_results(folder: Path, number: int) -> None:
    record: Any = {"command": "lit-spu fit", "score": number, "curve": [[1, 0.5]] * 1000}
    results.write([record], [], folder)


@pytest.mark.parametrize("fault", [sync_fails, small_files])
@pytest.mark.parametrize(
    "write",
    [
        write_checkpoint,
        write_summary,
        write_predictions,
        write_launch,
        write_trajectory,
        write_tokens,
        write_cell,
        write_results,
    ],
)
def test_old_files_stay_whole(write: Any, fault: Any, tmp_path: Path) -> None:
    if (write, fault) == (write_summary, small_files):
        fault = partial(small_files, 50)
    write(tmp_path, 1)
    before = contents(tmp_path)
    assert before
    with pytest.raises(UserError, match=r"Cannot write .*: (No space left on device|File too large)"), fault():
        write(tmp_path, 2)
    changed = set(contents(tmp_path).items()) ^ set(before.items())
    assert {name for name, _ in changed} <= {"results.csv"}  # the first of two files, each of which is whole
    write(tmp_path, 2)
    assert contents(tmp_path) != before


@pytest.mark.parametrize(
    "fault", [sync_fails, small_files, partial(small_files, 30_000)], ids=["sync", "2 kB", "30 kB"]
)
@pytest.mark.parametrize("format", ["safetensors", "peft", "merged"])
def test_a_half_written_export_does_not_block_the_next(
    format: Any, fault: Any, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = LoRA(backbone=tiny("bert"), rank=16)
    monkeypatch.setattr(run_dir, "find_checkpoint", lambda *_: tmp_path / "absent" / "best.ckpt")
    monkeypatch.setattr(load, "load", lambda _: method)
    with pytest.raises(UserError, match=r"Cannot write .*: (No space left on device|File too large)"), fault():
        writers.export("run", str(tmp_path / "out"), format)
    assert not list(tmp_path.iterdir())
    method = LoRA(backbone=tiny("bert"), rank=16)
    writers.export("run", str(tmp_path / "out"), format)
    files.check_checksums(tmp_path / "out")
