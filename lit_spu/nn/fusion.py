"""How a rung joins what it reads of the backbone with the state of the side network.

A fusion serves all rungs of one stream. `forward(i, state, taps, mask)` gives the state that enters side block i, from
the state [batch, tokens, width] that comes and the 2k+1 down-projected taps of rung `i`, each as large. Taps beyond the
ends of the backbone are zero.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

TEMPERATURE = 0.1


class Fusion(nn.Module, ABC):
    """The base of the fusions: `depth` blocks, of which `kept` have a rung with `slots` taps of `width`."""

    def __init__(self, depth: int, kept: Sequence[int], slots: int, width: int) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, i: int, state: Tensor, taps: Sequence[Tensor], mask: Tensor | None) -> Tensor:
        """The state that enters side block i."""


class Gate(Fusion):
    """LST's gate between the state and one tap: g·s + (1−g)·x with g = σ(α_i / T), α_i = 0 at the start (eq. 2).

    As published, α has an entry for every block of the backbone, also where the side network has none.
    """

    def __init__(self, depth: int, kept: Sequence[int], slots: int, width: int) -> None:
        super().__init__(depth, kept, slots, width)
        self.alpha = nn.Parameter(torch.zeros(depth))

    def forward(self, i: int, state: Tensor, taps: Sequence[Tensor], mask: Tensor | None) -> Tensor:
        gate = torch.sigmoid(self.alpha[i] / TEMPERATURE)
        return torch.lerp(taps[0], state, gate)


class Gated(Gate):
    """LST's gate on the window's mean under learned weights, softmax over the slots; with one slot it is LST's own."""

    def __init__(self, depth: int, kept: Sequence[int], slots: int, width: int) -> None:
        super().__init__(depth, kept, slots, width)
        self.slots = nn.Parameter(torch.zeros(depth, slots))

    def forward(self, i: int, state: Tensor, taps: Sequence[Tensor], mask: Tensor | None) -> Tensor:
        return super().forward(i, state, [weighted(self.slots[i], taps)], mask)


class Additive(Fusion):
    """The state plus all taps of the window; their scale is left to the down-projections."""

    def forward(self, i: int, state: Tensor, taps: Sequence[Tensor], mask: Tensor | None) -> Tensor:
        for tap in taps:
            state = state + tap
        return state


class Dynamic(Gated):
    """`Gated`, with a gate of each example's own: a learned function of the window's mean over the real tokens."""

    def __init__(self, depth: int, kept: Sequence[int], slots: int, width: int) -> None:
        super().__init__(depth, kept, slots, width)
        self.pooled = nn.Parameter(torch.zeros(depth, width))

    def forward(self, i: int, state: Tensor, taps: Sequence[Tensor], mask: Tensor | None) -> Tensor:
        tap = weighted(self.slots[i], taps)
        real = tap.new_ones(tap.shape[:2]) if mask is None else mask.to(tap.dtype)
        pooled = (tap * real.unsqueeze(-1)).sum(1) / real.sum(1, keepdim=True)
        gate = torch.sigmoid(self.alpha[i] / TEMPERATURE + pooled @ self.pooled[i])[:, None, None]
        return torch.lerp(tap, state, gate)


class Attention(Fusion):
    """Each token's state attends over its own 2k+1 taps, which carry a learned encoding of the block they come from."""

    def __init__(self, depth: int, kept: Sequence[int], slots: int, width: int) -> None:
        super().__init__(depth, kept, slots, width)
        self.origin = nn.Parameter(torch.zeros(depth, slots, width))
        self.query, self.key, self.value, self.out = (
            nn.ModuleDict({str(i): nn.Linear(width, width) for i in kept}) for _ in range(4)
        )

    def forward(self, i: int, state: Tensor, taps: Sequence[Tensor], mask: Tensor | None) -> Tensor:
        rung = str(i)
        memory = torch.stack(list(taps), dim=2) + self.origin[i]  # [batch, tokens, slots, width]
        query = self.query[rung](state).unsqueeze(2)
        scores = (query * self.key[rung](memory)).sum(-1) * state.shape[-1] ** -0.5
        read = (scores.softmax(-1).unsqueeze(-1) * self.value[rung](memory)).sum(2)
        added: Tensor = self.out[rung](read)
        return state + added


def weighted(logits: Tensor, taps: Sequence[Tensor]) -> Tensor:
    """The taps' mean under softmax(logits), without stacking them."""
    shares = logits.softmax(-1)
    total = shares[0] * taps[0]
    for share, tap in zip(shares[1:], taps[1:], strict=True):
        total = torch.addcmul(total, share, tap)
    return total
