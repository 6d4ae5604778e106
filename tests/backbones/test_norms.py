"""RMS norms by torch's function against transformers' own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm

from lit_spu.backbones import find_norms, load_backbone, norms
from lit_spu.backbones.hooks import has_default_forward
from lit_spu.tasks import TASKS
from tests.conftest import encode

Tiny = Callable[[str], str]
FAMILIES = ("t5", "t5-gated", "llama", "mistral", "qwen2", "qwen3")


def plain_copy(module: Any) -> Any:
    """A copy that runs transformers' own norms."""
    plain = copy.deepcopy(module)
    for norm in find_norms(plain):
        vars(norm).pop("forward", None)
    return plain


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_transformers(tiny: Tiny, family: str) -> None:
    backbone = load_backbone(tiny(family), TASKS["sst2"]).eval()
    found = find_norms(backbone)
    assert found
    assert not any(map(has_default_forward, found))
    torch.manual_seed(0)
    for norm in found:
        nn.init.uniform_(norm.get_parameter("weight"), 0.5, 2)
    batch, results = encode(backbone), []
    for model in (backbone, plain_copy(backbone), copy.deepcopy(backbone)):
        logits = model(batch)
        model.loss(logits, batch).backward()
        results.append([logits, *(p.grad for p in model.parameters() if p.grad is not None)])
    for ours, theirs, again in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
        assert torch.equal(ours, again)


@pytest.mark.parametrize("family", ["t5", "llama"])
def test_half_precision_is_as_exact_as_before(tiny: Tiny, family: str) -> None:
    torch.manual_seed(0)
    norm = find_norms(load_backbone(tiny(family), TASKS["sst2"]))[0]
    weight, x = norm.get_parameter("weight"), torch.randn(64, 32).bfloat16()
    nn.init.uniform_(weight, 0.5, 2)
    norm.bfloat16()
    plain = plain_copy(norm)
    exact = plain_copy(norm).float()(x.float())

    def error(found: Tensor) -> Tensor:
        assert found.dtype is torch.bfloat16
        difference: Tensor = (found - exact).norm()
        return difference

    assert error(norm(x)) <= error(plain(x))
    norm.float()  # its own forward, as torch's function has no kernel for two dtypes
    assert torch.equal(norm(x), plain.float()(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_norm_that_computes_something_else_is_left_alone(dtype: torch.dtype) -> None:
    """Gemma's multiplies by 1 + weight. Models are loaded with their data type as the default."""
    norm: Any = Gemma2RMSNorm(8)
    norm.variance_epsilon = norm.eps
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        norms.install(norm)
    finally:
        torch.set_default_dtype(default)
    assert has_default_forward(norm)
