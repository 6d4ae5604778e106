"""The blocks of a narrow T5, each one node of the graph, and what runs them.

Where states are a few dozen numbers wide, half of a step's time goes to calling operators and to fetching what they
left in memory, rather than to what they compute. Here a block makes its own backward pass: queries, keys and values are
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
from torch._subclasses import FakeTensor
from torch.autograd.function import once_differentiable

from lit_spu.backbones import attention
from lit_spu.backbones.cross_attention import apart, few, swapped, together, unhooked, untouched, whole
from lit_spu.backbones.rms_norm import rms_norm


def install(model: Any) -> None:
    """Let the blocks of a Hugging Face T5 run this way where they can; their modules and weights stay what they are."""
    for stack in (model.encoder, model.decoder):
        for block in stack.block:
            if _plain(block):
                block.forward = _Block(block)
        stack.final_layer_norm.forward = partial(_norm, stack.final_layer_norm)
        stack.forward = partial(_stack, stack)


def _plain(block: Any) -> bool:
    """Whether all parts of a block do what classes known here do: not where a feed-forward is gated, or has a GELU."""
    from transformers.models.t5 import modeling_t5 as t5

    known = {t5.T5LayerSelfAttention, t5.T5LayerCrossAttention, t5.T5Attention, t5.T5LayerNorm, nn.Embedding}
    known |= {t5.T5LayerFF, t5.T5DenseActDense, nn.ReLU, nn.Linear, nn.Dropout, nn.ModuleList}
    return all(type(part) in known and untouched(part) for part in block.modules() if part is not block)


def _stack(
    stack: Any,
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    encoder_attention_mask: Tensor | None = None,
    inputs_embeds: Tensor | None = None,
    use_cache: bool | None = None,
    **kwargs: Any,
) -> Any:
    """A stack's forward pass: transformers' own takes as long around its blocks as for one of them."""
    from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

    states = encoder_hidden_states
    more = any(value is not None for value in kwargs.values())
    more |= stack.is_decoder and (attention_mask is not None or use_cache is not False)
    here = inputs_embeds is not None and _computed_here(inputs_embeds) and attention.installed(stack)
    if more or not here:
        kwargs |= {"inputs_embeds": inputs_embeds, "use_cache": use_cache}
        return type(stack).forward(stack, input_ids, attention_mask, states, encoder_attention_mask, **kwargs)
    sees, sees_states = map(_sees, (attention_mask, encoder_attention_mask))
    hidden, bias, other_bias = stack.dropout(inputs_embeds), None, None
    for block in stack.block:
        hidden, bias, other_bias = block(hidden, sees, bias, states, sees_states, other_bias)
    last = stack.dropout(stack.final_layer_norm(hidden))
    return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=last)


def _computed_here(state: Tensor) -> bool:
    """Whether a state is: in single precision, in which a norm computes whatever its state is in."""
    cpu = state.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
    return cpu and state.dtype is torch.float32


def _sees(mask: Tensor | None) -> Tensor | None:
    """The keys that a query sees, [batch, 1, 1, keys], from the mask [batch, keys]; None if it sees all."""
    if mask is None or (not isinstance(mask, FakeTensor) and bool(mask.all())):
        return None
    return mask[:, None, None].bool()


def _norm(norm: Any, hidden: Tensor) -> Tensor:
    """A norm's forward pass."""
    if not _computed_here(hidden):
        plain: Tensor = type(norm).forward(norm, hidden)
        return plain
    return rms_norm(hidden, norm.weight, norm.variance_epsilon)


