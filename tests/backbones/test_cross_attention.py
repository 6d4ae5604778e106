"""Attention of a few tokens to a text, against transformers' own: results, gradients, masks, dropout, and its work."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lit_spu.backbones import load_backbone
from lit_spu.backbones.cross_attention import by_few
from lit_spu.backbones.seq2seq import Seq2SeqStacks
from lit_spu.tasks import TASKS
from tests.conftest import encode

TEXT = (5, 12, 32)
"""5 texts of 12 tokens, 32 wide."""


def attention(implementation: str = "sdpa", dropout: float = 0.0) -> Any:
    """T5's, of 4 heads of 16 numbers."""
    from transformers import T5Config
    from transformers.models.t5.modeling_t5 import T5Attention

    torch.manual_seed(0)
    config = T5Config(d_model=32, d_kv=16, num_heads=4, dropout_rate=dropout)
    config._attn_implementation = implementation
    return T5Attention(config, layer_idx=0).double()


def given(queries: int) -> dict[str, Tensor]:
    """The states of both streams, which require gradients."""
    torch.manual_seed(1)
    shapes = {"hidden_states": (5, queries, 32), "key_value_states": TEXT}
    return {name: torch.randn(s, dtype=torch.float64, requires_grad=True) for name, s in shapes.items()}


def answer(module: Callable[..., Any], mask: Tensor | None, hidden_states: Tensor, key_value_states: Tensor) -> Tensor:
    out: Tensor = module(hidden_states, mask=mask, key_value_states=key_value_states, position_bias=None)[0]
    return out


def work(call: Callable[[], Any]) -> int:
    """Floating-point operations."""
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


MASKS = {
    "none": None,
    "padding": (torch.arange(12) < torch.tensor([12, 3, 1, 5, 11])[:, None])[:, None, None],
    "of each query": torch.ones(3, 12, dtype=torch.bool).tril(4)[None, None].expand(5, -1, -1, -1),
}


@pytest.mark.parametrize(("mask", "queries"), [("none", 1), ("none", 2), ("padding", 1), ("of each query", 3)])
def test_it_is_transformers_own_with_less_work(mask: str, queries: int) -> None:
    module, states = attention(), given(queries)
    learned = [*states.values(), *module.parameters()]
    found, counted = [], []
    for few in (False, True):
        forward = partial(by_few, module, module.forward) if few else module.forward
        call = partial(answer, forward, MASKS[mask], **states)
        counted.append(work(call))
        out = call()
        torch.manual_seed(2)
        found.append([out, *torch.autograd.grad(out, learned, torch.randn_like(out))])
    for plain, ours in zip(*found, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-12, rtol=0)
    assert counted[1] < 0.6 * counted[0]


def test_dropout_leaves_out_the_same_maps_as_transformers_own() -> None:
    module, states = attention("eager", dropout=0.5).train(), given(1)
    found = []
    for forward in (module.forward, partial(by_few, module, module.forward)):
        torch.manual_seed(3)
        found.append(answer(forward, None, **states))
    torch.testing.assert_close(*found, atol=1e-12, rtol=0)
    assert not torch.allclose(found[0], answer(module.eval(), None, **states))


def doubled(linear: nn.Linear) -> None:
    linear.register_forward_hook(lambda _m, _args, out: 2 * out)


def biased(linear: nn.Linear) -> None:
    linear.bias = nn.Parameter(torch.ones(64, dtype=torch.float64))


def replaced(linear: nn.Linear) -> None:
    linear.forward = lambda x: x.repeat(1, 1, 2)  # type: ignore[method-assign, assignment]


@pytest.mark.parametrize("which", ["k", "v"])
@pytest.mark.parametrize("change", [doubled, biased, replaced])
def test_what_stands_at_keys_or_values_runs(which: str, change: Callable[[nn.Linear], None]) -> None:
    module, states = attention(), given(1)
    before = answer(module, None, **states)
    change(getattr(module, which))
    ours = answer(partial(by_few, module, module.forward), None, **states)
    assert torch.equal(ours, answer(module, None, **states))
    # a constant in every key is one in every score
    assert torch.allclose(ours, before) == (which == "k" and change is biased)


def test_many_tokens_attend_as_they_do() -> None:
    module, states = attention(), given(12)
    ours = partial(by_few, module, module.forward)
    assert work(lambda: answer(ours, None, **states)) == work(lambda: answer(module, None, **states))
    assert torch.equal(answer(ours, None, **states), answer(module, None, **states))


@pytest.mark.parametrize("recompute", [False, True])
def test_a_t5_answers_so_unless_its_blocks_run_again(tiny: Callable[[str], str], recompute: bool) -> None:
    backbone = load_backbone(tiny("t5"), TASKS["sst2"], "prompt").double()
    batch = encode(backbone)
    inputs, position = backbone.inputs(batch), backbone.position(batch)
    trunk = backbone.base_model
    assert isinstance(trunk, Seq2SeqStacks)
    plain = work(lambda: trunk.run(inputs))
    if recompute:
        trunk.recompute()
    backbone.train()
    for run in (lambda: trunk.run_at(inputs, position), lambda: trunk.taps(inputs)):
        assert (work(run) < plain) == (not recompute)
    backbone(batch).sum().backward()  # what is recomputed is what was computed
    assert not any("forward" in vars(module) for module in trunk.model.modules())
