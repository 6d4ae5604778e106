"""Siblings on one backbone: each becomes what it becomes alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer, seed_everything

from lit_spu.data.glue import GLUE
from lit_spu.errors import UserError
from lit_spu.methods.frozen import HiddenStateReader
from lit_spu.methods.kladder import KLadder
from lit_spu.methods.ladder import LadderSideTuning
from lit_spu.methods.lst_distill import LSTDistillation
from lit_spu.methods.shared_trunk import SharedTrunk

Run = Callable[..., Trainer]

SIBLINGS: dict[str, dict[str, Any]] = {
    "low": {"lr": 1e-3},
    "decayed": {"lr": 1e-2, "weight_decay": 0.1},
    "other": {"seed": 7},
}
SMALL = {"limit_train": 40, "limit_validation": 20}


def sides(method: HiddenStateReader) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in method.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("cls", [LadderSideTuning, KLadder, LSTDistillation])
@pytest.mark.parametrize("settings", [{}, {"gradient_clip_val": 0.5}], ids=["", "clipped"])
def test_each_becomes_what_it_becomes_alone(
    data: Callable[..., GLUE], fit: Run, cls: type[HiddenStateReader], settings: dict[str, Any]
) -> None:
    """To the bit, with the dropout of the mini model's side networks and clipping by their own norms."""
    seed_everything(3, verbose=False)
    shared = SharedTrunk(SIBLINGS, side=cls.__name__, settings={"reduction": 4, "lr": 3e-3})
    trainer = fit(shared, data(**SMALL), max_epochs=2, **settings)
    for name, own in SIBLINGS.items():
        seed_everything(3, verbose=False)  # which orders the data
        torch.manual_seed(own.get("seed", 3))
        other = {"lr": 3e-3, **own}
        other.pop("seed", None)
        alone = cls(reduction=4, **other)
        score = fit(alone, data(**SMALL), max_epochs=2, **settings).callback_metrics
        assert all(torch.equal(tensor, sides(shared.siblings[name])[key]) for key, tensor in sides(alone).items())
        for metric in ("val/loss", "val/accuracy"):
            assert trainer.callback_metrics[f"{metric}/{name}"] == score[metric]


def test_the_backbone_runs_once_for_all_and_is_held_once(data: Callable[..., GLUE], fit: Run) -> None:
    shared = SharedTrunk(SIBLINGS, settings={"reduction": 4})
    ran = []
    for backbone in (shared.backbone, *(sibling.backbone for sibling in shared.siblings.values())):
        backbone.blocks[0].register_forward_hook(lambda *_: ran.append(1))
        assert (
            backbone.blocks[0].parameters().__next__().data_ptr()
            == next(shared.backbone.blocks[0].parameters()).data_ptr()
        )
    fit(shared, data(**SMALL), num_sanity_val_steps=0)
    assert len(ran) == 5 + 3  # batches of training and of validation


def test_the_best_at_validation_answers_and_is_remembered(data: Callable[..., GLUE], fit: Run, tmp_path: Path) -> None:
    shared = SharedTrunk({"still": {"lr": 1e-30}, "quick": {"lr": 3e-3}}, settings={"reduction": 2})
    trainer = fit(shared, data(limit_train=600, limit_validation=100, batch_size=32), max_epochs=4)
    scores = trainer.callback_metrics
    assert shared.best == "quick"
    assert scores["val/accuracy"] == scores["val/accuracy/quick"] > scores["val/accuracy/still"]
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    again = SharedTrunk.load_from_checkpoint(tmp_path / "x.ckpt").eval()
    assert again.best == "quick"
    batch = next(iter(trainer.datamodule.val_dataloader()[0]))  # type: ignore[attr-defined]
    with torch.no_grad():
        assert torch.equal(again(batch), shared.eval().siblings["quick"](batch))


def test_a_seed_given_to_the_run_alone_is_that_of_all() -> None:
    seed_everything(5, verbose=False)
    shared = SharedTrunk({"a": {}, "b": {}, "c": {"seed": 6}}, settings={"reduction": 4})
    a, b, c = (sides(sibling) for sibling in shared.siblings.values())
    assert torch.initial_seed() == 5
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)


@pytest.mark.parametrize(
    ("siblings", "side", "says"),
    [
        ({}, "LadderSideTuning", "siblings: {} is not allowed. Give a mapping: at least 1"),
        ({"a": {"backbone": "mini-t5"}}, "LadderSideTuning", "model.siblings.a: backbone must be equal"),
        ({"a": {"reductoin": 2}}, "LadderSideTuning", "no 'reductoin'. Did you mean reduction"),
        ({"a": {}}, "LoRA", "model.side=LoRA reads no hidden states"),
        ({"a": {}}, "SharedTrunk", "model.side=SharedTrunk reads no hidden states"),
        ({"a": {}}, "HiddenStateReader", "model.side=HiddenStateReader reads no hidden states"),
        ({"a": {"lr": -1}}, "LadderSideTuning", r"model.siblings.a.lr: -1 is not allowed"),
        ({"a": {"seed": 2**32}}, "LadderSideTuning", r"model.siblings.a.seed: 4294967296 is not allowed"),
        ({"a.b": {}}, "LadderSideTuning", r"of letters, digits"),
        ({"items": {}}, "LadderSideTuning", "'items' is an attribute"),
    ],
)
def test_what_makes_no_siblings_is_refused(siblings: Any, side: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        SharedTrunk(siblings, side=side)


def test_a_seed_is_no_setting_of_all_siblings() -> None:
    with pytest.raises(UserError, match=r"model.settings: LadderSideTuning has no 'seed'"):
        SharedTrunk({"a": {}}, settings={"seed": 3})
