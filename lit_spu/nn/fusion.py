"""How a rung joins what it reads of the backbone with the state of the side network.

A fusion serves all rungs of one stream. `forward(mask)` begins a pass: what it gives makes the state that enters side
block i, from `i`, the state [batch, tokens, width] that comes and the 2k+1 down-projected taps of rung `i`, each as
large. Taps beyond the ends of the backbone are zero.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_spu.backbones.base import Stream

TEMPERATURE = 0.1

Fuse = Callable[[int, Tensor, Sequence[Tensor]], Tensor]
"""Gives the state that enters side block i from i, the state that comes and the rung's taps."""


class Fusion(nn.Module, ABC):
    """The base of the fusions: of a stream's blocks, those that are `kept` have a rung with `slots` taps of `width`."""

    def __init__(self, stream: Stream, kept: Sequence[int], slots: int, width: int) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, mask: Tensor | None) -> Fuse:
        """Begin a pass on texts of which the mask [batch, tokens] tells the real tokens; None if all are."""

    def gate(self, i: int) -> Tensor | None:
        """The share of the state at rung i, a scalar, where a gate of the rung's own tells it."""
        return None

    def shares(self, i: int) -> Tensor | None:
        """How much of the window each tap of rung i makes, [slots], where that is known."""
        return None


class Gate(Fusion):
    """LST's gate between the state and one tap: g·s + (1−g)·x with g = σ(α_i / T), α_i = 0 at the start (eq. 2).

    As published, α has an entry for every block of the backbone, also where the side network has none.
    """

    def __init__(self, stream: Stream, kept: Sequence[int], slots: int, width: int) -> None:
        super().__init__(stream, kept, slots, width)
        self.alpha = nn.Parameter(torch.zeros(stream.depth))

    def forward(self, mask: Tensor | None) -> Fuse:
        gates = torch.sigmoid(self.alpha / TEMPERATURE).unbind()
        return lambda i, state, taps: torch.lerp(taps[0], state, gates[i])

    def gate(self, i: int) -> Tensor | None:
        return torch.sigmoid(self.alpha[i] / TEMPERATURE)


class Gated(Gate):
    """LST's gate on the window's mean under learned weights, softmax over the slots; with one slot it is LST's own."""

    def __init__(self, stream: Stream, kept: Sequence[int], slots: int, width: int) -> None:
        super().__init__(stream, kept, slots, width)
        self.slots = nn.Parameter(torch.zeros(stream.depth, slots))

    def forward(self, mask: Tensor | None) -> Fuse:
        fuse, shares = super().forward(mask), self.slots.softmax(-1).unbind()
        return lambda i, state, taps: fuse(i, state, [weighted(shares[i], taps)])

    def shares(self, i: int) -> Tensor:
        return self.slots[i].softmax(-1)


class Additive(Fusion):
    """The state plus all taps of the window; their scale is left to the down-projections."""

    def forward(self, mask: Tensor | None) -> Fuse:
        return lambda i, state, taps: sum(taps, start=state)


class Dynamic(Gated):
    """`Gated`, with a gate of each example's own: a learned function of the window's mean over the real tokens."""

    def __init__(self, stream: Stream, kept: Sequence[int], slots: int, width: int) -> None:
        super().__init__(stream, kept, slots, width)
        self.pooled = nn.Parameter(torch.zeros(stream.depth, width))

    def forward(self, mask: Tensor | None) -> Fuse:
        shares = self.slots.softmax(-1).unbind()

        def fuse(i: int, state: Tensor, taps: Sequence[Tensor]) -> Tensor:
            tap = weighted(shares[i], taps)
            real = tap.new_ones(tap.shape[:2]) if mask is None else mask.to(tap.dtype)
            pooled = (tap * real.unsqueeze(-1)).sum(1) / real.sum(1, keepdim=True)
            gate = torch.sigmoid(self.alpha[i] / TEMPERATURE + pooled @ self.pooled[i])[:, None, None]
            return torch.lerp(tap, state, gate)

        return fuse

    def gate(self, i: int) -> None:
        """Each example has its own."""


