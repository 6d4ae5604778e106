"""Training above cached blocks is training above the same blocks, for every method whose lowest blocks are frozen."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_spu.methods.head import HeadOnly
from lit_spu.methods.ia3 import IA3
from lit_spu.methods.kladder import KLadder
from lit_spu.methods.ladder import LadderSideTuning
from lit_spu.methods.last_layers import LastLayers
from lit_spu.methods.lora import LoRA
from lit_spu.methods.mezo_ia3 import MeZOIA3
from lit_spu.methods.mezo_lora import MeZOLoRA
from lit_spu.study.steps import training_step
from tests.backbones.test_partial_pass import count_runs
from tests.conftest import FAMILIES, encode
from tests.runs import gradient_step

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


def assert_same(plain: Any, cached: Any, tolerance: float = 0.0) -> None:
    losses, weights = zip(plain, cached, strict=True)
    torch.testing.assert_close(losses[1], losses[0], atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(weights[1], weights[0], atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(("family", "method"), cases(METHODS))
def test_losses_and_weights_are_equal_to_the_bit(tiny: Tiny, tmp_path: Path, family: str, method: str) -> None:
    """Except for the head alone: without a cache, an encoder's last block runs at the answer's position alone."""
    plain = train(make(method, tiny(family), cached=False))
    tolerance = 1e-5 if method == "head" else 0.0
    assert_same(plain, train(make(method, tiny(family), cached=True)), tolerance)
    assert_same(plain, train(make(method, tiny(family), cached=True, where=tmp_path)), tolerance)


@pytest.mark.parametrize("family", [pytest.param("bert", marks=pytest.mark.slow), "t5", "gpt2"])
@pytest.mark.parametrize("method", ["last 2", pytest.param("lora 2, norms", marks=pytest.mark.slow)])
def test_dropout_is_active_in_trained_blocks_alone(tiny: Tiny, family: str, method: str) -> None:
    """A T5's encoder and a GPT-2 drop a part of the embeddings outside of any block."""
    runs: list[Any] = []
    for cached in (False, True):
        made = make(method, tiny(family), cached)
        for part in made.modules():
            if isinstance(part, nn.Dropout):
                part.p = 0.3
        runs.append(train(made))
    assert_same(runs[0], runs[1])
    with torch.no_grad():
        assert made.loss(encode(made.backbone)) != made.loss(encode(made.backbone))


@pytest.mark.parametrize(
    ("family", "method", "expected"),
    [("bert", "head", []), ("bert", "last 1", [3]), ("llama", "lora 2, norms", [2, 3]), ("t5", "last 2", [4, 6, 7])],
)
def test_later_steps_run_the_trained_blocks_alone(tiny: Tiny, family: str, method: str, expected: list[int]) -> None:
    """In a T5's decoder the first block runs as well: it makes the position bias of all."""
    made = make(method, tiny(family), cached=True)
    train(made, 1)
    ran = count_runs(made.backbone)
    train(made, 2)
    assert sorted(set(ran)) == expected


@pytest.mark.parametrize(
    ("family", "method", "states"),
    [("bert", "head", (1,)), ("bert", "last 2", (1,)), ("t5", "last 1", (1, 1)), ("t5", "head", (0, 1))],
)
def test_one_state_a_token_is_cached(tiny: Tiny, family: str, method: str, states: tuple[int, ...]) -> None:
    cache = make(method, tiny(family), cached=True).cache
    batch = encode(cache.backbone)
    tokens = (int(batch["attention_mask"].sum()), len(batch["labels"]))  # a T5 decodes one token of each text
    plan = cache.plan([batch])
    assert plan.num_bytes == sum(4 * 32 * count * number for count, number in zip(tokens, states, strict=False))
    zeros = sum(4 * 32 * number for number in states)  # one state a table, for padding
    assert cache.tables.num_bytes == plan.num_bytes + zeros


@pytest.mark.parametrize(("precision", "error"), [("bf16", 0.02), ("int8", 0.05)])
@pytest.mark.parametrize("method", ["head", "last 1", pytest.param("lora 2, norms", marks=pytest.mark.slow)])
def test_a_smaller_cache_is_nearly_as_exact(tiny: Tiny, method: str, precision: str, error: float) -> None:
    plain = train(make(method, tiny("bert"), cached=False))
    small = train(make(method, tiny("bert"), cached=True, cache_precision=precision))
    assert_same(plain, small, error)


@pytest.mark.parametrize("family", ["bert", pytest.param("t5", marks=pytest.mark.slow)])
@pytest.mark.parametrize("method", ["last 2", pytest.param("lora 2, norms", marks=pytest.mark.slow)])
def test_trained_blocks_can_be_recomputed_above_a_cache(tiny: Tiny, family: str, method: str) -> None:
    made = [make(method, tiny(family), cached=True, gradient_checkpointing=on).train() for on in (False, True)]
    with torch.no_grad():
        for one in made:
            one.cache(encode(one.backbone))
    steps = []
    for one in made:
        torch.manual_seed(0)
        steps.append(gradient_step(one))
    losses, saved, gradients = zip(*steps, strict=True)
    assert torch.equal(*losses)
    assert saved[1] < saved[0]
    for a, b in zip(*gradients, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_a_block_with_a_frozen_adapter_is_not_cached(tiny: Callable[[str], str]) -> None:
    """The key of the cache is of the backbone's own weights, which do not show what an adapter adds."""
    method = LoRA(backbone=tiny("bert"))
    for adapter in method.adapters[: len(method.adapters) // 2]:
        adapter.requires_grad_(False)
    assert method.count_frozen_blocks() == 0
    assert LoRA(backbone=tiny("bert"), layers=1).count_frozen_blocks() == 3
