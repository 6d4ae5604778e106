"""Traces: their files, their named phases, and runs that end early."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lit_spu.callbacks.profiler_trace import ProfilerTrace
from tests.callbacks.conftest import QUIET, MakeTrainer, Tiny

pytestmark = QUIET


def names(path: Path) -> list[str]:
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    return [event["name"] for event in events if event.get("ph") == "X"]


def test_each_cycle_writes_a_trace_of_its_active_steps(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trace = ProfilerTrace(wait=1, warmup=1, active=2, repeat=0, skip_first=0)
    make_trainer(trace, limit_val_batches=0).fit(Tiny())
    folder = tmp_path / "run/0"
    assert sorted(path.name for path in folder.glob("trace-*")) == [
        "trace-rank0-step00004.json.gz",
        "trace-rank0-step00008.json.gz",
    ]
    found = names(folder / "trace-rank0-step00004.json.gz")
    assert found.count("backbone") == 2
    assert found.count("backward") == 2
    assert sum(name.startswith("Optimizer.step") for name in found) == 2
    assert "aten::addmm" in found


def test_the_path_and_the_viewer_are_reported(
    make_trainer: MakeTrainer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_trainer(ProfilerTrace(wait=0, warmup=1, active=1, skip_first=0), limit_val_batches=0).fit(Tiny())
    assert str(tmp_path / "run/0/trace-rank0-step00002.json.gz") in caplog.text
    assert "https://ui.perfetto.dev" in caplog.text


def test_a_run_that_is_too_short_is_reported(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    trace = ProfilerTrace(wait=2, warmup=1, active=4, skip_first=5)  # active from the ninth batch on, of eight
    with pytest.warns(UserWarning, match=r"ended after 8 batches, before anything was recorded\..* need 12"):
        make_trainer(trace, limit_val_batches=0).fit(Tiny())
    assert not list(tmp_path.rglob("trace-*"))


def test_a_run_that_ends_during_a_recording_writes_it(
    make_trainer: MakeTrainer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_trainer(ProfilerTrace(wait=2, warmup=1, active=4, skip_first=3), limit_val_batches=0).fit(Tiny())
    assert names(tmp_path / "run/0/trace-rank0-step00008.json.gz").count("backbone") == 2
    assert "Trace of 2 steps" in caplog.text


def test_a_trace_that_cannot_be_written_raises_an_error(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    class Obstructed(Tiny):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            (tmp_path / "run/0/trace-rank0-step00002.json.gz").mkdir(parents=True, exist_ok=True)
            return super().training_step(batch, batch_idx)

    with pytest.raises(OSError, match="step00002"):
        make_trainer(ProfilerTrace(wait=0, warmup=1, active=1, skip_first=0)).fit(Obstructed())


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_run_writes_its_recording(
    error: type[BaseException], make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    class Failing(Tiny):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            if batch_idx == 3:
                raise error
            return super().training_step(batch, batch_idx)

    with pytest.raises((SystemExit, RuntimeError)):
        make_trainer(ProfilerTrace(wait=0, warmup=1, active=5, skip_first=0)).fit(Failing())
    (path,) = (tmp_path / "run/0").glob("trace-*")
    assert names(path).count("backbone") == 2
    with torch.profiler.profile():  # a second profiler starts only if the first one stopped
        torch.ones(1)
