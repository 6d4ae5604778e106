"""Attention of narrow heads on a CPU, for side networks: as many heads as the backbone's, each a few numbers wide.

torch's fused kernel is made for wide heads, and has no gradient for a learned bias of the scores (T5's relative
positions): then torch keeps each block's map [batch, heads, queries, keys] for the backward pass, most of what a side
network would store. Here the maps of a few examples at a time, small enough for the processor's cache, are made, and
made again in the backward pass; or, where memory is not what is short, those of short texts are kept. A product with a
narrow matrix is written as that of the transposed ones: a multiplication of few rows takes a fifth of the time of one
of few columns.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

NAME = "narrow_heads"
KEEPING = f"{NAME}_kept"
NARROW = 16
"""Heads wider than this are left to torch."""
SHORT = 32
"""Texts of no more tokens than this have small maps: those of all examples are made at once, and may be kept."""
CHUNK = 2**16
"""Elements of longer texts' maps that are made at a time: a quarter of a MiB in fp32."""


def install(model: Any, keep: bool = False) -> None:
    """Let a Hugging Face model attend this way where it pays, if it can do without its own.

    Args:
        model: The base model.
        keep: Keep the maps of short texts for the backward pass.
    """
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    if model.config._attn_implementation == "sdpa" or installed(model):
        name = KEEPING if keep else NAME
        AttentionInterface.register(name, _attention)
        AttentionMaskInterface.register(name, sdpa_mask)
        model.set_attn_implementation(name)


def installed(model: Any) -> bool:
    """Whether a Hugging Face model attends this way."""
    return str(model.config._attn_implementation).startswith(NAME)


def narrow(module: Any) -> bool:
    """Whether the heads of a T5's attention are narrow, and attend this way."""
    return installed(module) and module.key_value_proj_dim <= NARROW


def keeps(module: Any, tokens: int) -> bool:
    """Whether an attention keeps the maps of texts of so many tokens."""
    return tokens <= SHORT and bool(module.config._attn_implementation == KEEPING)


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """What transformers calls: the context [batch, queries, heads, width] of [batch, heads, queries or keys, width]."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if key.shape[1] > query.shape[1]:  # `TransformerStacks.run_at`: all tokens' keys, taken for the heads of one
        key, value = (given.reshape(len(given), -1, *query.shape[1::2]).transpose(1, 2) for given in (key, value))
    fits = query.shape[-1] <= NARROW and query.shape[1] == key.shape[1]  # queries may share keys
    if query.device.type != "cpu" or not fits or (query.shape[2] == 1 and key.shape[2] > SHORT):
        context: Tensor = sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)[0]
        return context, None
    causal = kwargs.get("is_causal") or module.is_causal
    attention_mask = seen(attention_mask, causal, query.shape[2], key.shape[2])
    scaling = kwargs.get("scaling")
    query = query * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    function = attend_keeping if keeps(module, key.shape[2]) else attend
    bias, dropout = kwargs.get("position_bias"), kwargs.get("dropout", 0.0)
    return function(query, key, value, bias, attention_mask, dropout).transpose(1, 2), None


def seen(mask: Tensor | None, causal: bool, queries: int, keys: int) -> Tensor | None:
    """Whether a query sees a key, [batch or 1, 1, queries, keys], from transformers' mask; None if all do."""
    if mask is None and causal:
        return torch.ones(queries, keys, dtype=torch.bool).tril()[None, None]
    return mask


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


