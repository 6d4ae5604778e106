"""BitFit: every bias and nothing else."""

from __future__ import annotations

from collections.abc import Callable

import torch

from lit_spu.backbones import load_backbone
from lit_spu.methods.bitfit import BitFit
from tests.conftest import encode, use_plain_cross_attention

Tiny = Callable[[str], str]


def trained(method: BitFit) -> dict[str, int]:
    parts = [*method.backbone.base_model.embeddings, *method.backbone.blocks]
    inside = {id(p) for part in parts for p in part.parameters()}
    return {n: p.numel() for n, p in method.named_parameters() if p.requires_grad and id(p) in inside}


def test_it_trains_every_bias_and_nothing_else(tiny: Tiny) -> None:
    found = trained(BitFit(backbone=tiny("bert")))
    assert all(name.endswith("bias") for name in found)
    per_block = 4 * 32 + 64 + 32 + 2 * 32  # attention, feed-forward, two norms
    assert sum(found.values()) == 4 * per_block + 32  # and the embeddings' norm


def test_linears_without_a_bias_get_one_that_changes_nothing_yet(tiny: Tiny) -> None:
    method, plain = (
        BitFit(backbone=tiny("t5"), head="names").eval(),
        load_backbone(tiny("t5"), BitFit(backbone=tiny("t5")).task, "names").eval(),
    )
    batch = encode(plain)
    use_plain_cross_attention(plain)  # as the method's: biases on keys and values need them
    with torch.no_grad():
        assert torch.equal(method(batch), plain(batch))
    encoder, decoder = 4 * (4 * 32 + 64 + 32), 4 * (8 * 32 + 64 + 32)
    assert sum(trained(method).values()) == encoder + decoder
