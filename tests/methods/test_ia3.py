"""(IA)3: what is scaled, and what is refused. The maths is in tests/nn, the peft library's answers in test_lora.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lit_spu.backbones import load_backbone
from lit_spu.errors import UserError
from lit_spu.methods.ia3 import IA3
from lit_spu.nn.ia3 import Scale
from tests.conftest import FAMILIES, encode, use_plain_cross_attention

Tiny = Callable[[str], str]


@pytest.mark.parametrize("family", FAMILIES)
def test_it_starts_as_the_backbone_to_the_bit(tiny: Tiny, family: str) -> None:
    folder = tiny(family)
    torch.manual_seed(0)
    method = IA3(backbone=folder).eval()
    torch.manual_seed(0)
    plain = load_backbone(folder, method.task).eval()
    batch = encode(plain)
    with torch.no_grad():
        if family.startswith("t5"):
            use_plain_cross_attention(plain)  # as the method's: scales on keys and values need them
        assert torch.equal(method(batch), plain(batch))


def test_the_feed_forward_of_t5_is_not_missed(tiny: Tiny) -> None:
    """T-Few's own pattern names `wi_1`, which T5 1.0 does not have."""
    for family in ("t5", "t5-gated"):
        inner = [a for a in IA3(backbone=tiny(family)).adapters if isinstance(a, Scale) and a.inputs]
        assert len(inner) == 8
        assert all(a.target.path.endswith("DenseReluDense.wo") and len(a.scale) == 64 for a in inner)


@pytest.mark.parametrize("settings", [{"outputs": (), "inputs": ()}, {"outputs": ("key", "down"), "inputs": ("down",)}])
def test_each_role_is_scaled_once_and_at_least_one(tiny: Tiny, settings: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="put each role in one of the lists, and at least one role"):
        IA3(backbone=tiny("bert"), **settings)
