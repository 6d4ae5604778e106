"""Fusions: functions that join a window of the backbone's hidden states with the state of the side network.

One fusion module serves all rungs of a stack. Its inputs are `slots`: the stack's hidden states, projected down to
[batch, tokens, width]. Each rung reads a window of 2k+1 slots. The last slot is zero; it serves for all blocks beyond
the ends of the backbone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_spu.backbones.stacks import Stack

TEMPERATURE = 0.1

Windows = Mapping[int, Sequence[int]]
"""By the number of a rung, the indices of the 2k+1 slots that it reads; −1 beyond the ends of the backbone."""

Fuse = Callable[[int, Tensor], Tensor]
"""A function of i and the output of the side block before that returns the input of side block i."""


class Fusion(nn.Module, ABC):
    """Base class of fusions.

    Args:
        stack: The backbone's stack.
        windows: The slots that each rung reads. All windows have the same size.
        width: Width of the slots.
    """

    def __init__(self, stack: Stack, windows: Windows, width: int) -> None:
        super().__init__()
        self.windows = windows
        (self.window_size,) = {len(window) for window in windows.values()}

    @abstractmethod
    def forward(self, slots: Sequence[Tensor], mask: Tensor | None) -> Fuse:
        """Return the function that computes the side blocks' inputs in this forward pass.

        Args:
            slots: Projected hidden states, [batch, tokens, width] each.
            mask: [batch, tokens], 1 where a token is real; None if all are.
        """

    def window(self, i: int, slots: Sequence[Tensor]) -> list[Tensor]:
        """Return the slots that rung i reads."""
        return [slots[number] for number in self.windows[i]]

    def gate(self, i: int) -> Tensor | None:
        """Return the weight of the side network's state at rung i, a scalar, or None if there is no single one."""
        return None

    def shares(self, i: int) -> Tensor | None:
        """Return the weight of each slot in the window of rung i, [window size], or None if there is none."""
        return None


class Gate(Fusion):
    """LST's gate between the state s and one hidden state x: g·s + (1−g)·x with g = σ(α_i / T) (eq. 2).

    Initially α_i = 0. As published, α has an entry for every block of the backbone, even without a side block.
    """

    def __init__(self, stack: Stack, windows: Windows, width: int) -> None:
        super().__init__(stack, windows, width)
        self.alpha = nn.Parameter(torch.zeros(stack.depth))

    def forward(self, slots: Sequence[Tensor], mask: Tensor | None) -> Fuse:
        gates, summaries = torch.sigmoid(self.alpha / TEMPERATURE).unbind(), self.summarize(slots)
        return lambda i, state: _GatedSum.apply(summaries[i], state, gates[i])  # type: ignore[no-untyped-call]

    def summarize(self, slots: Sequence[Tensor]) -> dict[int, Tensor]:
        """Return one state for the window of each rung: the only slot of a window of size 1."""
        return {i: slots[number] for i, (number,) in self.windows.items()}

    def gate(self, i: int) -> Tensor | None:
        return torch.sigmoid(self.alpha[i] / TEMPERATURE)


class _GatedSum(torch.autograd.Function):
    """The sum g·s + (1−g)·x with a scalar g. Its backward pass launches half of the operators of `lerp`'s."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, state: Tensor, gate: Tensor) -> Tensor:
        ctx.save_for_backward(x, state, gate)
        return torch.lerp(x, state, gate)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        (grad,) = grads
        x, state, gate = ctx.saved_tensors
        grad_state = grad * gate
        return grad - grad_state, grad_state, torch.dot(grad.flatten(), (state - x).flatten())


class Gated(Gate):
    """LST's gate on the mean of a window under learned weights, a softmax over its slots. With one slot it is LST."""

    def __init__(self, stack: Stack, windows: Windows, width: int) -> None:
        super().__init__(stack, windows, width)
        self.slots = nn.Parameter(torch.zeros(stack.depth, self.window_size))
        indices = [windows.get(i, [-1] * self.window_size) for i in range(stack.depth)]
        self.slot_indices: Tensor
        self.register_buffer("slot_indices", torch.tensor(indices), persistent=False)

    def summarize(self, slots: Sequence[Tensor]) -> dict[int, Tensor]:
        """Return the means of all windows, computed in one product of weights [blocks, slots] with the slots."""
        shares = self.slots.softmax(-1)
        shares = shares.new_zeros(len(shares), len(slots)).scatter_add(1, self.slot_indices % len(slots), shares)
        stacked = torch.stack(list(slots[:-1]))  # without the zero slot
        means = (shares[:, :-1] @ stacked.flatten(1)).to(stacked.dtype).unflatten(1, stacked.shape[1:])
        return dict(enumerate(means.unbind()))

    def shares(self, i: int) -> Tensor:
        return self.slots[i].softmax(-1)


class Additive(Fusion):
    """The sum of the state and all slots of the window, without weights."""

    def forward(self, slots: Sequence[Tensor], mask: Tensor | None) -> Fuse:
        return lambda i, state: sum(self.window(i, slots), start=state)