class _Block:
    """A block's forward pass. Its parts are at hand: to ask modules for theirs takes as long as to run them."""

    def __init__(self, block: Any) -> None:
        self.block, self.layers = block, block.layer
        attend, *cross, widen = self.layers
        self.attend = _Parts(attend, attend.SelfAttention, *"qkvo")
        self.cross = [_Parts(layer, layer.EncDecAttention, *"qkvo") for layer in cross]
        self.widen = _Parts(widen, widen.DenseReluDense, "wi", "wo")
        self.parts = [part for part in block.modules() if part is not block]
        self.linears = [part for part in self.parts if isinstance(part, nn.Linear)]
        self.made_of = [(dict(own_parts), forward) for own_parts, forward in self._standing()]

    def __call__(
        self,
        hidden: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        encoder_decoder_position_bias: Tensor | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What transformers' T5Block answers to `hidden` [batch, tokens, width]."""
        states, mask = encoder_hidden_states, encoder_attention_mask
        tokens = hidden.shape[1]
        cross = [(parts, states, mask) for parts in self.cross if states is not None]
        fits = _computed_here(hidden) and (tokens == 1 or attention.narrow(self.attend.inner))
        fits = fits and all(few(parts.inner, tokens, text.shape[1], mask) for parts, text, _ in cross)
        if kwargs.get("past_key_values") is not None or not (fits and self._untouched()):
            others = attention_mask, position_bias, states, mask, encoder_decoder_position_bias
            forward = type(self.block).forward
            plain: tuple[Tensor, Tensor, Tensor | None] = forward(self.block, hidden, *others, **kwargs)
            return plain
        if position_bias is None and tokens > 1:
            position_bias = self.attend.inner.compute_bias(tokens, tokens).contiguous()
        layers = [_attend(self.attend, hidden, attention_mask, position_bias)]
        layers += [_cross(*each) for each in cross]
        layers.append(_widen(self.widen))
        weights = [weight for _, own in layers for weight in own]
        out: Tensor = _Layers.apply([layer for layer, _ in layers], hidden, *weights)  # type: ignore[no-untyped-call]
        return out, position_bias, None

    def _untouched(self) -> bool:
        """Whether the parts are still what they were when this was made, and nothing else runs there."""
        same = self.block.layer is self.layers and self._standing() == self.made_of
        return same and all(map(unhooked, self.parts)) and all(map(whole, self.linears))

    def _standing(self) -> list[tuple[dict[str, Any], Any]]:
        """Each part's own parts, and the forward pass that stands in place of its class's."""
        return [(own["_modules"], own.get("forward")) for own in map(vars, self.parts)]


class _Parts:
    """A layer's norm, its linears, of which the last writes to its state, and what these stand in."""

    def __init__(self, layer: Any, inner: Any, *linears: str) -> None:
        self.layer, self.norm, self.inner = layer, layer.layer_norm, inner
        self.linears = [getattr(inner, name) for name in linears]

    @property
    def weights(self) -> list[Tensor]:
        """Those of the linears."""
        return [vars(linear)["_parameters"]["weight"] for linear in self.linears]


def _attend(parts: _Parts, hidden: Tensor, mask: Tensor | None, bias: Tensor | None) -> tuple[_Layer, list[Tensor]]:
    module, tokens = parts.inner, hidden.shape[1]
    query, key, value, output = parts.weights
    dropout = module.dropout if module.training else 0.0
    if tokens == 1:
        unasked = [query, key]
        if module.has_relative_attention_bias:
            unasked.append(module.relative_attention_bias.weight)
        return _layer(parts, [value], _Alone(module.n_heads, dropout), output, *unasked)
    assert bias is not None
    mask = attention.seen(mask, module.is_causal, tokens, tokens)
    inner = _SelfAttention(len(hidden), mask, dropout, attention.keeps(module, tokens))
    return _layer(parts, [query, key, value], inner, output, bias)


def _cross(parts: _Parts, states: Tensor, mask: Tensor | None) -> tuple[_Layer, list[Tensor]]:
    module = parts.inner
    query, key, value, output = parts.weights
    inner = _CrossAttention(module.n_heads, mask, module.dropout if module.training else 0.0)
    return _layer(parts, [query], inner, output, states, key, value)


def _widen(parts: _Parts) -> tuple[_Layer, list[Tensor]]:
    module = parts.inner
    entry, output = parts.weights
    return _layer(parts, [entry], _FeedForward(module.dropout.p if module.training else 0.0), output)


class _Inner(Protocol):
    """What a layer does between the linears that read its state and the one that writes to it."""

    def forward(self, entered: Tensor, others: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """What is written, [batch · tokens, …], from what the linears read, as long; and what to keep."""

    def backward(
        self, grad: Tensor, others: Sequence[Tensor], kept: Sequence[Any]
    ) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """The gradients of `entered` and of each of the others; that of what is written may be written over."""


def _layer(
    parts: _Parts, entries: Sequence[Tensor], inner: _Inner, exit: Tensor, *others: Tensor
) -> tuple[_Layer, list[Tensor]]:
    """A layer as it is computed here, and its weights."""
    layer, norm = parts.layer, parts.norm
    weights = [norm.weight, *entries, exit, *others]
    dropout = layer.dropout.p if layer.training else 0.0
    return _Layer(inner, norm.variance_epsilon, dropout, len(entries), len(weights)), weights


@dataclass(frozen=True)
class _Layer:
    """x + dropout(O inner(E (w ⊙ x/√(mean(x²) + ε)))) of x [batch · tokens, width].

    Of its weights, w is the first, O stands behind those whose rows are E, and the others are `inner`'s. w goes into E:
    E diag(w) is smaller than the states. Numbers are factors of an operator where that can be: as an operand, each is
    a tensor to make and to convert.
    """

    inner: _Inner
    epsilon: float
    dropout: float
    entries: int
    weights: int

    def forward(self, x: Tensor, weights: Sequence[Tensor]) -> tuple[Tensor, tuple[Tensor | None, ...]]:
        """The new state, and what to keep."""
        norm, entry, exit, others = self._parts(weights)
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = torch.addcmul(size.new_full((), self.epsilon), size, size, value=1 / norm.numel()).rsqrt_()
        normed = x * inverse
        written, left = self.inner.forward(normed @ (entry * norm).T, others)
        dropped = attention.dropping(x, self.dropout)
        out = torch.addmm(x, written, exit.T) if dropped is None else torch.addcmul(x, written @ exit.T, dropped)
        return out, (normed, inverse, dropped, written, *left)

    def backward(
        self, grad: Tensor, weights: Sequence[Tensor], kept: Sequence[Any]
    ) -> tuple[Tensor, list[Tensor | None]]:
        """The gradients of x and of each of the weights."""
        norm, entry, exit, others = self._parts(weights)
        normed, inverse, dropped, written, *left = kept
        del kept
        of_out = grad if dropped is None else grad * dropped
        of_exit = of_out.T @ written
        del written
        of_entered, of_others = self.inner.backward(of_out @ exit, others, left)
        del left
        of_scaled = of_entered.T @ normed  # the gradient of E diag(w)
        of_normed = of_entered @ (entry * norm)
        del of_entered
        along = (of_normed * normed).sum(-1, keepdim=True)
        of_x = torch.addcmul(grad, of_normed.addcmul_(normed, along, value=-1 / norm.numel()), inverse)
        of_norm = (of_scaled * entry).sum(0)
        rows = [weight.shape[0] for weight in weights[1 : 1 + self.entries]]
        return of_x, [of_norm, *of_scaled.mul_(norm).split_with_sizes(rows), of_exit, *of_others]

    def _parts(self, weights: Sequence[Tensor]) -> tuple[Tensor, Tensor, Tensor, Sequence[Tensor]]:
        norm, *entries = weights[: 1 + self.entries]
        exit, *others = weights[1 + self.entries :]
        return norm, entries[0] if len(entries) == 1 else torch.cat(entries), exit, others


class _Layers(torch.autograd.Function):
    """Layers, one behind the other, of a state [batch, tokens, width] and all their weights."""

    @staticmethod
    def forward(ctx: Any, layers: Sequence[_Layer], hidden: Tensor, *weights: Tensor) -> Tensor:
        state, rest, counts = hidden.flatten(0, 1), weights, list[int]()
        kept: list[Tensor | None] = []
        for layer in layers:
            own, rest = rest[: layer.weights], rest[layer.weights :]
            state, left = layer.forward(state, own)
            kept += left
            counts.append(len(left))
        ctx.layers, ctx.counts = layers, counts
        ctx.save_for_backward(*weights, *kept)
        return state.view_as(hidden)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rest = list(ctx.saved_tensors)
        ctx.maybe_clear_saved_tensors()  # what a layer has kept can go as soon as that layer is done
        weights = rest[: -sum(ctx.counts)]
        grad, of_weights = gradients[0].flatten(0, 1), list[Tensor | None]()
        for layer, count in zip(reversed(ctx.layers), reversed(ctx.counts), strict=True):
            grad, of_own = layer.backward(grad, _last(weights, layer.weights), _last(rest, count))
            of_weights[:0] = of_own
        return None, grad.view_as(gradients[0]), *of_weights


def _last(values: list[Any], count: int) -> list[Any]:
    """The last so many, which are taken out."""
    taken = values[-count:]
    del values[-count:]
    return taken


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
        rows = len(entered)
        del entered, states  # three quarters of a map, of which nothing is read any more
        context, left = attention.attended(query, key, value, bias, self.mask, self.dropout, self.keep)
        return context.transpose(1, 2).reshape(rows, -1), (each, *left)

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
