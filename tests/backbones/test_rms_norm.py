"""The RMS norm: transformers' own module is the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from lit_spu.backbones.rms_norm import rms_norm


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("module", [T5LayerNorm, LlamaRMSNorm])
def test_puts_out_what_the_models_norm_does_to_the_bit_and_has_its_gradients(module: Any, frozen: bool) -> None:
    norm = module(24, eps=1e-3)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 5, 24, requires_grad=True)
    norm.weight.requires_grad_(not frozen)
    learned = [x] if frozen else [x, norm.weight]
    out, own = rms_norm(x, norm.weight, norm.variance_epsilon), norm(x)
    assert torch.equal(out, own)
    seen = torch.randn_like(x)
    for mine, expected in zip(*(torch.autograd.grad(y, learned, seen) for y in (out, own)), strict=True):
        torch.testing.assert_close(mine, expected)


def test_the_gradients_are_those_of_finite_differences() -> None:
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, weight: rms_norm(x, weight, 0.1), (x, weight))
