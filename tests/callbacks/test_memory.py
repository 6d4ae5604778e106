"""Memory use of allocations and tensors of known sizes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lit_spu.callbacks.memory import Memory
from lit_spu.errors import UserError
from lit_spu.measure import MIB
from tests.callbacks.conftest import QUIET, MakeTrainer, Manual, Tiny, logged

pytestmark = QUIET


class Hungry(Tiny):
    """Holds 128 MiB in its third batch, and 160 MiB when it validates."""

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        if batch_idx == 2:
            torch.ones(128 * MIB // 4)
        return super().training_step(batch, batch_idx)

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        torch.ones(160 * MIB // 4)
        super().validation_step(batch, batch_idx)


def test_memory_measures_the_peak_of_each_step(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    memory = Memory(live=False)
    make_trainer(memory).fit(Hungry())
    peaks = logged(tmp_path, "memory/peak_mib")
    other_peaks = peaks[:2] + peaks[3:]
    assert peaks[2] - max(other_peaks) == pytest.approx(128, rel=0.05)
    assert memory.summary["memory/peak_mib"] == max(peaks) == peaks[2]
    assert memory.summary["memory/mean_mib"] == pytest.approx(sum(peaks) / len(peaks))
    assert memory.summary["memory/inference_peak_mib"] - max(other_peaks) == pytest.approx(160, rel=0.1)
    assert "memory/live_peak_mib" not in memory.summary


def test_live_bytes_are_known_by_kind(make_trainer: MakeTrainer) -> None:
    module, memory = Tiny(), Memory()
    module.layer = torch.nn.Linear(8, 65536, bias=False)  # so wide that memory peaks in the optimizer step
    make_trainer(memory, limit_val_batches=0).fit(module)
    weights = 8 * 65536 * 4 / MIB
    summary = memory.summary
    assert summary["memory/weights_mib"] == weights
    assert summary["memory/gradients_mib"] == weights
    assert summary["memory/optimizer_mib"] == pytest.approx(2 * weights, rel=0.01)
    kinds = ("weights", "gradients", "optimizer", "activations", "rest")
    assert sum(summary[f"memory/{kind}_mib"] for kind in kinds) == pytest.approx(summary["memory/live_peak_mib"])
    assert summary["memory/live_mean_mib"] < summary["memory/live_peak_mib"]


def test_live_bytes_are_counted_in_a_larger_batch(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    class Uneven(Tiny):
        def train_dataloader(self) -> DataLoader[Any]:
            batches = [torch.ones(size, 8) for size in (4, 4, 2, 65536, 4, 65536)]
            return DataLoader(cast(Any, batches), batch_size=None)

    memory = Memory()
    make_trainer(memory, limit_val_batches=0).fit(Uneven())
    small, _, large = logged(tmp_path, "memory/live_peak_mib")  # the first two batches and the fourth
    assert memory.summary["memory/live_peak_mib"] == large
    assert large - small >= 65536 * (8 + 2) * 4 / MIB  # the batch and its logits


def test_a_skipped_batch_does_not_count_as_the_largest(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    sizes = (2, 2, 65536, 65536, 65536)

    class SkipsBatches(Tiny):
        """Skips its third batch, and trains only the bias in its fourth."""

        def train_dataloader(self) -> DataLoader[Any]:
            return DataLoader(cast(Any, [torch.ones(size, 8) for size in sizes]), batch_size=None)

        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            if batch_idx == 2:
                return None
            self.layer.weight.requires_grad_(batch_idx != 3)
            return super().training_step(batch, batch_idx)

        def on_after_backward(self) -> None:
            self.layer.weight.requires_grad_(True)

    plain, memory = Memory(), Memory()
    make_trainer(memory, limit_val_batches=0).fit(SkipsBatches())
    make_trainer(plain, limit_val_batches=0, logger=False).fit(
        type("All", (SkipsBatches,), {"training_step": Tiny.training_step})()
    )
    assert memory.summary["memory/live_peak_mib"] == plain.summary["memory/live_peak_mib"]


def test_live_bytes_are_counted_again_when_the_optimizer_state_grows(make_trainer: MakeTrainer) -> None:
    class OneByOne(Tiny):
        """Trains the second of two weights from the fifth batch on."""

        def __init__(self) -> None:
            super().__init__()
            self.others = torch.nn.Linear(8, 65536, bias=False)

        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            used = self.others(batch).mean() if batch_idx >= 4 else 0.0
            return self(batch).square().mean() + used

    memory = Memory()
    make_trainer(memory, limit_val_batches=0).fit(OneByOne())
    assert memory.summary["memory/optimizer_mib"] == pytest.approx(2 * 8 * 65536 * 4 / MIB, rel=0.01)


@pytest.mark.parametrize(
    ("module", "settings"),
    [(Tiny, {}), (Tiny, {"accumulate_grad_batches": 4}), (Manual, {})],
    ids=["plain", "accumulated", "by hand"],
)
def test_live_bytes_include_the_optimizer_state(
    module: type[Tiny], settings: dict[str, Any], make_trainer: MakeTrainer
) -> None:
    memory = Memory()
    make_trainer(memory, limit_val_batches=0, **settings).fit(module())
    assert memory.summary["memory/optimizer_mib"] >= 2 * (8 * 2 + 2) * 4 / MIB


def test_a_failing_step_ends_the_counting(make_trainer: MakeTrainer) -> None:
    class Failing(Tiny):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            raise RuntimeError("step failed")

    module, memory = Failing(), Memory()
    with pytest.raises(RuntimeError, match="step failed"):
        make_trainer(memory).fit(module)
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
    assert not module.layer.weight._post_accumulate_grad_hooks


@pytest.mark.gpu
def test_memory_on_cuda(make_trainer: MakeTrainer) -> None:
    class HungryOnCuda(Tiny):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            if batch_idx == 2:
                torch.ones(128 * MIB // 4, device=self.device)
            return super().training_step(batch, batch_idx)

    memory = Memory()
    make_trainer(memory, accelerator="cuda", devices=1).fit(HungryOnCuda())
    assert 128 < memory.summary["memory/peak_mib"] < 2 * 128  # the workspace of a matrix product takes up to 72
    assert memory.summary["memory/reserved_mib"] >= memory.summary["memory/peak_mib"]


def test_memory_writes_a_timeline(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    memory = Memory(timeline=True)
    make_trainer(memory).fit(Tiny())
    lines = (tmp_path / "run/0/memory-timeline.csv").read_text().splitlines()
    totals = [sum(map(int, line.split(",")[2:])) for line in lines[1:]]
    assert max(totals) / MIB == pytest.approx(memory.summary["memory/live_peak_mib"])
    phases = [line.split(",")[1] for line in lines[1:]]
    assert list(dict.fromkeys(phases)) == ["forward", "backward", "optimizer"]
    assert "<svg" in (tmp_path / "run/0/memory-timeline.svg").read_text()


def test_memory_refuses_a_timeline_without_live_bytes() -> None:
    with pytest.raises(UserError, match="live=false"):
        Memory(live=False, timeline=True)
