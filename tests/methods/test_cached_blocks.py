"""Training above cached blocks is training above the same blocks, for every method whose lowest blocks are frozen."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_spu.methods.frozen import CachedBackbone
from lit_spu.methods.head import HeadOnly
from lit_spu.methods.ia3 import IA3
from lit_spu.methods.kladder import KLadder
from lit_spu.methods.ladder import LadderSideTuning
from lit_spu.methods.last_layers import LastLayers
from lit_spu.methods.lora import LoRA
from lit_spu.methods.mezo_ia3 import MeZOIA3
from lit_spu.methods.mezo_lora import MeZOLoRA
from lit_spu.study.steps import training_step
from tests.conftest import FAMILIES, encode

Tiny = Callable[[str], str]
Make = Callable[..., Any]

METHODS: dict[str, Make] = {
    "head": HeadOnly,
    "last 1": lambda **given: LastLayers(layers=1, **given),
    "last 2": lambda **given: LastLayers(layers=2, **given),
    "lora 1": lambda **given: LoRA(layers=1, **given),
    "lora 2, norms": lambda **given: LoRA(layers=2, norms=True, dropout=0.3, **given),
    "ia3 1": lambda **given: IA3(layers=1, **given),
    "lst": lambda **given: LadderSideTuning(reduction=2, **given),
    "k-ladder": lambda **given: KLadder(reduction=2, fusion="attention", **given),
    "mezo lora 2": lambda **given: MeZOLoRA(layers=2, **given),
    "mezo ia3 1": lambda **given: MeZOIA3(layers=1, **given),
}
FAST = [("bert", "head"), ("bert", "last 2"), ("t5", "last 1"), ("gpt2", "lora 2, norms"), ("bert", "mezo lora 2")]


def cases(methods: Any) -> list[Any]:
    """Return every family with every method, most of them as slow tests."""
    return [
        pytest.param(*case, marks=[] if case in FAST else [pytest.mark.slow], id="-".join(case))
        for case in product(FAMILIES, methods)
    ]


def make(method: str, folder: str, cached: bool, where: Path | None = None, **settings: Any) -> Any:
    torch.manual_seed(0)
    made = METHODS[method](backbone=folder, **settings)
    made.cache = made.make_cache(where) if cached else None
    return made


def train(method: Any, num_steps: int = 3) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Return the losses of some steps on one batch, and the trained weights after them."""
    batch = encode(method.backbone)
    step, _ = training_step(method, batch)
    losses = []
    for number in range(num_steps):
        torch.manual_seed(number)  # as each step of a run
        losses.append(method.loss(batch).detach())
        torch.manual_seed(number)
        step()
    return losses, {name: p.detach().clone() for name, p in method.named_parameters() if p.requires_grad}


def assert_same(plain: Any, cached: Any, exact: bool = True, **tolerances: float) -> None:
    losses, weights = zip(plain, cached, strict=True)
    tolerances = {"atol": 0.0, "rtol": 0.0} if exact else tolerances or {"atol": 1e-5, "rtol": 1e-4}
    torch.testing.assert_close(losses[1], losses[0], **tolerances)
    torch.testing.assert_close(weights[1], weights[0], **tolerances)


@pytest.mark.parametrize(("family", "method"), cases(METHODS))
def test_losses_and_weights_are_equal_to_the_bit(tiny: Tiny, tmp_path: Path, family: str, method: str) -> None:
    """Except for the head alone: without a cache, an encoder's last block runs at the answer's position alone."""
    plain = train(make(method, tiny(family), cached=False))
    exact = method != "head"
    assert_same(plain, train(make(method, tiny(family), cached=True)), exact)
    assert_same(plain, train(make(method, tiny(family), cached=True, where=tmp_path)), exact)