def attend_keeping(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """The same to the bit for short texts, of maps that are kept for the backward pass."""
    if bias is not None:
        bias = bias.to(query.dtype)
    attended: Tensor = _Keeping.apply(query, key, value, bias, mask, dropout)  # type: ignore[no-untyped-call]
    return attended


class _Keeping(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, mask: Tensor | None, dropout: float
    ) -> Tensor:
        states = query.contiguous(), key.contiguous(), value.contiguous()
        with torch.autocast("cpu", enabled=False):
            context, left = attended(*states, bias, mask, dropout, keep=True)
        ctx.mask, ctx.dropout = mask, dropout
        ctx.save_for_backward(*states, bias, *left)
        return context

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, bias, *left = ctx.saved_tensors
        given = gradients(grads[0].contiguous(), query, key, value, bias, ctx.mask, ctx.dropout, left)
        return *given, None, None


def attended(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    dropout: float,
    keep: bool,
) -> tuple[Tensor, tuple[Tensor | None, ...]]:
    """What `attend` or `attend_keeping` gives, and what `gradients` wants of it; all tensors are contiguous."""
    if not keep:
        context, seed = _attend(query, key, value, bias, mask, dropout)
        return context, (seed,)
    weights = _weights(query, key, bias, mask)
    kept = dropping(weights, dropout, _generator(_seed(dropout)) if dropout else None)
    return _read(weights, kept, value), (weights, kept)


def gradients(
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    dropout: float,
    left: Sequence[Any],
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of query, key, value and bias, from that of the context and from what `attended` left."""
    if len(left) == 1:
        *of_each, of_bias = _attend_backward(grad, query, key, value, bias, mask, dropout, *left)
        return *of_each, None if bias is None else of_bias
    *of_each, of_scores = _backward(grad, query, key, value, *left)
    return *of_each, None if bias is None else of_scores.sum(0, keepdim=True)


# An operator of its own, so that torch can tell shapes and memory without running it (FakeTensorMode, torch.compile).
@torch.library.custom_op("lit_spu::attend", mutates_args=())
def _attend(
    query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None, mask: Tensor | None, dropout: float
) -> tuple[Tensor, Tensor]:
    """The context, and the seed of what was dropped."""
    seed = _seed(dropout)
    out = torch.empty_like(query)
    with torch.autocast("cpu", enabled=False):
        for part, weights, kept in _chunks(query, key, bias, mask, dropout, seed):
            out[part] = _read(weights, kept, value[part].contiguous())
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
        g, q, k, v = (tensor[part].contiguous() for tensor in (grad, query, key, value))
        of_query[part], of_key[part], of_value[part], of_scores = _backward(g, q, k, v, weights, kept)
        if bias is not None:
            of_bias += of_scores if len(of_scores) == 1 else of_scores.sum(0, keepdim=True)
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
    query, key, value, bias, mask, seed = ctx.saved_tensors
    return *gradients(grad, query, key, value, bias, mask, ctx.dropout, (seed,)), None, None


_attend.register_autograd(_gradients, setup_context=_keep)


def _chunks(
    query: Tensor, key: Tensor, bias: Tensor | None, mask: Tensor | None, dropout: float, seed: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Some examples at a time: which, their attention weights, and what dropout multiplies these with."""
    size = len(query) if key.shape[2] <= SHORT else max(1, CHUNK // (query.shape[1:3].numel() * key.shape[2]))
    noise = _generator(seed)
    for start in range(0, len(query), size):
        part = slice(start, start + size)
        masked = mask if mask is None or len(mask) == 1 else mask[part]
        weights = _weights(query[part].contiguous(), key[part].contiguous(), bias, masked)
        yield part, weights, dropping(weights, dropout, noise)


def _seed(dropout: float) -> Tensor:
    return torch.randint(2**62, ()) if dropout else torch.zeros((), dtype=torch.long)


def _generator(seed: Tensor) -> torch.Generator:
    return torch.Generator().manual_seed(int(seed))


def dropping(x: Tensor, dropout: float, noise: torch.Generator | None = None) -> Tensor | None:
    """What dropout multiplies something with; None if there is none."""
    return torch.empty_like(x).bernoulli_(1 - dropout, generator=noise).div_(1 - dropout) if dropout else None


def _weights(query: Tensor, key: Tensor, bias: Tensor | None, mask: Tensor | None) -> Tensor:
    """The maps [examples, heads, queries, keys]."""
    scores = query @ key.mT
    if bias is not None:
        scores += bias
    return softmax_(scores, mask)


def softmax_(scores: Tensor, mask: Tensor | None) -> Tensor:
    """The maps, where the scores [examples, heads, queries, keys] were, under a mask as `attend` takes it."""
    if mask is not None:
        scores += torch.zeros_like(mask, dtype=scores.dtype).masked_fill_(~mask, torch.finfo(scores.dtype).min)
    return torch.softmax(scores, -1, out=scores)


def softmax_backward_(of_weights: Tensor, weights: Tensor) -> Tensor:
    """The gradient of scores, where that of their maps was."""
    return torch._softmax_backward_data(of_weights, weights, -1, weights.dtype, grad_input=of_weights)


def _read(weights: Tensor, kept: Tensor | None, value: Tensor) -> Tensor:
    """The context [examples, heads, queries, width]."""
    used = weights if kept is None else weights * kept
    return (value.mT @ used.mT).mT


def _backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, weights: Tensor, kept: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of query, key, value and of the scores behind the maps."""
    of_weights = grad @ value.mT
    if kept is not None:
        of_weights *= kept
        kept = weights * kept
    of_value = (grad.mT @ (weights if kept is None else kept)).mT
    of_scores = softmax_backward_(of_weights, weights)
    return (key.mT @ of_scores.mT).mT, (query.mT @ of_scores).mT, of_value, of_scores
