"""The layers of a narrow T5, each one node of the graph.

Where states are a few dozen numbers wide, half of a step's time goes to calling operators and to fetching what they
left in memory, rather than to what they compute. Here a layer makes its own backward pass: queries, keys and values are
one product, what nothing else reads is written over, and a token that is alone attends to itself without asking.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_spu.backbones import attention
from lit_spu.backbones.cross_attention import bare, few, swapped, untouched


def install(model: Any) -> None:
    """Let the blocks of a Hugging Face T5 run this way where they can; their modules and weights stay what they are."""
    for stack in (model.encoder, model.decoder):
        for block in stack.block:
            block.layer[0].forward = partial(_attend, block.layer[0])
            block.layer[-1].forward = partial(_widen, block.layer[-1])
            if len(block.layer) == 3:
                block.layer[1].forward = partial(_cross, block.layer[1])


def _attend(layer: Any, hidden: Tensor, **kwargs: Any) -> tuple[Tensor, Tensor | None, None]:
    """What transformers' T5LayerSelfAttention answers to `hidden` [batch, tokens, width]."""
    module, tokens = layer.SelfAttention, hidden.shape[1]
    linears = module.q, module.k, module.v, module.o
    alone = tokens == 1
    if not (_simple(layer, hidden, linears) and (alone or attention.narrow(module))):
        answer: tuple[Tensor, Tensor, None] = type(layer).forward(layer, hidden, **kwargs)
        return answer
    query, key, value, output = (linear.weight for linear in linears)
    dropout = module.dropout if module.training else 0.0
    if alone:
        unasked = [query, key]
        if module.has_relative_attention_bias:
            unasked.append(module.relative_attention_bias.weight)
        return _residual(layer, hidden, _Alone(module.n_heads, dropout), value, output, *unasked), None, None
    bias = kwargs.get("position_bias")
    if bias is None:
        bias = module.compute_bias(tokens, tokens).contiguous()
    mask = attention.seen(kwargs.get("attention_mask"), module.is_causal, tokens, tokens)
    inner = _SelfAttention(len(hidden), mask, dropout, attention.keeps(module, tokens))
    return _residual(layer, hidden, inner, query, key, value, output, bias), bias, None


def _cross(layer: Any, hidden: Tensor, key_value_states: Tensor, **kwargs: Any) -> tuple[Tensor, None, None]:
    """What transformers' T5LayerCrossAttention answers to `hidden` [batch, queries, width]."""
    module, mask = layer.EncDecAttention, kwargs.get("attention_mask")
    linears = module.q, module.k, module.v, module.o
    if not (_simple(layer, hidden, linears) and few(module, hidden.shape[1], key_value_states.shape[1], mask)):
        answer: tuple[Tensor, None, None] = type(layer).forward(layer, hidden, key_value_states, **kwargs)
        return answer
    inner = _CrossAttention(module.n_heads, mask, module.dropout if module.training else 0.0)
    return _residual(layer, hidden, inner, key_value_states, *(linear.weight for linear in linears)), None, None


def _widen(layer: Any, hidden: Tensor) -> Tensor:
    """What transformers' T5LayerFF answers to `hidden` [batch, tokens, width]."""
    module = layer.DenseReluDense
    linears = getattr(module, "wi", None), module.wo  # a gated one has two that widen
    if not (isinstance(module.act, nn.ReLU) and _simple(layer, hidden, linears)):
        plain: Tensor = type(layer).forward(layer, hidden)
        return plain
    inner = _FeedForward(module.dropout.p if module.training else 0.0)
    return _residual(layer, hidden, inner, module.wi.weight, module.wo.weight)


def _simple(layer: Any, hidden: Tensor, linears: Sequence[Any]) -> bool:
    """Whether a layer is its own weights alone, in single precision, in which its norm computes."""
    norm = layer.layer_norm
    return (
        hidden.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and hidden.dtype == norm.weight.dtype == torch.float32
        and hasattr(norm, "variance_epsilon")  # transformers' name; another library may stand in its place
        and untouched(norm)
        and all(map(bare, linears))
    )


