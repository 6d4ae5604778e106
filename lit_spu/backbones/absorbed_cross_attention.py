"""Cross-attention of a few queries to a long text that computes no keys and values of the text.

An attention score is qᵀ(W_k x) = (W_kᵀq)ᵀx, and the result is Σ p (W_v x) = W_v Σ p x. So the weights W_k and W_v can
multiply the queries and the result instead of the text. This is cheaper for few queries (multi-head latent attention
does it at inference, https://arxiv.org/abs/2405.04434). A T5 that answers with one token saves an eighth of its forward
pass.

A family opts in by its `cross_attention`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_spu.backbones.hooks import has_default_forward, has_no_hooks, override_forward
from lit_spu.backbones.precision import is_quantized


def install(attention: nn.Module) -> None:
    """Let a T5Attention use the absorbed form where it is cheaper and returns the same result."""
    override_forward(attention, partial(absorbed_cross_attention, attention))


# `module` is bound by `install`; `override_forward` passes `forward` and the call's arguments.
def absorbed_cross_attention(
    module: Any,
    forward: Callable[..., Any],
    hidden: Tensor,
    mask: Tensor | None = None,
    key_value_states: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """Return the output of transformers' T5Attention for `hidden` [batch, queries, width].

    Args:
        module: The T5Attention.
        forward: Its own forward. It runs if the absorbed form is not cheaper, or if the linear layers of keys and
            values must run because something is attached to them.
        hidden: The states that attend.
        mask: [batch, 1, 1 or queries, tokens], additive, or boolean, which the absorbed form needs.
        key_value_states: The text's states [batch, tokens, width].
        kwargs: Other arguments of T5Attention.
    """
    states = key_value_states
    if states is None or kwargs.get("past_key_values") is not None or not _can_absorb(module, hidden, states, mask):
        return forward(hidden, mask=mask, key_value_states=states, **kwargs)
    (batch, num_queries, _), num_heads = hidden.shape, module.n_heads
    key, value = (linear.weight.unflatten(0, (num_heads, -1)) for linear in (module.k, module.v))

    query = split_heads(module.q(hidden).flatten(0, 1), num_heads)
    query = swap_batch_heads(query @ key, batch).unsqueeze(1)  # one head as wide as the states
    if mask is not None and num_queries > 1:
        mask = mask.expand(-1, num_heads, num_queries, -1).flatten(1, 2).unsqueeze(1)
    dropout = module.dropout if module.training else 0.0
    states = states.unsqueeze(1)
    summed = F.scaled_dot_product_attention(query, states, states, mask, dropout, scale=module.scaling).squeeze(1)
    heads = swap_batch_heads(summed, num_heads) @ value.mT
    context = merge_heads(heads).view(batch, num_queries, -1)
    return module.o(context), kwargs.get("position_bias"), None


def _can_absorb(module: Any, hidden: Tensor, states: Tensor, mask: Tensor | None) -> bool:
    is_cheaper = 2 * hidden.shape[1] * (1 / states.shape[1] + 1 / module.key_value_proj_dim) < 1
    is_known_mask = mask is None or mask.dtype is torch.bool
    return is_cheaper and is_known_mask and has_plain_weight(module.k) and has_plain_weight(module.v)


def has_plain_weight(linear: nn.Module) -> bool:
    """Return whether a module is a linear layer that only multiplies by one weight tensor."""
    return (
        type(linear) is nn.Linear
        and linear.bias is None
        and has_default_forward(linear)
        and has_no_hooks(linear)
        and not is_quantized(linear.weight)
    )


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """Return [batch * queries, heads * width] as [heads, batch * queries, width]."""
    return x.view(len(x), num_heads, -1).transpose(0, 1)


def merge_heads(x: Tensor) -> Tensor:
    """Return [heads, batch * queries, width] as [batch * queries, heads * width]."""
    return x.transpose(0, 1).reshape(x.shape[1], -1)


def swap_batch_heads(x: Tensor, outer: int) -> Tensor:
    """Return [heads, batch * queries, width] as [batch, heads * queries, width] for `outer` = batch, and vice versa."""
    return x.reshape(len(x), outer, -1, x.shape[-1]).transpose(0, 1).reshape(outer, -1, x.shape[-1])
