"""MeZO in the Trainer: no gradients, no dropout, one step a batch, and what it resumes to."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_spu.data.glue import GLUE
from lit_spu.errors import UserError
from lit_spu.measure.saved import SavedForBackward
from lit_spu.methods.mezo import MeZO
from lit_spu.optim.mezo import MeZO as Optimizer

Run = Callable[..., Trainer]


class Rates(Callback):
    """The learning rate of every step."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.seen.append(float(trainer.callback_metrics["lr"]))


def test_a_step_is_the_optimizers_and_keeps_nothing(data: Callable[..., GLUE], fit: Run) -> None:
    """Training is the optimizer's step on each batch, to the bit, with the loss in evaluation mode and no graph."""
    torch.manual_seed(0)
    method, small = MeZO(lr=1e-3), data()
    twin = MeZO(lr=1e-3)
    twin.load_state_dict(method.state_dict())
    seed, batches = torch.initial_seed(), []

    class Watch(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, *args: Any) -> None:
            batches.append(batch)

    with SavedForBackward() as saved:
        trainer = fit(method, small, Watch())
    assert len(saved) == 0
    assert trainer.global_step == len(batches) == 4
    optimizer = Optimizer(twin.named_parameters(), lr=1e-3, seed=seed)
    twin.eval()
    for batch in batches:
        optimizer.step(lambda batch=batch: twin.loss(batch), examples=8)  # type: ignore[misc]
    assert all(torch.equal(p, twin.get_parameter(name)) for name, p in method.named_parameters())
    assert all(p.grad is None for p in method.parameters())


def test_dropout_is_off_also_in_training() -> None:
    method = MeZO().train()
    assert any(isinstance(module, torch.nn.Dropout) and module.p for module in method.modules())
    assert not any(module.training for module in method.modules())


def test_a_resumed_run_is_the_uninterrupted_one(data: Callable[..., GLUE], fit: Run, tmp_path: Path) -> None:
    weights = []
    for stopped in (False, True):
        torch.manual_seed(0)
        method = MeZO(lr=1e-3, directions=2)
        if stopped:
            fit(method, data()).save_checkpoint(tmp_path / "stopped.ckpt")
            torch.manual_seed(0)
            method = MeZO(lr=1e-3, directions=2)
        fit(method, data(), max_epochs=2, ckpt_path=tmp_path / "stopped.ckpt" if stopped else None)
        weights.append(method.state_dict())
    same = {name: torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items()}
    assert all(same.values())


@pytest.mark.parametrize(("schedule", "rates"), [("constant", [0.1] * 4), ("linear", [0.1, 0.075, 0.05, 0.025])])
def test_the_rate_is_constant_or_falls(data: Callable[..., GLUE], fit: Run, schedule: Any, rates: list[float]) -> None:
    watch = Rates()
    fit(MeZO(lr=0.1, schedule=schedule, warmup=0.0), data(), watch)
    assert watch.seen == pytest.approx(rates)


@pytest.mark.parametrize("setting", [{"gradient_clip_val": 1.0}, {"accumulate_grad_batches": 2}])
def test_what_has_no_meaning_without_gradients_is_refused(
    data: Callable[..., GLUE], fit: Run, setting: dict[str, Any]
) -> None:
    with pytest.raises(MisconfigurationException, match="manual optimization"):
        fit(MeZO(), data(), **setting)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"optimizer": "adafactor"}, "MeZO is itself the optimizer"),
        ({"epsilon": 0.0}, r"model\.epsilon=0.0 must be above 0"),
        ({"directions": 0}, r"model\.directions=0 at least 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        MeZO(**wrong)
