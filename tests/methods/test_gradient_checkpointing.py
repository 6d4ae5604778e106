"""`gradient_checkpointing` saves memory for every method that has it, and changes no gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lit_spu.methods.bitfit import BitFit
from lit_spu.methods.full import FullFineTuning
from lit_spu.methods.ia3 import IA3
from lit_spu.methods.lora import LoRA
from tests.conftest import encode
from tests.runs import gradient_step

Tiny = Callable[[str], str]
METHODS: dict[str, Callable[..., Any]] = {
    "lora": LoRA,
    "lora dropout": lambda **given: LoRA(dropout=0.5, **given),
    "lora norms": lambda **given: LoRA(norms=True, **given),
    "ia3": IA3,
    "bitfit": BitFit,
    "full": FullFineTuning,
}
FAMILIES = ("bert", "deberta-v2", "t5", "gpt2", "opt", "llama")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_it_saves_memory_and_gives_the_same_gradients(tiny: Tiny, method: str, family: str) -> None:
    if method == "bitfit" and family in ("t5", "llama"):
        pytest.skip("without biases")
    steps = []
    for recompute in (False, True):
        torch.manual_seed(0)
        made = METHODS[method](backbone=tiny(family), gradient_checkpointing=recompute).train()
        with torch.no_grad():
            for parameter in made.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        steps.append(gradient_step(made))
    losses, saved, gradients = zip(*steps, strict=True)
    assert torch.equal(*losses)
    for a, b in zip(*gradients, strict=True):
        assert (a is None) == (b is None)
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)
    assert saved[1] < 0.6 * saved[0]


def test_evaluation_recomputes_nothing(tiny: Tiny) -> None:
    """Without gradients a block runs once, and the logits are the same."""
    plain, recomputed = (LoRA(backbone=tiny("bert"), gradient_checkpointing=on).eval() for on in (False, True))
    recomputed.load_state_dict(plain.state_dict())
    batch = encode(plain.backbone)
    with torch.no_grad():
        assert torch.equal(plain(batch), recomputed(batch))
