"""Sites: the linears of every family by what they do."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import get_args

import pytest
import torch
from torch import nn

from lit_spu.backbones import Role, find_norms, load_backbone
from lit_spu.backbones.family import Family
from lit_spu.errors import UserError
from lit_spu.tasks import TASKS
from tests.conftest import FAMILIES

ROLES = get_args(Role)
Tiny = Callable[[str], str]


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_of_a_block_is_a_site_once(tiny: Tiny, family: str) -> None:
    backbone = load_backbone(tiny(family), TASKS["sst2"])
    targets = backbone.target_linears(*ROLES)
    linears = [
        module
        for block in backbone.blocks
        for module in block.modules()
        if isinstance(getattr(module, "weight", None), nn.Parameter)
        and module.weight.ndim == 2
        and not isinstance(module, nn.Embedding)
    ]
    assert {id(target.linear) for target in targets} == {id(linear) for linear in linears}
    for linear in linears:
        parts = [target for target in targets if target.linear is linear]
        whole = linear.get_parameter("weight")
        assert torch.equal(torch.cat([target.weight for target in parts]), whole.T if parts[0].is_transposed else whole)
    assert len({str(target) for target in targets}) == len(targets)
    assert all(backbone.base_model.model.get_submodule(target.path) is target.linear for target in targets)


@pytest.mark.parametrize("family", FAMILIES)
def test_roles_fit_their_shapes(tiny: Tiny, family: str) -> None:
    """The tiny models are 32 wide and 64 or 128 inside: that tells widening from narrowing and from attention."""
    shapes = {
        role: {tuple(target.weight.shape) for target in load_backbone(tiny(family), TASKS["sst2"]).target_linears(role)}
        for role in ROLES
    }
    grouped = {(16, 32), (32, 32)}  # keys and values may be shared by two heads
    inner = 128 if family == "gpt2" else 64
    assert shapes["up"] == {(inner, 32)}
    assert shapes["down"] == {(32, inner)}
    assert shapes["query"] == shapes["output"] == {(32, 32)}
    assert shapes["key"] == shapes["value"]
    assert shapes["key"] <= grouped


@pytest.mark.parametrize(("family", "blocks", "cross"), [("bert", 4, 0), ("t5", 8, 4), ("t5-gated", 8, 4)])
def test_cross_attention_and_gated_feed_forwards_are_not_missed(
    tiny: Tiny, family: str, blocks: int, cross: int
) -> None:
    backbone = load_backbone(tiny(family), TASKS["sst2"])
    assert len(backbone.target_linears("key")) == blocks + cross
    assert len(backbone.target_linears("down")) == blocks
    assert len(backbone.target_linears("up")) == blocks * (2 if family == "t5-gated" else 1)


def test_a_key_of_a_fused_linear_is_the_key(tiny: Tiny) -> None:
    """Attention does not change by a constant in all keys: it must not by the bias of what is called a key."""
    backbone = load_backbone(tiny("gpt2"), TASKS["sst2"]).eval()
    x = {"input_ids": torch.arange(1, 7).view(2, 3), "attention_mask": torch.ones(2, 3, dtype=torch.long)}
    with torch.no_grad():
        before = backbone.base_model.forward(x)
        role: Role
        for role, same in (("key", True), ("query", False), ("value", False)):
            target = backbone.target_linears(role)[0]
            assert target.bias is not None
            target.bias.add_(1.0)
            assert torch.allclose(backbone.base_model.forward(x), before, atol=1e-5) is same
            target.bias.sub_(1.0)


def test_a_role_that_no_linear_plays_is_an_error(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = load_backbone(tiny("bert"), TASKS["sst2"])
    family = backbone.base_model.family
    without = {role: patterns for role, patterns in family.target_linears.items() if role != "value"}
    backbone.base_model.family = Family(**{**vars(family), "target_linears": without})
    with pytest.raises(UserError, match=re.escape("bert have no linear layer for value")):
        backbone.target_linears("query", "value")


@pytest.mark.parametrize(("family", "norms"), [("bert", 8), ("t5", 4 * 2 + 4 * 3), ("llama", 8)])
def test_the_norms_are_those_of_the_blocks(tiny: Tiny, family: str, norms: int) -> None:
    blocks = load_backbone(tiny(family), TASKS["sst2"]).blocks
    assert sum(len(find_norms(block)) for block in blocks) == norms