class _Inner(Protocol):
    """What a layer does between its norm and the sum with its input."""

    def forward(self, read: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """What comes of normed states [batch · tokens, width], as large, and what `backward` wants of it."""

    def backward(
        self, grad: Tensor, read: Tensor, weights: Sequence[Tensor], left: Sequence[Any]
    ) -> tuple[Tensor | None, ...]:
        """The gradients of `read`, a new tensor, and of each of the weights."""


def _residual(layer: Any, hidden: Tensor, inner: _Inner, *weights: Tensor) -> Tensor:
    norm, dropout = layer.layer_norm, layer.dropout.p if layer.training else 0.0
    out: Tensor = _Residual.apply(inner, hidden, norm.weight, norm.variance_epsilon, dropout, *weights)  # type: ignore[no-untyped-call]
    return out


class _Residual(torch.autograd.Function):
    """x + dropout(inner(w·x/√(mean(x²) + ε))) of x [batch, tokens, width]."""

    @staticmethod
    def forward(
        ctx: Any, inner: _Inner, x: Tensor, norm: Tensor, epsilon: float, dropout: float, *weights: Tensor
    ) -> Tensor:
        state = x.flatten(0, 1)
        inverse = state.pow(2).mean(-1, keepdim=True).add_(epsilon).rsqrt_()
        normed = state * inverse
        out, left = inner.forward(normed * norm, weights)
        kept = attention.dropping(out, dropout)
        if kept is not None:
            out *= kept
        ctx.inner, ctx.weights = inner, len(weights)
        ctx.save_for_backward(normed, inverse, norm, kept, *weights, *left)
        return out.add_(state).view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        grad = gradients[0].flatten(0, 1)
        normed, inverse, norm, kept, *rest = ctx.saved_tensors
        weights, left = rest[: ctx.weights], rest[ctx.weights :]
        of_out = grad if kept is None else grad * kept
        of_read, *of_weights = ctx.inner.backward(of_out, normed * norm, weights, left)
        along = of_read * normed
        shared = (along @ norm).unsqueeze(1).div_(-norm.numel())
        of_x = of_read.mul_(norm).addcmul_(normed, shared).mul_(inverse).add_(grad)
        return None, of_x.view_as(gradients[0]), along.sum(0), None, None, *of_weights


@dataclass(frozen=True)
class _FeedForward:
    dropout: float

    def forward(self, read: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor]]:
        up, down = weights
        hidden = F.dropout((read @ up.T).relu_(), self.dropout, inplace=True)
        return hidden @ down.T, (hidden,)

    def backward(
        self, grad: Tensor, read: Tensor, weights: Sequence[Tensor], left: Sequence[Tensor]
    ) -> tuple[Tensor, ...]:
        (up, down), (hidden,) = weights, left
        of_hidden = grad @ down
        # what was dropped is 0, too
        torch.ops.aten.threshold_backward.grad_input(of_hidden, hidden, 0, grad_input=of_hidden)
        if self.dropout:
            of_hidden /= 1 - self.dropout
        return of_hidden @ up, of_hidden.T @ read, grad.T @ hidden


