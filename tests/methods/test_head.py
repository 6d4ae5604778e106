"""Probing trains a head on features that stay as they are."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lit_spu.measure.saved import SavedForBackward
from lit_spu.methods.head import HeadOnly
from tests.conftest import encode


@pytest.mark.parametrize(
    ("family", "head", "expected"),
    [
        ("bert", "classifier", 32 * 32 + 32 + 32 * 2 + 2),  # pooler and classifier
        ("distilbert", "classifier", 32 * 32 + 32 + 32 * 2 + 2),
        ("roberta", "classifier", 32 * 32 + 32 + 32 * 2 + 2),
        ("bert", "prompt", 32 * 32 + 32 + 2 * 32 + 32 * 2 + 2),  # transform with its norm, two rows with biases
        ("t5", "classifier", 32 * 32 + 32 + 32 * 2 + 2),  # dense and out_proj
        ("t5", "names", 2 * 32),  # two rows
        ("gpt2", "classifier", 2 * 32),  # score
        ("gpt2", "prompt", 2 * 32),
    ],
)
def test_the_head_alone_is_trained(tiny: Callable[[str], str], family: str, head: str, expected: int) -> None:
    method = HeadOnly(backbone=tiny(family), head=head)
    assert sum(p.numel() for p in method.parameters() if p.requires_grad) == expected


def test_nothing_of_the_trunk_is_stored(tiny: Callable[[str], str]) -> None:
    method = HeadOnly(backbone=tiny("bert")).train()
    batch = encode(method.backbone)
    with SavedForBackward(method.parameters()) as counter:
        method.loss(batch)
    hidden = batch["input_ids"].numel() * 32 * 4  # bytes of one state; a BERT's own pooler reads it
    assert 0 < counter.nbytes < 1.5 * hidden
    features = method.backbone.base_model.forward(method.backbone.model_inputs(batch))
    assert torch.equal(features, method.backbone.base_model.forward(method.backbone.model_inputs(batch)))  # no dropout