class Attention(Fusion):
    """Each token's state attends over its own 2k+1 taps, which carry a learned encoding of the block they come from.

    What each tap got is added up while the module is in evaluation mode, until `shares` is asked for it.
    """

    def __init__(self, stream: Stream, kept: Sequence[int], slots: int, width: int) -> None:
        super().__init__(stream, kept, slots, width)
        self.origin = nn.Parameter(torch.zeros(stream.depth, slots, width))
        self.query, self.key, self.value, self.out = (
            nn.ModuleDict({str(i): nn.Linear(width, width) for i in kept}) for _ in range(4)
        )
        self.seen: dict[int, Tensor] = {}

    def forward(self, mask: Tensor | None) -> Fuse:
        return lambda i, state, taps: state + self._read(i, state, taps, mask)

    def _read(self, i: int, state: Tensor, taps: Sequence[Tensor], mask: Tensor | None) -> Tensor:
        """What the state reads of the taps, as large."""
        rung = str(i)
        memory = torch.stack(list(taps), dim=2) + self.origin[i]  # [batch, tokens, slots, width]
        query = self.query[rung](state).unsqueeze(2)
        weights = ((query * self.key[rung](memory)).sum(-1) * state.shape[-1] ** -0.5).softmax(-1)
        self._note(i, weights, mask)
        read: Tensor = self.out[rung]((weights.unsqueeze(-1) * self.value[rung](memory)).sum(2))
        return read

    def _note(self, i: int, weights: Tensor, mask: Tensor | None) -> None:
        """Add up the attention [batch, tokens, slots] of the real tokens."""
        if not self.training:
            real = weights.flatten(0, 1) if mask is None else weights[mask.bool()]
            self.seen[i] = self.seen.get(i, 0) + real.detach().sum(0)

    def shares(self, i: int) -> Tensor | None:
        total = self.seen.pop(i, None)
        return None if total is None else total / total.sum()


class CrossAttention(Attention):
    """Each token's state attends over all tokens of all taps, laid end to end: the k-LST report's fusion.

    With as many heads as the backbone. Padding is not attended to, nor in a causal stream what comes later; a tap
    beyond the ends of the backbone is there, with its encoding alone.
    """

    def __init__(self, stream: Stream, kept: Sequence[int], slots: int, width: int) -> None:
        super().__init__(stream, kept, slots, width)
        self.heads = stream.heads if width % stream.heads == 0 else 1
        self.causal = stream.causal

    def _read(self, i: int, state: Tensor, taps: Sequence[Tensor], mask: Tensor | None) -> Tensor:
        rung, (tokens, width), slots = str(i), state.shape[1:], len(taps)
        memory = torch.cat([tap + origin for tap, origin in zip(taps, self.origin[i], strict=True)], dim=1)
        allowed = None if mask is None else mask.bool()[:, None, None].repeat(1, 1, 1, slots)
        if self.causal:
            before = torch.ones(tokens, tokens, dtype=torch.bool, device=state.device).tril().repeat(1, slots)
            allowed = before if allowed is None else allowed & before
        query, key, value = (
            linear[rung](states).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for linear, states in ((self.query, state), (self.key, memory), (self.value, memory))
        )
        if not self.training:  # the slots as more values to attend to: their sums are what each slot got
            which = torch.eye(slots, dtype=value.dtype, device=value.device).repeat_interleave(tokens, 0)
            value = torch.cat([value, which.expand(*value.shape[:2], -1, -1)], -1)
        heads = F.scaled_dot_product_attention(query, key, value, allowed)
        if not self.training:
            heads, got = heads.split([width // self.heads, slots], -1)
            self._note(i, got.mean(1), mask)
        read: Tensor = self.out[rung](heads.transpose(1, 2).flatten(2))
        return read


def weighted(shares: Tensor, taps: Sequence[Tensor]) -> Tensor:
    """The sum of the taps, each times its share of [slots], without stacking them."""
    first, *others = shares.unbind()
    total = first * taps[0]
    for share, tap in zip(others, taps[1:], strict=True):
        total = torch.addcmul(total, share, tap)
    return total