@dataclass(frozen=True)
class _SelfAttention:
    batch: int
    mask: Tensor | None
    dropout: float
    keep: bool

    def forward(self, read: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        *asked, output, bias = weights
        states = (read @ torch.cat(asked).T).view(self.batch, -1, 3, bias.shape[1], output.shape[1] // bias.shape[1])
        query, key, value = each = states.permute(2, 0, 3, 1, 4).contiguous()
        context, left = attention.attended(query, key, value, bias, self.mask, self.dropout, self.keep)
        context = context.transpose(1, 2).reshape(len(read), -1)
        return context @ output.T, (each, context, *left)

    def backward(
        self, grad: Tensor, read: Tensor, weights: Sequence[Tensor], left: Sequence[Any]
    ) -> tuple[Tensor | None, ...]:
        *asked, output, bias = weights
        (query, key, value), context, *left = left
        of_context = (grad @ output).view(self.batch, -1, *query.shape[1::2]).transpose(1, 2).contiguous()
        *of_each, of_bias = attention.gradients(of_context, query, key, value, bias, self.mask, self.dropout, left)
        of_states = read.new_empty(self.batch, query.shape[2], 3, *query.shape[1::2])
        for part, of_one in zip(of_states.unbind(2), of_each, strict=True):
            part.copy_(of_one.transpose(1, 2))
        of_states = of_states.view(len(read), -1)
        of_asked = (of_states.T @ read).chunk(3)
        return of_states @ torch.cat(asked), *of_asked, grad.T @ context, of_bias


@dataclass(frozen=True)
class _Alone:
    """Self-attention of one token, whose own value is all that there is to see."""

    heads: int
    dropout: float

    def forward(self, read: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        value, output, *_ = weights
        context = read @ value.T
        kept = attention.dropping(context.view(len(read), self.heads, -1)[..., :1], self.dropout)
        if kept is not None:
            context.view(len(read), self.heads, -1).mul_(kept)
        return context @ output.T, (context, kept)

    def backward(
        self, grad: Tensor, read: Tensor, weights: Sequence[Tensor], left: Sequence[Any]
    ) -> tuple[Tensor, ...]:
        (value, output, *unasked), (context, kept) = weights, left
        of_context = grad @ output
        if kept is not None:
            of_context.view(len(read), self.heads, -1).mul_(kept)
        of_unasked = map(torch.zeros_like, unasked)  # and not None, which DDP takes for a mistake
        return of_context @ value, of_context.T @ read, grad.T @ context, *of_unasked


@dataclass(frozen=True)
class _CrossAttention:
    """Attention of a few queries to a text, whose keys and values are never made (see cross_attention.py)."""

    heads: int
    mask: Tensor | None
    dropout: float

    def forward(self, read: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        states, query, key, value, output = weights
        key, value = self._by_head(key), self._by_head(value)
        # [heads, batch · queries, …] where weights are, [batch, heads · queries, …] where texts are
        queries = self._apart(read @ query.T)
        asked = swapped(queries @ key, len(states))
        maps = asked @ states.mT
        attention.softmax_(maps.view(len(states), self.heads, -1, states.shape[1]), self.mask)
        kept = attention.dropping(maps, self.dropout)
        seen = swapped((maps if kept is None else maps * kept) @ states, self.heads)
        context = self._together(seen @ value.mT)
        return context @ output.T, (queries, asked, maps, kept, seen, context)

    def backward(
        self, grad: Tensor, read: Tensor, weights: Sequence[Tensor], left: Sequence[Any]
    ) -> tuple[Tensor, ...]:
        states, query, key, value, output = weights
        queries, asked, maps, kept, seen, context = left
        key, value = self._by_head(key), self._by_head(value)
        of_context = self._apart(grad @ output)
        of_seen = swapped(of_context @ value, len(states))
        of_maps = of_seen @ states.mT
        used = maps
        if kept is not None:
            of_maps, used = of_maps.mul_(kept), maps * kept
        of_scores = attention.softmax_backward_(of_maps, maps)
        of_states = (used.mT @ of_seen).baddbmm_(of_scores.mT, asked)
        of_asked = swapped(of_scores @ states, self.heads)
        of_queries = self._together(of_asked @ key.mT)
        return (
            of_queries @ query,
            of_states,
            of_queries.T @ read,
            (queries.mT @ of_asked).flatten(0, 1),
            (of_context.mT @ seen).flatten(0, 1),
            grad.T @ context,
        )

    def _by_head(self, weight: Tensor) -> Tensor:
        return weight.view(self.heads, -1, weight.shape[-1])

    def _apart(self, x: Tensor) -> Tensor:
        return x.view(len(x), self.heads, -1).transpose(0, 1)

    def _together(self, x: Tensor) -> Tensor:
        return x.transpose(0, 1).reshape(x.shape[1], -1)
