"""Learned scales against their formula."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from lit_spu.backbones.target_linears import TargetLinear
from lit_spu.errors import UserError
from lit_spu.nn.ia3 import Scale


def scaled(kind: str, inputs: bool) -> Scale:
    torch.manual_seed(0)
    linear: nn.Module = nn.Linear(6, 9) if kind == "linear" else Conv1D(9, 6)
    nn.init.normal_(linear.get_parameter("bias"))
    scale = Scale(TargetLinear("linear", linear.double(), "key", *((1, 3) if kind == "fused" else ())), inputs).double()
    assert bool((scale.scale == 1).all())
    nn.init.normal_(scale.scale)  # of either sign
    return scale


CASES = [("linear", False), ("linear", True), ("transposed", False), ("transposed", True), ("fused", False)]


@pytest.mark.parametrize(("kind", "inputs"), CASES)
def test_it_scales_what_goes_in_or_comes_out(kind: str, inputs: bool) -> None:
    scale = scaled(kind, inputs)
    linear, x = scale.target.linear, torch.randn(2, 4, 6, dtype=torch.float64)
    vector = torch.ones(6 if inputs else 9, dtype=torch.float64)
    vector[scale.target.part * len(scale.scale) :][: len(scale.scale)] = scale.scale.detach()
    wanted = linear(x * vector) if inputs else linear(x) * vector
    scale.attach()
    torch.testing.assert_close(linear(x), wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("kind", "inputs"), CASES)
def test_merged_it_puts_out_the_same_and_unmerged_it_is_what_it_was(kind: str, inputs: bool) -> None:
    scale = scaled(kind, inputs).attach()
    linear, x = scale.target.linear, torch.randn(4, 6, dtype=torch.float64)
    before, state = linear(x), {name: t.clone() for name, t in linear.state_dict().items()}
    scale.merge()
    assert not torch.equal(linear.weight, state["weight"])
    torch.testing.assert_close(linear(x), before, atol=1e-12, rtol=0)
    scale.unmerge()
    assert all(torch.equal(t, state[name]) for name, t in linear.state_dict().items())


def test_the_input_of_a_part_of_a_fused_layer_is_refused() -> None:
    """It is the input of the other parts, too."""
    with pytest.raises(UserError, match="part of a fused layer, and all of its parts have the same input"):
        scaled("fused", inputs=True)
