"""Attention of a few tokens to a text, against transformers' own: results, gradients, masks, dropout, and its work."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lit_spu.backbones import load_backbone
from lit_spu.backbones.absorbed_cross_attention import absorbed_cross_attention, install
from lit_spu.tasks import TASKS
from tests.conftest import encode, use_plain_cross_attention

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


class Products(TorchDispatchMode):
    """Counts the floating-point operations of products. torch's FlopCounterMode sets global module hooks."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        if formula := flop_registry.get(func._overloadpacket):
            self.count += int(formula(*args, **(kwargs or {}), out_val=output))
        return output


def work(call: Callable[[], Any]) -> int:
    """Return the number of floating-point operations."""
    with Products() as products:
        call()
    return int(products.count)


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
        forward = partial(absorbed_cross_attention, module, module.forward) if few else module.forward
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
    for forward in (module.forward, partial(absorbed_cross_attention, module, module.forward)):
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
    ours = answer(partial(absorbed_cross_attention, module, module.forward), None, **states)
    assert torch.equal(ours, answer(module, None, **states))
    # a constant in every key is one in every score
    assert torch.allclose(ours, before) == (which == "k" and change is biased)


def test_many_tokens_attend_as_they_do() -> None:
    module, states = attention(), given(12)
    ours = partial(absorbed_cross_attention, module, module.forward)
    assert work(lambda: answer(ours, None, **states)) == work(lambda: answer(module, None, **states))
    assert torch.equal(answer(ours, None, **states), answer(module, None, **states))


def test_the_key_value_cache_of_generation_is_left_to_transformers() -> None:
    from transformers import DynamicCache, EncoderDecoderCache

    module, states = attention(), given(1)
    install(module)
    cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
    module(states["hidden_states"], key_value_states=states["key_value_states"], past_key_values=cache)
    assert cache.cross_attention_cache.get_seq_length(0) == 12


@pytest.mark.parametrize("hook", ["forward", "forward_pre", "full_backward", "full_backward_pre", "global"])
def test_any_hook_on_the_keys_runs(hook: str) -> None:
    module, states = attention(), given(1)
    install(module)
    calls = []

    def count(*_: Any) -> None:
        calls.append(1)

    if hook == "global":
        handle = torch.nn.modules.module.register_module_forward_hook(count)
    else:
        handle = getattr(module.k, f"register_{hook}_hook")(count)
    try:
        answer(module, None, **states).sum().backward()
    finally:
        handle.remove()
    assert calls
    calls.clear()
    answer(module, None, **states).sum().backward()
    assert not calls


@pytest.mark.parametrize("recompute", [False, True])
def test_a_t5_does_less_work_also_with_gradient_checkpointing(tiny: Callable[[str], str], recompute: bool) -> None:
    backbone = load_backbone(tiny("t5"), TASKS["sst2"], "prompt").double()
    batch = encode(backbone)
    inputs = backbone.model_inputs(batch)
    plain = {name: parameter.clone() for name, parameter in backbone.state_dict().items()}
    cheap = work(lambda: backbone.base_model.forward(inputs))
    use_plain_cross_attention(backbone)
    assert cheap < work(lambda: backbone.base_model.forward(inputs))
    expected = torch.autograd.grad(backbone.loss(backbone(batch), batch), list(backbone.model.parameters()))
    other = load_backbone(tiny("t5"), TASKS["sst2"], "prompt").double()
    other.load_state_dict(plain)
    if recompute:
        other.base_model.enable_gradient_checkpointing()
    other.train()
    grads = torch.autograd.grad(other.loss(other(batch), batch), list(other.model.parameters()))
    for grad, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, wanted, atol=1e-12, rtol=0)
