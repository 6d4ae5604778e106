"""Forward passes with perturbed weights: every torch function reads them, and none is written."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_spu.backbones import load_backbone
from lit_spu.methods.base import Method
from lit_spu.methods.bitfit import BitFit
from lit_spu.methods.ia3 import IA3
from lit_spu.methods.ladder import LadderSideTuning
from lit_spu.methods.lora import LoRA
from lit_spu.optim.keyed_random import key_of
from lit_spu.optim.mezo import NOISES
from lit_spu.optim.noise import GaussianNoise, Noise
from lit_spu.optim.perturbed import Perturbed
from lit_spu.tasks import TASKS
from tests.conftest import FAMILIES, encode


def with_perturbed_weights(method: Any, keys: Sequence[tuple[Tensor, int]], noise: Noise, scale: float) -> Any:
    """Return a copy of a module with the perturbation added to its weights."""
    copied = copy.deepcopy(method)
    key = {id(parameter): k for parameter, k in keys}
    with torch.no_grad():
        for own, its in zip(method.parameters(), copied.parameters(), strict=True):
            if id(own) in key:
                its.add_(noise.sample(key[id(own)], own), alpha=scale)
    return copied


METHODS: dict[str, Callable[..., Method]] = {
    "lora": lambda **kwargs: LoRA(norms=True, **kwargs),
    "ia3": IA3,
    "bitfit": BitFit,
    "ladder": lambda **kwargs: LadderSideTuning(reduction=2, **kwargs),
}


@pytest.mark.parametrize("kind", ["gaussian", "low_rank"])
@pytest.mark.parametrize("head", ["classifier", "prompt"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_backbone_reads_perturbed_weights_and_writes_none(
    tiny: Callable[[str], str], family: str, head: Any, kind: str
) -> None:
    """The logits equal those of a copy with the perturbation written into every weight."""
    backbone = load_backbone(tiny(family), TASKS["sst2"], head).double().eval()
    batch, noise = encode(backbone), NOISES[kind]()
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    keys = [(p, key_of(name)) for name, p in backbone.named_parameters()]
    with torch.no_grad():
        plain, expected = backbone(batch), with_perturbed_weights(backbone, keys, noise, 1e-2)(batch)
        with Perturbed(keys, noise, 1e-2):
            logits = backbone(batch)
        assert not torch.allclose(plain, expected, atol=1e-4)
        # of a product, z is not rounded to fp32: x comes between its factors
        rounding = 1e-12 if kind == "gaussian" else 2e-6
        torch.testing.assert_close(logits, expected, atol=rounding, rtol=rounding)
        assert torch.equal(backbone(batch), plain)
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())


@pytest.mark.parametrize("kind", ["rademacher", "table"])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", ["bert", "t5", "gpt2"])
def test_a_method_reads_perturbed_weights(tiny: Callable[[str], str], family: str, name: str, kind: str) -> None:
    """Only its trained weights are perturbed."""
    torch.manual_seed(0)  # the same weights in any order of tests
    method: Any = METHODS[name](backbone=tiny(family), head="prompt").double().eval()
    for parameter in method.parameters():
        if parameter.requires_grad and not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    batch, noise = encode(method.backbone), NOISES[kind]()
    keys = [(p, key_of(name)) for name, p in method.named_parameters() if p.requires_grad]
    with torch.no_grad():
        expected = with_perturbed_weights(method, keys, noise, 1e-2).loss(batch)
        with Perturbed(keys, noise, 1e-2):
            loss = method.loss(batch)
        torch.testing.assert_close(loss, expected, atol=1e-12, rtol=1e-9)
        assert abs(float(method.loss(batch) - expected)) > 1e-7


def test_weights_are_unperturbed_after_an_error() -> None:
    linear = nn.Linear(4, 4)
    before = [p.clone() for p in linear.parameters()]
    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match="shapes"),
        Perturbed([(linear.weight, 1)], GaussianNoise(), 1.0),
    ):
        linear(linear(torch.ones(4))[:3])
    assert all(map(torch.equal, before, linear.parameters()))
    assert torch.equal(linear(torch.ones(4)), F.linear(torch.ones(4), *before))
