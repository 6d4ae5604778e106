"""How a rung joins what it reads of the backbone with the state of the side network.

A fusion serves all rungs of one stream. `forward(taps, mask)` begins a pass on the stream's taps, projected down to
[batch, tokens, width]: what it gives makes the state that enters side block i from `i` and the state that comes, as
large. The last tap is zero and stands for all beyond the ends of the backbone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_spu.backbones.base import Stream

TEMPERATURE = 0.1

Windows = Mapping[int, Sequence[int]]
"""Of each rung the numbers of the 2k+1 taps that it reads; −1, the last one, beyond the ends of the backbone."""

Fuse = Callable[[int, Tensor], Tensor]
"""Gives the state that enters side block i from i and the state that comes."""


class Fusion(nn.Module, ABC):
    """The base of the fusions: a stream's rung i joins its state with the taps of `windows[i]`, each of one `width`."""

    def __init__(self, stream: Stream, windows: Windows, width: int) -> None:
        super().__init__()
        self.windows = windows
        (self.span,) = {len(window) for window in windows.values()}

    @abstractmethod
    def forward(self, taps: Sequence[Tensor], mask: Tensor | None) -> Fuse:
        """Begin a pass on texts of which the mask [batch, tokens] tells the real tokens; None if all are."""

    def window(self, i: int, taps: Sequence[Tensor]) -> list[Tensor]:
        """The taps that rung i reads."""
        return [taps[number] for number in self.windows[i]]

    def gate(self, i: int) -> Tensor | None:
        """The share of the state at rung i, a scalar, where a gate of the rung's own tells it."""
        return None

    def shares(self, i: int) -> Tensor | None:
        """How much of the window each tap of rung i makes, [span], where that is known."""
        return None


class Gate(Fusion):
    """LST's gate between the state and one tap: g·s + (1−g)·x with g = σ(α_i / T), α_i = 0 at the start (eq. 2).

    As published, α has an entry for every block of the backbone, also where the side network has none.
    """

    def __init__(self, stream: Stream, windows: Windows, width: int) -> None:
        super().__init__(stream, windows, width)
        self.alpha = nn.Parameter(torch.zeros(stream.depth))

    def forward(self, taps: Sequence[Tensor], mask: Tensor | None) -> Fuse:
        gates, read = torch.sigmoid(self.alpha / TEMPERATURE).unbind(), self.read(taps)
        return lambda i, state: torch.lerp(read[i], state, gates[i])

    def read(self, taps: Sequence[Tensor]) -> dict[int, Tensor]:
        """What each rung takes from its window: the one tap of it."""
        return {i: taps[number] for i, (number,) in self.windows.items()}

    def gate(self, i: int) -> Tensor | None:
        return torch.sigmoid(self.alpha[i] / TEMPERATURE)


class Gated(Gate):
    """LST's gate on the window's mean under learned weights, softmax over the slots; with one slot it is LST's own."""

    def __init__(self, stream: Stream, windows: Windows, width: int) -> None:
        super().__init__(stream, windows, width)
        self.slots = nn.Parameter(torch.zeros(stream.depth, self.span))
        numbers = [windows.get(i, [-1] * self.span) for i in range(stream.depth)]
        self.numbers: Tensor
        self.register_buffer("numbers", torch.tensor(numbers), persistent=False)

    def read(self, taps: Sequence[Tensor]) -> dict[int, Tensor]:
        """The means of all windows, made in one product of the shares [blocks, taps] with the taps."""
        shares = self.slots.softmax(-1)
        shares = shares.new_zeros(len(shares), len(taps)).scatter_add(1, self.numbers % len(taps), shares)
        blocks = torch.stack(list(taps[:-1]))  # without the zero
        means = (shares[:, :-1] @ blocks.flatten(1)).to(blocks.dtype).unflatten(1, blocks.shape[1:])
        return dict(enumerate(means.unbind()))

    def shares(self, i: int) -> Tensor:
        return self.slots[i].softmax(-1)


class Additive(Fusion):
    """The state plus all taps of the window; their scale is left to the down-projections."""

    def forward(self, taps: Sequence[Tensor], mask: Tensor | None) -> Fuse:
        return lambda i, state: sum(self.window(i, taps), start=state)


class Dynamic(Gated):
    """`Gated`, with a gate of each example's own: a learned function of the window's mean over the real tokens."""

    def __init__(self, stream: Stream, windows: Windows, width: int) -> None:
        super().__init__(stream, windows, width)
        self.pooled = nn.Parameter(torch.zeros(stream.depth, width))

    def forward(self, taps: Sequence[Tensor], mask: Tensor | None) -> Fuse:
        read = self.read(taps)

        def fuse(i: int, state: Tensor) -> Tensor:
            tap = read[i]
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

    def __init__(self, stream: Stream, windows: Windows, width: int) -> None:
        super().__init__(stream, windows, width)
        self.origin = nn.Parameter(torch.zeros(stream.depth, self.span, width))
        self.query, self.key, self.value, self.out = (
            nn.ModuleDict({str(i): nn.Linear(width, width) for i in windows}) for _ in range(4)
        )
        self.seen: dict[int, Tensor] = {}

    def forward(self, taps: Sequence[Tensor], mask: Tensor | None) -> Fuse:
        return lambda i, state: state + self._read(i, state, self.window(i, taps), mask)

    def _read(self, i: int, state: Tensor, taps: list[Tensor], mask: Tensor | None) -> Tensor:
        """What the state reads of the taps, as large."""
        rung = str(i)
        memory = torch.stack(taps, dim=2) + self.origin[i]  # [batch, tokens, slots, width]
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

    def __init__(self, stream: Stream, windows: Windows, width: int) -> None:
        super().__init__(stream, windows, width)
        self.heads = stream.heads if width % stream.heads == 0 else 1
        self.causal = stream.causal

    def _read(self, i: int, state: Tensor, taps: list[Tensor], mask: Tensor | None) -> Tensor:
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
