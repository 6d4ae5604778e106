"""MeZO + LST: each part moves by its own rule, and in its own turn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_spu.data.glue import GLUE
from lit_spu.errors import UserError
from lit_spu.measure.saved import SavedForBackward
from lit_spu.methods.ladder import LadderSideTuning
from lit_spu.methods.mezo_lst import MeZOLST
from lit_spu.optim import schedules
from tests.conftest import encode

Run = Callable[..., Trainer]


class Watch(Callback):
    """The batches, and the weights in front of every step and behind the last."""

    def __init__(self) -> None:
        self.batches: list[Any] = []
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch)
        self.weights.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.weights.append({name: p.detach().clone() for name, p in pl_module.named_parameters()})

    @property
    def moved(self) -> list[set[str]]:
        """The first names of what each step moved."""
        return [
            {name.partition(".")[0] for name in after if not torch.equal(after[name], before[name])}
            for before, after in zip(self.weights, self.weights[1:], strict=False)
        ]


def test_first_the_one_and_then_the_other(data: Callable[..., GLUE], fit: Run) -> None:
    watch = Watch()
    trainer = fit(MeZOLST(reduction=4, lr=1e-3, backbone_share=0.25), data(), watch)
    assert watch.moved == [{"backbone"}, {"side"}, {"side"}, {"side"}]
    assert trainer.global_step == 4


def test_each_part_moves_by_its_own_rule(data: Callable[..., GLUE], fit: Run) -> None:
    """In each step, to the bit: the backbone by MeZO on what it answers itself, the ladder by AdamW on the new one."""
    torch.manual_seed(0)
    watch, method = Watch(), MeZOLST(reduction=4, order="joint", lr=1e-3, side_lr=1e-2, warmup=0.0)
    twin = MeZOLST(reduction=4, order="joint").eval()
    twin.load_state_dict(method.state_dict())
    seed = torch.initial_seed()
    torch.manual_seed(seed)
    trainer = fit(method, data(), watch)
    assert trainer.global_step == 4
    assert watch.moved == [{"backbone", "side"}] * 4
    mezo = twin.make_optimizer(lr=1e-3, seed=seed)
    adamw = torch.optim.AdamW(twin.side.parameters(), 1e-2, weight_decay=0.0, fused=True)
    rate = schedules.linear(adamw, 0.0, 4)
    for batch in watch.batches:
        mezo.step(lambda: twin.backbone.loss(twin.backbone(batch), batch))  # noqa: B023
        twin.backbone.loss(twin(batch), batch).backward()
        adamw.step()
        rate.step()
        twin.zero_grad()
    assert all(torch.equal(p, twin.get_parameter(name)) for name, p in method.named_parameters())


def test_nothing_of_the_backbone_is_kept_for_the_backward_pass() -> None:
    """A ladder on a frozen backbone keeps as much, but for what the head reads."""
    kept = []
    for method in (LadderSideTuning(reduction=4, head="prompt"), MeZOLST(reduction=4)):
        batch = encode(method.backbone)
        with SavedForBackward(exclude=method.parameters()) as saved:
            method.eval().loss(batch)
        kept.append(saved.nbytes)
    assert kept[0] <= kept[1] < kept[0] + 16 * len(batch["labels"]) * method.backbone.stacks[0].width


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"activation_cache": "memory"}, r"leave out model\.activation_cache"),
        ({"trajectory": "there"}, r"leave out .* model\.trajectory"),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        MeZOLST(**wrong)
