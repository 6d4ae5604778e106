"""Attention of narrow heads on a CPU, for side networks: as many heads as the backbone's, each a few numbers wide.

torch's fused kernel is made for wide heads, and has no gradient for a learned bias of the scores (T5's relative
positions): then torch keeps each block's map [batch, heads, queries, keys] for the backward pass, most of what a side
network would store. Here the maps of a few examples at a time, small enough for the processor's cache, are made, and
made again in the backward pass. A product with a narrow matrix is written as that of the transposed ones: a
multiplication of few rows takes a fifth of the time of one of few columns.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

NAME = "narrow_heads"
NARROW = 16
"""Heads wider than this are left to torch."""
CHUNK = 2**16
"""Elements of the maps that are made at a time: a quarter of a MiB in fp32."""


def install(model: Any) -> None:
    """Let a Hugging Face model attend this way where it pays, if it can do without its own."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if model.config._attn_implementation == "sdpa":
        AttentionInterface.register(NAME, _attention)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.set_attn_implementation(NAME)


def _attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """What transformers calls: the context [batch, queries, heads, width] of [batch, heads, queries or keys, width]."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    narrow = query.shape[-1] <= NARROW and query.shape[1] == key.shape[1]  # queries may share keys
    if query.device.type != "cpu" or not narrow or query.shape[2] == 1:
        context: Tensor = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)[0]
        return context, None
    if attention_mask is None and (kwargs.get("is_causal") or module.is_causal):
        attention_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()[None, None]
    scaling = kwargs.get("scaling")
    query = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    bias, dropout = kwargs.get("position_bias"), kwargs.get("dropout", 0.0)
    return attend(query, key, value, bias, attention_mask, dropout).transpose(1, 2), None


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax(query keyᵀ + bias) value, [batch, heads, queries, width].

    Args:
        query: [batch, heads, queries, width], scaled.
        key: [batch, heads, keys, width].
        value: [batch, heads, keys, width].
        bias: [1, heads, queries, keys], the same for all examples.
        mask: Whether a query sees a key, [batch or 1, 1, queries or 1, keys]; None if all do.
        dropout: Share of the attention weights to drop.
    """
    if bias is not None:
        bias = bias.to(query.dtype)
    attended: Tensor = _Attend.apply(query, key, value, bias, mask, dropout)  # type: ignore[no-untyped-call]
    return attended


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, mask: Tensor | None, dropout: float
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, bias, mask)
        ctx.dropout, ctx.seed = dropout, int(torch.randint(2**62, ())) if dropout else 0
        out = torch.empty_like(query)
        with torch.autocast("cpu", enabled=False):
            for part, weights, kept in _chunks(query, key, bias, mask, dropout, ctx.seed):
                used = weights if kept is None else weights * kept
                out[part] = (value[part].mT @ used.mT).mT
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, bias, mask = ctx.saved_tensors
        of_query, of_key, of_value = map(torch.empty_like, (query, key, value))
        of_bias = None if bias is None else torch.zeros_like(bias)
        for part, weights, kept in _chunks(query, key, bias, mask, ctx.dropout, ctx.seed):
            used = weights if kept is None else weights * kept
            of_value[part] = (grad[part].mT @ used).mT
            of_weights = grad[part] @ value[part].mT
            if kept is not None:
                of_weights *= kept
            of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
            of_query[part] = (key[part].mT @ of_scores.mT).mT
            of_key[part] = (query[part].mT @ of_scores).mT
            if of_bias is not None:
                of_bias += of_scores.sum(0, keepdim=True)
        return of_query, of_key, of_value, of_bias, None, None


def _chunks(
    query: Tensor, key: Tensor, bias: Tensor | None, mask: Tensor | None, dropout: float, seed: int
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Some examples at a time: which, their attention weights, and what dropout multiplies these with."""
    size = max(1, CHUNK // (query.shape[1:3].numel() * key.shape[2]))
    noise = torch.Generator().manual_seed(seed)
    for start in range(0, len(query), size):
        part = slice(start, start + size)
        scores = query[part] @ key[part].mT
        if bias is not None:
            scores += bias
        if mask is not None:
            scores.masked_fill_(~(mask if len(mask) == 1 else mask[part]), torch.finfo(scores.dtype).min)
        kept = torch.empty_like(scores).bernoulli_(1 - dropout, generator=noise) if dropout else None
        yield part, scores.softmax(-1), None if kept is None else kept.div_(1 - dropout)
