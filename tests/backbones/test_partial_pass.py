"""A pass that starts above known states, or stops below blocks that nobody reads, computes what a whole pass does."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from lit_spu.backbones import Backbone, FrozenStates, load_backbone
from lit_spu.tasks import load_task
from tests.conftest import FAMILIES, encode

Tiny = Callable[[str], str]


def load(folder: str) -> Backbone:
    return load_backbone(folder, load_task("sst2")).eval()


def count_runs(backbone: Backbone) -> list[int]:
    """Return a list of the blocks that run from now on. A skipped block's own modules do not run."""
    ran: list[int] = []
    for number, block in enumerate(backbone.blocks):
        first = next(part for part in block.modules() if isinstance(part, torch.nn.LayerNorm | torch.nn.Linear))
        first.register_forward_hook(lambda *_, number=number: ran.append(number))
    return ran


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_any_number_of_blocks_can_be_known(tiny: Tiny, family: str) -> None:
    backbone = load(tiny(family))
    batch = encode(backbone)
    states, logits = backbone.hidden_states(batch), backbone(batch)
    for num_blocks in range(1, len(backbone.blocks) + 1):
        wanted = backbone.base_model.states_above(num_blocks)
        part = backbone.hidden_states(batch, wanted)
        for numbers, some, every in zip(wanted, part, states, strict=True):
            assert [i + 1 for i, state in enumerate(some.blocks) if state is not None] == list(numbers)
            assert all(torch.equal(some.blocks[i - 1], every.blocks[i - 1]) for i in numbers)
        torch.testing.assert_close(backbone(batch, FrozenStates(num_blocks, part)), logits)
        again = backbone.hidden_states(batch, None, FrozenStates(num_blocks, states))
        for found, every in zip(again, states, strict=True):
            assert all(map(torch.equal, found.blocks, every.blocks))


@torch.no_grad()
@pytest.mark.parametrize("family", ["bert", "llama"])
def test_no_other_block_runs(tiny: Tiny, family: str) -> None:
    backbone = load(tiny(family))
    batch = encode(backbone)
    backbone.hidden_states(batch, [[2]])  # the first block runs once, to learn the form of its output
    ran = count_runs(backbone)
    part = backbone.hidden_states(batch, [[2]])
    assert set(ran) == {0, 1}
    ran.clear()
    backbone(batch, FrozenStates(2, part))
    assert set(ran) == {2, 3}


def test_the_gradient_enters_the_blocks_above_alone(tiny: Tiny) -> None:
    backbone = load(tiny("bert"))
    batch = encode(backbone)
    with torch.no_grad():
        part = backbone.hidden_states(batch, [[2]])
    backbone(batch, FrozenStates(2, part)).sum().backward()
    got = [any(p.grad is not None for p in block.parameters()) for block in backbone.blocks]
    assert got == [False, False, True, True]
