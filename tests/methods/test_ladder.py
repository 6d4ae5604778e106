"""Ladder side-tuning as a method: what it stores, what it trains, what it leaves alone. The maths is in tests/nn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from lit_spu.data.glue import GLUE
from lit_spu.errors import UserError
from lit_spu.measure.saved import SavedForBackward
from lit_spu.methods.full import FullFineTuning
from lit_spu.methods.ladder import LadderSideTuning
from lit_spu.nn import pruning
from tests.conftest import FAMILIES, encode
from tests.runs import gradient_step


@pytest.mark.parametrize("family", FAMILIES)
def test_the_backbone_keeps_no_gradient_and_no_activation(tiny: Callable[[str], str], family: str) -> None:
    """The only saved tensors of the backbone are its hidden states, the down-projections' inputs, without a graph."""
    method = LadderSideTuning(backbone=tiny(family), reduction=2, gradient_checkpointing=False).train()
    batch = encode(method.backbone)
    with SavedForBackward(method.parameters()) as whole:
        loss = method.loss(batch)
    with torch.no_grad():
        taps = method.backbone.hidden_states(batch)
    with SavedForBackward(method.parameters()) as side:
        hidden = method.side(taps, method.backbone.model_inputs(batch), method.backbone.answer_position(batch))
        state = method.side.up(method.backbone.select_answer_state(hidden, batch))
        method.backbone.loss(method.backbone.apply_head(state), batch)
    assert whole.nbytes == side.nbytes
    assert all(tensor in side for tap in taps for tensor in (tap.embeddings, *tap.blocks))
    loss.backward()
    head = {id(p) for p in method.backbone.parameters() if p.requires_grad}
    assert all(p.grad is None for p in method.backbone.parameters() if id(p) not in head)
    assert all(p.grad is not None for p in method.side.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_gradient_checkpointing_changes_memory_alone(tiny: Callable[[str], str], family: str) -> None:
    steps = []
    folder = tiny(family)
    for recompute in (False, True):
        torch.manual_seed(0)
        method = LadderSideTuning(backbone=folder, reduction=2, gradient_checkpointing=recompute).train()
        steps.append(gradient_step(method))
    losses, saved, gradients = zip(*steps, strict=True)
    assert torch.equal(*losses)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True) if a is not None and b is not None)
    assert saved[1] < 0.6 * saved[0]


def test_it_stores_a_fraction_of_full_fine_tuning(tiny: Callable[[str], str]) -> None:
    saved = []
    for method in (FullFineTuning(backbone=tiny("bert")), LadderSideTuning(backbone=tiny("bert"), reduction=8)):
        batch = encode(method.train().backbone)
        with SavedForBackward(method.parameters()) as counter:
            method.loss(batch)
        saved.append(counter.nbytes)
    assert saved[1] < 0.3 * saved[0]


def sides(method: LadderSideTuning) -> list[torch.Tensor]:
    return [p.detach().clone() for p in method.side.model.parameters()]


def test_it_starts_as_the_pruned_backbone_once(
    data: Callable[..., GLUE], fit: Callable[..., Trainer], tmp_path: Path
) -> None:
    """By magnitude when it is made, by Fisher information when training begins, and not when it goes on."""
    small = data(limit_train=64, limit_validation=20)
    made = LadderSideTuning(init="magnitude", reduction=4)
    assert all(torch.equal(*pair) for pair in zip(sides(made), sides(pruned(made, "magnitude")), strict=True))
    method = LadderSideTuning(init="fisher", fisher_examples=8, reduction=4, lr=1e-30)
    random = sides(method)
    trainer = fit(method, small)
    started = sides(method)
    assert not any(torch.equal(*pair) for pair in zip(random[:3], started[:3], strict=True))
    assert all(torch.equal(*pair) for pair in zip(started, sides(pruned(method, "fisher", small)), strict=True))
    head = {id(p) for p in method.backbone.head_modules.parameters()}
    assert all(p.grad is None and not p.requires_grad for p in method.backbone.parameters() if id(p) not in head)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    again = LadderSideTuning(init="fisher", fisher_examples=8, reduction=4, lr=1e-30)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lit_spu.nn.pruning.fisher", None)  # which would fail
        fit(again, small, ckpt_path=tmp_path / "x.ckpt")
    assert all(torch.equal(*pair) for pair in zip(started, sides(again), strict=True))


def pruned(method: LadderSideTuning, how: str, data: GLUE | None = None) -> LadderSideTuning:
    """Another of its kind, started by hand."""
    other = LadderSideTuning(reduction=4)
    other.backbone.load_state_dict(method.backbone.state_dict())
    trunk = other.backbone.eval().base_model
    scores = pruning.magnitude(trunk) if how == "magnitude" else pruning.fisher(other.backbone, data.draw(8))  # type: ignore[union-attr]
    pruning.init_from_pruned(other.side.side_model, trunk, other.side.layer_indices, scores)
    return other


def test_without_our_data_fisher_is_refused(fit: Callable[..., Trainer], data: Callable[..., GLUE]) -> None:
    method = LadderSideTuning(init="fisher", reduction=4)
    module = data()
    monkeypatched: Any = module
    monkeypatched.draw = None
    with pytest.raises(UserError, match=r"model.init=fisher and model.fit_readout draw examples"):
        fit(method, module)


def test_settings_that_exclude_each_other_are_refused(tiny: Callable[[str], str]) -> None:
    with pytest.raises(UserError, match=r"model.init=magnitude prunes weights in fp32"):
        LadderSideTuning(backbone=tiny("bert"), reduction=2, init="magnitude", backbone_precision="bf16")
    with pytest.raises(UserError, match=r"model.backbone_dropout"):
        LadderSideTuning(backbone=tiny("bert"), reduction=2, backbone_dropout=True, activation_cache="memory")


def test_the_backbones_dropout_is_off_unless_it_is_asked_for(tiny: Callable[[str], str]) -> None:
    for asked in (False, True):
        method = LadderSideTuning(backbone="mini-bert", reduction=4, backbone_dropout=asked).train()
        batch = encode(method.backbone)
        once, again = (method.backbone.hidden_states(batch)[0].blocks[-1] for _ in range(2))
        assert torch.equal(once, again) is not asked
        method.eval()
        once, again = (method.backbone.hidden_states(batch)[0].blocks[-1] for _ in range(2))
        assert torch.equal(once, again)
