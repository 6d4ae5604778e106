"""Training the last blocks stores and moves nothing below them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lit_spu.errors import UserError
from lit_spu.measure.saved import SavedForBackward
from lit_spu.methods.full import FullFineTuning
from lit_spu.methods.last_layers import LastLayers
from tests.conftest import encode


@pytest.mark.parametrize("family", ["bert", "t5", "gpt2"])
def test_gradients_reach_the_last_blocks_only(tiny: Callable[[str], str], family: str) -> None:
    method = LastLayers(layers=2, backbone=tiny(family)).train()
    method.loss(encode(method.backbone)).backward()
    got = [any(p.grad is not None for p in block.parameters()) for block in method.backbone.blocks]
    assert got == [False] * (len(got) - 2) + [True] * 2
    assert all(p.grad is None for part in method.backbone.base_model.embeddings for p in part.parameters())


def test_memory_follows_the_number_of_layers(tiny: Callable[[str], str]) -> None:
    saved = []
    for layers in (2, 3, 4):  # of the last one, less is computed
        method = LastLayers(layers=layers, backbone=tiny("bert")).train()
        batch = encode(method.backbone)
        with SavedForBackward(method.parameters()) as counter:
            method.loss(batch)
        saved.append(counter.nbytes)
    assert saved[2] - saved[1] == saved[1] - saved[0] > 0  # as much again with every layer
    full = FullFineTuning(backbone=tiny("bert")).train()
    with SavedForBackward(full.parameters()) as counter:
        full.loss(batch)
    assert saved[2] < counter.nbytes


def test_impossible_depths_are_refused(tiny: Callable[[str], str]) -> None:
    with pytest.raises(UserError, match=r"model.layers=5.*use 1 to 4"):
        LastLayers(layers=5, backbone=tiny("bert"))
