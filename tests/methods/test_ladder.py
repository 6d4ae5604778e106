"""Ladder side-tuning as a method: what it stores, what it trains, what it leaves alone. The maths is in tests/nn."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lit_spu.measure.saved import SavedForBackward
from lit_spu.methods.full import FullFineTuning
from lit_spu.methods.ladder import LadderSideTuning
from tests.conftest import FAMILIES, encode


@pytest.mark.parametrize("family", FAMILIES)
def test_the_backbone_keeps_no_gradient_and_no_activation(tiny: Callable[[str], str], family: str) -> None:
    """Of the backbone only its taps are kept, as inputs of the down-projections: none has a history."""
    method = LadderSideTuning(backbone=tiny(family), reduction=2, activation_checkpointing=False).train()
    batch = encode(method.backbone)
    with SavedForBackward(method.parameters()) as whole:
        loss = method.loss(batch)
    with torch.no_grad():
        taps = method.backbone.trunk(batch)
    with SavedForBackward(method.parameters()) as side:
        hidden = method.side(taps, method.backbone.inputs(batch))
        state = method.side.up(method.backbone.read(hidden, batch))
        method.backbone.loss(method.backbone.head(state), batch)
    assert whole.nbytes == side.nbytes
    assert all(tensor in side for tap in taps for tensor in (tap.embeddings, *tap.blocks))
    loss.backward()
    head = {id(p) for p in method.backbone.parameters() if p.requires_grad}
    assert all(p.grad is None for p in method.backbone.parameters() if id(p) not in head)
    assert all(p.grad is not None for p in method.side.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputing_the_feed_forwards_changes_memory_alone(tiny: Callable[[str], str], family: str) -> None:
    losses, gradients, saved = [], [], []
    folder = tiny(family)
    for recompute in (False, True):
        torch.manual_seed(0)
        method = LadderSideTuning(backbone=folder, reduction=2, activation_checkpointing=recompute).train()
        batch = encode(method.backbone)
        with SavedForBackward(method.parameters()) as counter:
            loss = method.loss(batch)
        losses.append(loss.detach())
        saved.append(counter.nbytes)
        loss.backward()
        gradients.append([p.grad for p in method.side.parameters()])
    assert torch.equal(*losses)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True) if a is not None and b is not None)
    inner = 64 // 2  # what a block's state is widened to, kept once less at least by each of four blocks
    least = 4 * batch["input_ids"].numel() * inner * 4 if method.side.trunk.family.feed_forward else 0
    assert saved[0] - saved[1] >= least


def test_it_stores_a_fraction_of_full_fine_tuning(tiny: Callable[[str], str]) -> None:
    saved = []
    for method in (FullFineTuning(backbone=tiny("bert")), LadderSideTuning(backbone=tiny("bert"), reduction=8)):
        batch = encode(method.train().backbone)
        with SavedForBackward(method.parameters()) as counter:
            method.loss(batch)
        saved.append(counter.nbytes)
    assert saved[1] < 0.3 * saved[0]
