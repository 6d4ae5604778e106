"""The frozen RMS norm: transformers' own module is the oracle."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from lit_spu.nn.rms_norm import rms_norm


@pytest.mark.parametrize("module", [T5LayerNorm, LlamaRMSNorm])
def test_puts_out_what_the_models_norm_does_to_the_bit_and_has_its_gradient(module: Any) -> None:
    norm = module(24, eps=1e-3).requires_grad_(False)
    norm.weight.copy_(torch.randn(24))
    x = torch.randn(3, 5, 24, requires_grad=True)
    out, own = rms_norm(x, norm.weight, norm.variance_epsilon), norm(x)
    assert torch.equal(out, own)
    seen = torch.randn_like(x)
    mine, expected = (torch.autograd.grad(y, x, seen)[0] for y in (out, own))
    torch.testing.assert_close(mine, expected)


def test_the_gradient_is_that_of_finite_differences() -> None:
    x = torch.randn(4, 7, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(7, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: rms_norm(x, weight, 0.1), x)
