"""Attention of a few tokens to a long text, whose keys and values are never made.

A score is qᵀ(W_k x) = (W_kᵀq)ᵀx, and what is read is Σ p (W_v x) = W_v Σ p x: where the queries are few, it is cheaper
to take them, and what they read, through the weights than all of the text (as multi-head latent attention does at
inference, https://arxiv.org/abs/2405.04434). A T5 that answers with one token saves an eighth of its forward pass.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensor


def by_few(
    module: Any, plain: Callable[..., Any], hidden: Tensor, *, key_value_states: Tensor, **kwargs: Any
) -> tuple[Tensor, Tensor | None, None]:
    """What transformers' T5Attention answers to `hidden` [batch, queries, width], and `plain` where that is cheaper.

    So it is where something else stands at the linears of keys and values, which must run for it.
    """
    mask: Tensor | None = kwargs.get("mask")
    queries, tokens = hidden.shape[1], key_value_states.shape[1]
    if not (few(module, queries, tokens, mask) and bare(module.k) and bare(module.v)):
        answer: tuple[Tensor, Tensor, None] = plain(hidden, key_value_states=key_value_states, **kwargs)
        return answer
    batch, heads, states = len(hidden), module.n_heads, key_value_states
    key, value = (linear.weight.unflatten(0, (heads, -1)) for linear in (module.k, module.v))

    query = apart(module.q(hidden).flatten(0, 1), heads) * module.scaling
    scores = swapped(query @ key, batch) @ states.mT  # [batch, heads · queries, tokens]
    if mask is not None:  # [batch, 1, 1 or queries, tokens]
        hides = ~mask.expand(-1, heads, queries, -1).flatten(1, 2)
        scores = scores.masked_fill(hides, torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1, torch.promote_types(scores.dtype, torch.float32)).to(states.dtype)
    weights = F.dropout(weights, module.dropout, module.training)
    read = swapped(weights @ states, heads) @ value.mT
    context = together(read).view(batch, queries, -1)
    return module.o(context), kwargs.get("position_bias"), None


def answers_by_few(module: nn.Module) -> bool:
    """Whether `by_few` stands in a module's place."""
    return getattr(vars(module).get("forward"), "func", None) is by_few


def few(module: Any, queries: int, tokens: int, mask: Tensor | None) -> bool:
    """Whether so many queries are few beside a text's tokens."""
    seen = mask is None or mask.dtype is torch.bool
    return seen and 2 * queries * (1 / tokens + 1 / module.key_value_proj_dim) < 1


def apart(x: Tensor, heads: int) -> Tensor:
    """[batch · queries, heads · width] as [heads, batch · queries, width]."""
    return x.view(len(x), heads, -1).transpose(0, 1)


def together(x: Tensor) -> Tensor:
    """[heads, batch · queries, width] as [batch · queries, heads · width]."""
    return x.transpose(0, 1).reshape(x.shape[1], -1)


def swapped(x: Tensor, outer: int) -> Tensor:
    """[heads, batch · queries, width] as [batch, heads · queries, width] for an `outer` of batch, or back for heads."""
    return x.reshape(len(x), outer, -1, x.shape[-1]).transpose(0, 1).reshape(outer, -1, x.shape[-1])


def bare(linear: nn.Module) -> bool:
    """Whether a module is a linear that is its weight alone."""
    return type(linear) is nn.Linear and untouched(linear) and whole(linear)


def whole(linear: nn.Module) -> bool:
    """Whether a linear has no bias, and its weight is one tensor: others hold it in pieces, as int8."""
    parameters = vars(linear)["_parameters"]  # as attributes they take four times as long
    return parameters["bias"] is None and type(parameters["weight"]) in (nn.Parameter, FakeTensor)


def untouched(module: nn.Module) -> bool:
    """Whether a module does what its class does, if by `by_few`, and nothing else runs there."""
    return unhooked(module) and ("forward" not in vars(module) or answers_by_few(module))


def unhooked(module: nn.Module) -> bool:
    """Whether nothing else runs where a module does."""
    own = vars(module)
    return not (own["_forward_hooks"] or own["_forward_pre_hooks"])
