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
from lit_spu.backbones.base import tensor_of
from lit_spu.backbones.cross_attention import apart, bare, few, swapped, together, untouched


def install(model: Any) -> None:
    """Let the blocks of a Hugging Face T5 run this way where they can; their modules and weights stay what they are."""
    for stack in (model.encoder, model.decoder):
        for block in stack.block:
            block.forward = partial(_block, block)


def _block(
    block: Any,
    hidden: Tensor,
    attention_mask: Tensor | None = None,
    position_bias: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    encoder_decoder_position_bias: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """What transformers' T5Block answers to `hidden` [batch, tokens, width]."""
    cpu = hidden.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    # a norm computes in single precision, whatever its state is in
    if not cpu or hidden.dtype is not torch.float32 or kwargs.get("past_key_values") is not None:
        states = hidden, attention_mask, position_bias, encoder_hidden_states
        plain: tuple[Tensor, Tensor, Tensor | None] = type(block).forward(
            block, *states, encoder_attention_mask, encoder_decoder_position_bias, **kwargs
        )
        return plain
    attend, *cross, widen = block.layer
    hidden, position_bias = _attend(attend, hidden, attention_mask, position_bias)
    if encoder_hidden_states is not None:
        for layer in cross:
            hidden = _cross(layer, hidden, encoder_hidden_states, encoder_attention_mask)
    return _widen(widen, hidden), position_bias, None


def _attend(layer: Any, hidden: Tensor, mask: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The state behind a T5LayerSelfAttention, and the bias of its scores."""
    module, tokens = layer.SelfAttention, hidden.shape[1]
    linears = module.q, module.k, module.v, module.o
    alone = tokens == 1
    if not (_simple(layer, linears) and untouched(module) and (alone or attention.narrow(module))):
        state, bias, _ = layer(hidden, attention_mask=mask, position_bias=bias)
        return state, bias
    query, key, value, output = (linear.weight for linear in linears)
    dropout = module.dropout if module.training else 0.0
    if alone:
        unasked = [query, key]
        if module.has_relative_attention_bias:
            unasked.append(module.relative_attention_bias.weight)
        return _residual(layer, hidden, [value], _Alone(module.n_heads, dropout), output, *unasked), None
    if bias is None:
        bias = module.compute_bias(tokens, tokens).contiguous()
    mask = attention.seen(mask, module.is_causal, tokens, tokens)
    inner = _SelfAttention(len(hidden), mask, dropout, attention.keeps(module, tokens))
    return _residual(layer, hidden, [query, key, value], inner, output, bias), bias


def _cross(layer: Any, hidden: Tensor, states: Tensor, mask: Tensor | None) -> Tensor:
    """The state behind a T5LayerCrossAttention to `states` [batch, tokens, width]."""
    module = layer.EncDecAttention
    linears = module.q, module.k, module.v, module.o
    if not (_simple(layer, linears) and few(module, hidden.shape[1], states.shape[1], mask)):
        return tensor_of(layer(hidden, states, attention_mask=mask))
    inner = _CrossAttention(module.n_heads, mask, module.dropout if module.training else 0.0)
    query, key, value, output = (linear.weight for linear in linears)
    return _residual(layer, hidden, [query], inner, output, states, key, value)


def _widen(layer: Any, hidden: Tensor) -> Tensor:
    """The state behind a T5LayerFF."""
    module = layer.DenseReluDense
    linears = getattr(module, "wi", None), module.wo  # a gated one has two that widen
    if not (isinstance(module.act, nn.ReLU) and untouched(module) and _simple(layer, linears)):
        plain: Tensor = layer(hidden)
        return plain
    inner = _FeedForward(module.dropout.p if module.training else 0.0)
    return _residual(layer, hidden, [module.wi.weight], inner, module.wo.weight)


def _simple(layer: Any, linears: Sequence[Any]) -> bool:
    """Whether a layer is its own weights alone."""
    norm = layer.layer_norm
    return (
        hasattr(norm, "variance_epsilon")  # transformers' name; another library may stand in its place
        and untouched(layer)
        and untouched(norm)
        and all(map(bare, linears))
    )


class _Inner(Protocol):
    """What a layer does between the linears that read its state and the one that writes to it."""

    def forward(self, entered: Tensor, others: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """What is written, [batch · tokens, …], from what the linears read, as long; and what to keep."""

    def backward(
        self, grad: Tensor, others: Sequence[Tensor], kept: Sequence[Any]
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """The gradients of `entered` and of each of the others; that of what is written may be written over."""


def _residual(
    layer: Any, hidden: Tensor, entries: Sequence[Tensor], inner: _Inner, exit: Tensor, *others: Tensor
) -> Tensor:
    norm, dropout = layer.layer_norm, layer.dropout.p if layer.training else 0.0
    out: Tensor = _Residual.apply(  # type: ignore[no-untyped-call]
        inner, hidden, norm.weight, norm.variance_epsilon, dropout, len(entries), *entries, exit, *others
    )
    return out


class _Residual(torch.autograd.Function):
    """x + dropout(O inner(E (w ⊙ x/√(mean(x²) + ε)))) of x [batch, tokens, width], where E are the rows of `entries`.

    The norm's weight goes into those: E diag(w) is smaller than the states. Numbers are factors of an operator where
    that can be: as an operand, each is a tensor to make and to convert.
    """

    @staticmethod
    def forward(
        ctx: Any, inner: _Inner, x: Tensor, norm: Tensor, epsilon: float, dropout: float, entries: int, *weights: Tensor
    ) -> Tensor:
        state, entry, (exit, *others) = x.flatten(0, 1), _rows(weights[:entries]), weights[entries:]
        size = torch.linalg.vector_norm(state, dim=-1, keepdim=True)
        inverse = torch.addcmul(size.new_full((), epsilon), size, size, value=1 / norm.numel()).rsqrt_()
        normed = state * inverse
        written, left = inner.forward(normed @ (entry * norm).T, others)
        dropped = attention.dropping(state, dropout)
        if dropped is None:
            out = torch.addmm(state, written, exit.T)
        else:
            out = torch.addcmul(state, written @ exit.T, dropped)
        ctx.inner, ctx.entries, ctx.weights = inner, entries, len(weights)
        ctx.save_for_backward(normed, inverse, norm, dropped, written, *weights, *left)
        return out.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        grad = gradients[0].flatten(0, 1)
        normed, inverse, norm, dropped, written, *rest = ctx.saved_tensors
        weights, left = rest[: ctx.weights], rest[ctx.weights :]
        entries, (exit, *others) = weights[: ctx.entries], weights[ctx.entries :]
        of_out = grad if dropped is None else grad * dropped
        of_entered, of_others = ctx.inner.backward(of_out @ exit, others, left)
        of_exit = of_out.T @ written
        entry = _rows(entries)
        of_normed = of_entered @ (entry * norm)
        along = (of_normed * normed).sum(-1, keepdim=True)
        of_x = torch.addcmul(grad, of_normed.addcmul_(normed, along, value=-1 / norm.numel()), inverse)
        of_scaled = of_entered.T @ normed  # the gradient of E diag(w)
        of_norm = (of_scaled * entry).sum(0)
        of_entries = of_scaled.mul_(norm).split_with_sizes([one.shape[0] for one in entries])
        return None, of_x.view_as(gradients[0]), of_norm, None, None, None, *of_entries, of_exit, *of_others


def _rows(weights: Sequence[Tensor]) -> Tensor:
    return weights[0] if len(weights) == 1 else torch.cat(list(weights))


@dataclass(frozen=True)
class _FeedForward:
    dropout: float

    def forward(self, entered: Tensor, others: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor]]:
        hidden = entered.relu_()
        if self.dropout:
            F.dropout(hidden, self.dropout, inplace=True)
        return hidden, (hidden,)

    def backward(self, grad: Tensor, others: Sequence[Tensor], kept: Sequence[Tensor]) -> tuple[Tensor, tuple[()]]:
        # what was dropped is 0, too
        torch.ops.aten.threshold_backward.grad_input(grad, *kept, 0, grad_input=grad)
        if self.dropout:
            grad /= 1 - self.dropout
        return grad, ()


@dataclass(frozen=True)
class _SelfAttention:
    batch: int
    mask: Tensor | None
    dropout: float
    keep: bool

    def forward(self, entered: Tensor, others: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        (bias,) = others
        heads = bias.shape[1]
        states = entered.view(self.batch, -1, 3, heads, entered.shape[1] // (3 * heads))
        query, key, value = each = states.permute(2, 0, 3, 1, 4).contiguous()
        context, left = attention.attended(query, key, value, bias, self.mask, self.dropout, self.keep)
        return context.transpose(1, 2).reshape(len(entered), -1), (each, *left)

    def backward(
        self, grad: Tensor, others: Sequence[Tensor], kept: Sequence[Any]
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        (bias,), ((query, key, value), *left) = others, kept
        of_context = grad.view(self.batch, -1, *query.shape[1::2]).transpose(1, 2).contiguous()
        *of_each, of_bias = attention.gradients(of_context, query, key, value, bias, self.mask, self.dropout, left)
        of_states = grad.new_empty(self.batch, query.shape[2], 3, *query.shape[1::2])
        for part, of_one in zip(of_states.unbind(2), of_each, strict=True):
            part.copy_(of_one.transpose(1, 2))
        return of_states.view(len(grad), -1), (of_bias,)


@dataclass(frozen=True)
class _Alone:
    """Self-attention of one token, whose own value is all that there is to see; the others are what is not asked."""

    heads: int
    dropout: float

    def forward(self, entered: Tensor, others: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        by_head = entered.view(len(entered), self.heads, -1)
        dropped = attention.dropping(by_head[..., :1], self.dropout)
        if dropped is not None:
            by_head *= dropped
        return entered, (dropped,)

    def backward(
        self, grad: Tensor, others: Sequence[Tensor], kept: Sequence[Any]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        (dropped,) = kept
        if dropped is not None:
            grad.view(len(grad), self.heads, -1).mul_(dropped)
        # zeros and not None, which DDP takes for a mistake
        return grad, tuple(map(torch.zeros_like, others))


@dataclass(frozen=True)
class _CrossAttention:
    """Attention of a few queries to a text, whose keys and values are never made (see cross_attention.py)."""

    heads: int
    mask: Tensor | None
    dropout: float

    def forward(self, entered: Tensor, others: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        states, key, value = others
        key, value = (weight.view(self.heads, -1, states.shape[2]) for weight in (key, value))
        # [heads, batch · queries, …] where weights are, [batch, heads · queries, …] where texts are
        queries = apart(entered, self.heads)
        asked = swapped(torch.bmm(queries, key), len(states))
        maps = torch.bmm(asked, states.mT)
        attention.softmax_(maps.view(len(states), self.heads, -1, states.shape[1]), self.mask)
        dropped = attention.dropping(maps, self.dropout)
        seen = swapped(torch.bmm(maps if dropped is None else maps * dropped, states), self.heads)
        return together(torch.bmm(seen, value.mT)), (queries, asked, maps, dropped, seen)

    def backward(
        self, grad: Tensor, others: Sequence[Tensor], kept: Sequence[Any]
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        states, key, value = others
        queries, asked, maps, dropped, seen = kept
        key, value = (weight.view(self.heads, -1, states.shape[2]) for weight in (key, value))
        of_context = apart(grad, self.heads)
        of_seen = swapped(torch.bmm(of_context, value), len(states))
        of_maps = torch.bmm(of_seen, states.mT)
        used = maps
        if dropped is not None:
            of_maps, used = of_maps.mul_(dropped), maps * dropped
        of_scores = attention.softmax_backward_(of_maps, maps)
        of_states = torch.bmm(used.mT, of_seen).baddbmm_(of_scores.mT, asked)
        of_asked = swapped(torch.bmm(of_scores, states), self.heads)
        of_key, of_value = (
            torch.bmm(left.mT, right).flatten(0, 1) for left, right in ((queries, of_asked), (of_context, seen))
        )
        return together(torch.bmm(of_asked, key.mT)), (of_states, of_key, of_value)