class Dynamic(Gated):
    """`Gated` with a gate for each example, computed from the window's mean over the real tokens.

    In a causal stack each token has its own gate, from the mean up to this token: no token depends on later ones.
    """

    def __init__(self, stack: Stack, windows: Windows, width: int) -> None:
        super().__init__(stack, windows, width)
        self.pooled = nn.Parameter(torch.zeros(stack.depth, width))
        self.is_causal = stack.is_causal

    def forward(self, slots: Sequence[Tensor], mask: Tensor | None) -> Fuse:
        summaries = self.summarize(slots)

        def fuse(i: int, state: Tensor) -> Tensor:
            summary = summaries[i]
            real = summary.new_ones(summary.shape[:2]) if mask is None else mask.to(summary.dtype)
            scores, count = (summary @ self.pooled[i]) * real, real  # the mean of the scores is the score of the mean
            if self.is_causal:
                scores, count = scores.cumsum(1), count.cumsum(1)
            else:
                scores, count = scores.sum(1, keepdim=True), count.sum(1, keepdim=True)
            gate = torch.sigmoid(self.alpha[i] / TEMPERATURE + scores / count.clamp_min(1))
            return torch.lerp(summary, state, gate.unsqueeze(-1))

        return fuse

    def gate(self, i: int) -> None:
        """Return None: each example has its own gate."""


class Attention(Fusion):
    """Attention of each token's state over its own 2k+1 slots, which have a learned encoding of their block added.

    In evaluation mode the attention to each slot is summed up, and `shares` reads and resets the sum.
    """

    def __init__(self, stack: Stack, windows: Windows, width: int) -> None:
        super().__init__(stack, windows, width)
        self.origin = nn.Parameter(torch.zeros(stack.depth, self.window_size, width))
        self.query, self.key, self.value, self.out = (
            nn.ModuleDict({str(i): nn.Linear(width, width) for i in windows}) for _ in range(4)
        )
        self.summed_attention: dict[int, Tensor] = {}

    def forward(self, slots: Sequence[Tensor], mask: Tensor | None) -> Fuse:
        return lambda i, state: state + self._attend(i, state, self.window(i, slots), mask)

    def _attend(self, i: int, state: Tensor, window: list[Tensor], mask: Tensor | None) -> Tensor:
        """Return the output of the attention of `state` over a window, in the state's shape."""
        rung = str(i)
        memory = torch.stack(window, dim=2) + self.origin[i]  # [batch, tokens, slots, width]
        query = self.query[rung](state).unsqueeze(2)
        weights = ((query * self.key[rung](memory)).sum(-1) * state.shape[-1] ** -0.5).softmax(-1)
        self._sum_attention(i, weights, mask)
        output: Tensor = self.out[rung]((weights.unsqueeze(-1) * self.value[rung](memory)).sum(2))
        return output

    def _sum_attention(self, i: int, weights: Tensor, mask: Tensor | None) -> None:
        """Add the attention weights [batch, tokens, slots] of the real tokens to the sum of rung i."""
        if not self.training:
            real = weights.flatten(0, 1) if mask is None else weights[mask.bool()]
            self.summed_attention[i] = self.summed_attention.get(i, 0) + real.detach().sum(0)

    def shares(self, i: int) -> Tensor | None:
        total = self.summed_attention.pop(i, None)
        return None if total is None else total / total.sum()


class CrossAttention(Attention):
    """Attention of each token's state over all tokens of all slots of the window: the fusion of the k-LST report.

    It has the backbone's number of heads, or one if that does not divide the width. Padding is masked; in a causal
    stack, later tokens are, too. A slot beyond the ends of the backbone takes part with its encoding alone.
    """

    def __init__(self, stack: Stack, windows: Windows, width: int) -> None:
        super().__init__(stack, windows, width)
        self.num_heads = stack.num_heads if width % stack.num_heads == 0 else 1
        self.is_causal = stack.is_causal

    def _attend(self, i: int, state: Tensor, window: list[Tensor], mask: Tensor | None) -> Tensor:
        rung, (tokens, width), num_slots = str(i), state.shape[1:], len(window)
        memory = torch.cat([slot + origin for slot, origin in zip(window, self.origin[i], strict=True)], dim=1)
        allowed = None if mask is None else mask.bool()[:, None, None].repeat(1, 1, 1, num_slots)
        if self.is_causal:
            earlier = torch.ones(tokens, tokens, dtype=torch.bool, device=state.device).tril().repeat(1, num_slots)
            allowed = earlier if allowed is None else allowed & earlier
        query, key, value = (
            linear[rung](states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for linear, states in ((self.query, state), (self.key, memory), (self.value, memory))
        )
        if not self.training:  # one more value per slot, 1 for its tokens: the output is then the attention to it
            indicator = torch.eye(num_slots, dtype=value.dtype, device=value.device).repeat_interleave(tokens, 0)
            value = torch.cat([value, indicator.expand(*value.shape[:2], -1, -1)], -1)
        heads = F.scaled_dot_product_attention(query, key, value, allowed)
        if not self.training:
            heads, shares = heads.split([width // self.num_heads, num_slots], -1)
            self._sum_attention(i, shares.mean(1), mask)
        output: Tensor = self.out[rung](heads.transpose(1, 2).flatten(2))
        return output
