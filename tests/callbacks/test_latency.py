"""Latency against modules that take a known time, by a clock that only they move."""

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
    """Stands still but for `sleep`."""

    now = 0.0

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def perf_counter(self) -> float:
        return self.now


TIME = Time()


@pytest.fixture(autouse=True)
def _own_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clocks, "time", TIME)


class Sleep(nn.Module):
    """The identity, taking its time."""

    def __init__(self, milliseconds: float) -> None:
        super().__init__()
        self.milliseconds = milliseconds

    def forward(self, tensor: Tensor) -> Tensor:
        TIME.sleep(self.milliseconds / 1000)
        return tensor


class Sleepy(Tiny):
    """40 ms a forward pass, 20 of them in `slow`, and 60 ms more a training step; inference takes 20 ms more."""

    def __init__(self) -> None:
        super().__init__()
        self.slow = Sleep(20)
        self.other = Sleep(20)

    def forward(self, batch: Tensor) -> Tensor:
        scores: Tensor = self.layer(self.other(self.slow(batch)))
        if not self.trainer.training:
            TIME.sleep(0.02)
        return scores

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        TIME.sleep(0.06)
        return super().training_step(batch, batch_idx)


def test_tells_step_forward_inference_and_parts_apart(make_trainer: MakeTrainer, tmp_path: Path) -> None:
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
    assert steps == pytest.approx([100] * 6)  # of eight
    assert logged(tmp_path, "latency/step_p95_ms") == pytest.approx([summary["latency/step_p95_ms"]], rel=1e-5)


def test_warmup_is_dropped_and_p95_sees_the_slow_ones(make_trainer: MakeTrainer) -> None:
    class Uneven(Tiny):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            TIME.sleep({0: 0.5, 1: 0.5, 7: 0.1}.get(batch_idx, 0.0))
            return super().training_step(batch, batch_idx)

    latency = Latency(warmup=2)
    make_trainer(latency, limit_val_batches=0).fit(Uneven())
    assert latency.summary["latency/step_ms"] == pytest.approx(0)
    assert latency.summary["latency/step_p95_ms"] == pytest.approx(75)  # three quarters of the way to the sixth of six


@pytest.mark.parametrize(
    ("module", "settings"), [(Tiny, {"accumulate_grad_batches": 4}), (Manual, {})], ids=["accumulated", "by hand"]
)
def test_a_step_is_all_its_batches(module: type[Tiny], settings: dict[str, Any], make_trainer: MakeTrainer) -> None:
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


def test_of_nested_calls_the_innermost_counts(make_trainer: MakeTrainer) -> None:
    class Nested(Sleepy):
        """Runs its step through its own call, as distributed strategies do."""

        def forward(self, batch: Tensor, inner: bool = False) -> Tensor:
            return super().forward(batch) if inner else self.training_step(batch, 0)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            TIME.sleep(0.06)
            return self(batch, inner=True).square().mean()  # type: ignore[no-any-return]

    latency, module = Latency(warmup=0), Nested()
    make_trainer(latency, limit_val_batches=0).fit(module)
    assert latency.summary["latency/forward_ms"] == pytest.approx(40)


def test_a_strategy_that_wraps_the_module_changes_nothing(make_trainer: MakeTrainer) -> None:
    latency = Latency(warmup=0)
    try:
        make_trainer(latency, limit_val_batches=0, strategy="ddp", devices=1).fit(Sleepy())
    finally:
        torch.distributed.destroy_process_group()  # Lightning leaves it to the end of the program
    assert latency.summary["latency/forward_ms"] == pytest.approx(40)


def test_predict_alone_is_timed(make_trainer: MakeTrainer) -> None:
    latency = Latency(warmup=1)
    make_trainer(latency).predict(Sleepy())
    assert latency.summary["latency/inference_ms"] == pytest.approx(60)
    assert not any("step" in name for name in latency.summary)


def test_no_hook_stays_behind(make_trainer: MakeTrainer) -> None:
    module = Sleepy()
    make_trainer(Latency(modules=["*"])).fit(module)
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in module.modules())


def test_a_name_that_matches_nothing_is_answered(make_trainer: MakeTrainer) -> None:
    with pytest.raises(UserError, match=r"'slo', which no module is\. Did you mean slow\? Allowed: layer, other, slow"):
        make_trainer(Latency(modules=["slo"])).fit(Sleepy())


def test_says_what_it_could_not_measure(make_trainer: MakeTrainer, caplog: pytest.LogCaptureFixture) -> None:
    class Uncalled(Tiny):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return torch.Tensor(self.layer(batch)).square().mean()

    make_trainer(Latency(warmup=8), limit_val_batches=0).fit(Uncalled())
    assert "no step came after the warm-up of 8" in caplog.text
    assert "never called as a module, so not timed: Uncalled" in caplog.text
