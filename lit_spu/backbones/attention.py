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

NAME = "narrow_heads"
NARROW = 16
"""Heads wider than this are left to torch."""
SHORT = 32
"""Texts of no more tokens than this, too, where no bias is learned: their maps are small."""
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

    if key.shape[1] > query.shape[1]:  # `Trunk.run_at`: all tokens' keys, taken for the heads of one
        key, value = (given.reshape(len(given), -1, *query.shape[1::2]).transpose(1, 2) for given in (key, value))
    narrow = query.shape[-1] <= NARROW and query.shape[1] == key.shape[1]  # queries may share keys
    bias = kwargs.get("position_bias")
    short = query.shape[2] == 1 or (bias is None and key.shape[2] <= SHORT)
    if query.device.type != "cpu" or not narrow or short:
        context: Tensor = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)[0]
        return context, None
    if attention_mask is None and (kwargs.get("is_causal") or module.is_causal):
        attention_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool).tril()[None, None]
    scaling = kwargs.get("scaling")
    query = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    dropout = kwargs.get("dropout", 0.0)
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
    attended: Tensor = _attend(query, key, value, bias, mask, dropout)[0]
    return attended


# An operator of its own, so that torch can tell shapes and memory without running it (FakeTensorMode, torch.compile).
@torch.library.custom_op("lit_spu::attend", mutates_args=())
def _attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, mask: Tensor | None, dropout: float
) -> tuple[Tensor, Tensor]:
    """The context, and the seed of what was dropped."""
    seed = torch.randint(2**62, ()) if dropout else torch.zeros((), dtype=torch.long)
    out = torch.empty_like(query)
    with torch.autocast("cpu", enabled=False):
        for part, weights, kept in _chunks(query, key, bias, mask, dropout, seed):
            used = weights if kept is None else weights * kept
            out[part] = (value[part].mT @ used.mT).mT
    return out, seed


@torch.library.custom_op("lit_spu::attend_backward", mutates_args=())
def _attend_backward(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    dropout: float,
    seed: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of query, key, value and bias, the last empty where there is no bias."""
    of_query, of_key, of_value = map(torch.empty_like, (query, key, value))
    of_bias = query.new_empty(0) if bias is None else torch.zeros_like(bias)
    for part, weights, kept in _chunks(query, key, bias, mask, dropout, seed):
        used = weights if kept is None else weights * kept
        of_value[part] = (grad[part].mT @ used).mT
        of_weights = grad[part] @ value[part].mT
        if kept is not None:
            of_weights *= kept
        of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
        of_query[part] = (key[part].mT @ of_scores.mT).mT
        of_key[part] = (query[part].mT @ of_scores).mT
        if bias is not None:
            of_bias += of_scores.sum(0, keepdim=True)
    return of_query, of_key, of_value, of_bias


@_attend.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, mask: Tensor | None, dropout: float) -> Any:
    return torch.empty_like(query), query.new_empty((), dtype=torch.long)


@_attend_backward.register_fake
def _(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, *_: Any) -> Any:
    gradients = map(torch.empty_like, (query, key, value))
    return *gradients, query.new_empty(0) if bias is None else torch.empty_like(bias)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.dropout = inputs
    ctx.save_for_backward(*tensors, output[1])


def _gradients(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, seed = ctx.saved_tensors
    *gradients, of_bias = _attend_backward(grad, *tensors, ctx.dropout, seed)
    return *gradients, None if tensors[3] is None else of_bias, None, None


_attend.register_autograd(_gradients, setup_context=_keep)


def _chunks(
    query: Tensor, key: Tensor, bias: Tensor | None, mask: Tensor | None, dropout: float, seed: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Some examples at a time: which, their attention weights, and what dropout multiplies these with."""
    size = max(1, CHUNK // (query.shape[1:3].numel() * key.shape[2]))
    noise = torch.Generator().manual_seed(int(seed))
    for start in range(0, len(query), size):
        part = slice(start, start + size)
        scores = query[part] @ key[part].mT
        if bias is not None:
            scores += bias
        if mask is not None:
            scores.masked_fill_(~(mask if len(mask) == 1 else mask[part]), torch.finfo(scores.dtype).min)
        kept = torch.empty_like(scores).bernoulli_(1 - dropout, generator=noise) if dropout else None
        yield part, scores.softmax(-1), None if kept is None else kept.div_(1 - dropout)
