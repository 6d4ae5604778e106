"""Latency of modules that take a known time, on a clock that only they advance."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_spu.callbacks.latency import Latency
from lit_spu.errors import UserError
from lit_spu.measure import clocks
from tests.callbacks.conftest import QUIET, MakeTrainer, Manual, Tiny, logged

pytestmark = QUIET


class Time:
    """A clock that only `sleep` advances."""

    now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def perf_counter(self) -> float:
        return self.now


TIME = Time()


@pytest.fixture(autouse=True)
def _fake_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clocks, "time", TIME)


class Sleep(nn.Module):
    """The identity, which takes a given time."""

    def __init__(self, milliseconds: float) -> None:
        super().__init__()
        self.milliseconds = milliseconds

    def forward(self, tensor: Tensor) -> Tensor:
        TIME.sleep(self.milliseconds / 1000)
        return tensor


class Sleepy(Tiny):
    """A forward pass takes 40 ms, 20 of them in `slow`; a training step takes 60 ms more, inference 20 ms more."""

    def __init__(self) -> None:
        super().__init__()
        self.slow = Sleep(20)
        self.other = Sleep(20)

    def forward(self, batch: Tensor) -> Tensor:
        logits: Tensor = self.layer(self.other(self.slow(batch)))
        if not self.trainer.training:
            TIME.sleep(0.02)
        return logits

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        TIME.sleep(0.06)
        return super().training_step(batch, batch_idx)


def test_latency_separates_steps_forward_passes_inference_and_submodules(
    make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    latency = Latency(warmup=2, modules=["sl*"])
    make_trainer(latency).fit(Sleepy())
    summary = latency.summary
    assert summary["latency/step_ms"] == pytest.approx(100)
    assert summary["latency/forward_ms"] == pytest.approx(40)
    assert summary["latency/inference_ms"] == pytest.approx(60)
    assert summary["latency/forward/slow_ms"] == pytest.approx(20)
    assert summary["latency/inference/slow_ms"] == pytest.approx(20)
    assert "latency/forward/other_ms" not in summary
    steps = logged(tmp_path, "latency/step_ms")
    assert steps == pytest.approx([100] * 6)  # eight steps without the warm-up
    assert logged(tmp_path, "latency/step_p95_ms") == pytest.approx([summary["latency/step_p95_ms"]], rel=1e-5)


def test_latency_drops_the_warmup_and_has_slow_steps_in_p95(make_trainer: MakeTrainer) -> None:
    class Uneven(Tiny):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            TIME.sleep({0: 0.5, 1: 0.5, 7: 0.1}.get(batch_idx, 0.0))
            return super().training_step(batch, batch_idx)

    latency = Latency(warmup=2)
    make_trainer(latency, limit_val_batches=0).fit(Uneven())
    assert latency.summary["latency/step_ms"] == pytest.approx(0)
    assert latency.summary["latency/step_p95_ms"] == pytest.approx(75)  # interpolated between the last two of six


@pytest.mark.parametrize(
    ("module", "settings"), [(Tiny, {"accumulate_grad_batches": 4}), (Manual, {})], ids=["accumulated", "by hand"]
)
def test_latency_of_a_step_includes_all_its_batches(
    module: type[Tiny], settings: dict[str, Any], make_trainer: MakeTrainer
) -> None:
    class Slow(module):  # type: ignore[misc, valid-type]
        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            TIME.sleep(0.02)
            return super().training_step(batch, batch_idx)

    latency = Latency(warmup=1)
    trainer = make_trainer(latency, limit_val_batches=0, max_epochs=2, **settings)
    trainer.fit(Slow())
    assert trainer.global_step == 4
    assert len(latency._durations["step"].seconds) == 3
    assert len(latency._durations["forward"].seconds) == 15
    assert latency.summary["latency/step_ms"] == pytest.approx(80)


def test_latency_times_the_innermost_of_nested_calls(make_trainer: MakeTrainer) -> None:
    class Nested(Sleepy):
        """Runs its training step through its own `__call__`, as distributed strategies do."""

        def forward(self, batch: Tensor, inner: bool = False) -> Tensor:
            return super().forward(batch) if inner else self.training_step(batch, 0)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            TIME.sleep(0.06)
            return self(batch, inner=True).square().mean()  # type: ignore[no-any-return]

    latency, module = Latency(warmup=0), Nested()
    make_trainer(latency, limit_val_batches=0).fit(module)
    assert latency.summary["latency/forward_ms"] == pytest.approx(40)


def test_latency_is_the_same_if_a_strategy_wraps_the_module(make_trainer: MakeTrainer) -> None:
    latency = Latency(warmup=0)
    try:
        make_trainer(latency, limit_val_batches=0, strategy="ddp", devices=1).fit(Sleepy())
    finally:
        torch.distributed.destroy_process_group()  # Lightning destroys it only when the program ends
    assert latency.summary["latency/forward_ms"] == pytest.approx(40)


def test_latency_times_predict_alone(make_trainer: MakeTrainer) -> None:
    latency = Latency(warmup=1)
    make_trainer(latency).predict(Sleepy())
    assert latency.summary["latency/inference_ms"] == pytest.approx(60)
    assert not any("step" in name for name in latency.summary)


def test_latency_removes_its_hooks(make_trainer: MakeTrainer) -> None:
    module = Sleepy()
    make_trainer(Latency(modules=["*"])).fit(module)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def test_latency_refuses_a_name_that_matches_no_module(make_trainer: MakeTrainer) -> None:
    with pytest.raises(UserError, match=r"no module is named 'slo'\. Did you mean slow\? Allowed: layer, other, slow"):
        make_trainer(Latency(modules=["slo"])).fit(Sleepy())


def test_latency_reports_what_it_could_not_measure(make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture) -> None:
    class Uncalled(Tiny):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return torch.Tensor(self.layer(batch)).square().mean()

    make_trainer(Latency(warmup=8), limit_val_batches=0).fit(Uncalled())
    assert "no step time, because the run ended within the warm-up of 8 steps" in caplog.text
    assert "not timed, because never called as a module: Uncalled" in caplog.text


def test_latency_reads_times_only_when_they_are_logged(
    make_trainer: MakeTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading a time waits for a CUDA device."""
    waits: list[int] = []

    def seconds(self: clocks.Clock, start: float, end: float) -> float:
        waits.append(trainer.global_step)
        return end - start

    monkeypatch.setattr(clocks.Clock, "seconds", seconds)
    trainer = make_trainer(Latency(warmup=2), limit_val_batches=0, log_every_n_steps=3)
    trainer.fit(Sleepy())
    assert sorted(set(waits)) == [3, 6, 8]
    assert waits.count(3) == 6  # three steps and three forward passes
