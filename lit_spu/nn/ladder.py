"""Ladder side networks (LST, https://arxiv.org/abs/2206.06522): narrow models that read a backbone's hidden states.

The backbone runs first, without gradients. The side network then runs on the backbone's hidden states alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function

from lit_spu.backbones.backbone import Backbone
from lit_spu.backbones.hooks import has_no_hooks, position_wise
from lit_spu.backbones.side_model import blank_inputs, make_side_model
from lit_spu.backbones.stacks import Batch, HiddenStates, Stack
from lit_spu.errors import UserError
from lit_spu.nn.fusion import Fuse, Fusion, Gate

Rungs = Callable[[int, Tensor], Tensor]
"""A function of n and the output of the side block before that returns the input of the n-th side block."""


class Ladder(nn.Module):
    """The rungs of one stack. Rung i computes the input of the side block that belongs to the backbone's block i.

    It projects the outputs of the blocks i−k … i+k down to the side network's width, and joins this window with the
    output of the previous side block. Blocks beyond the ends are zero. The first rung joins its window with the
    projected embeddings.

    Args:
        stack: The backbone's stack.
        layer_indices: The blocks that have a rung.
        width: Width of the side network.
        fusion: The class that joins a window with the side network's state.
        radius: k.
        shared: Use one down-projection per block for all windows, or else one per block and rung.
        dropout: Probability of dropping a whole hidden state of a rung in training, drawn for each example.
    """

    def __init__(
        self,
        stack: Stack,
        layer_indices: Sequence[int],
        width: int,
        fusion: type[Fusion] = Gate,
        radius: int = 0,
        shared: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.layer_indices, self.depth = tuple(layer_indices), stack.depth
        self.radius, self.shared, self.dropout = radius, shared, dropout
        self.embedding_projection = Projection(stack.width, width)
        slots: dict[tuple[int, str, int | None], int] = {}  # numbers by block, projection and, with dropout, rung

        def slot(i: int, j: int) -> int:
            if not 0 <= j < stack.depth:
                return -1
            return slots.setdefault((j, self.projection_name(i, j), i if dropout else None), len(slots))

        windows = {i: [slot(i, j) for j in self.window(i)] for i in layer_indices}
        self.projected_block = {name: block for block, name, _ in slots}  # by projection
        self.down = nn.ModuleDict({name: Projection(stack.width, width) for name in self.projected_block})
        self.slot_projections = [name for _, name, _ in slots]  # the projection of each slot
        self.fusion = fusion(stack, windows, width)

    def window(self, i: int) -> range:
        """Return the blocks that rung i reads, those beyond the ends included."""
        return range(i - self.radius, i + self.radius + 1)

    def read_indices(self) -> set[int]:
        """Return the numbers of the hidden states that the rungs read; 0 is the first block's input."""
        return {0, *(block + 1 for block in self.projected_block.values())}

    def projection_name(self, i: int, j: int) -> str:
        """Return the name of the down-projection by which rung i reads block j."""
        return str(j) if self.shared else f"{i}<{j}"

    def forward(self, hidden_states: HiddenStates) -> Rungs:
        """Project the hidden states down, and return the rungs."""
        # a mark in the profile costs tens of microseconds, a tenth of a rung's time on cached states
        mark: Callable[[str], AbstractContextManager[Any]] = (
            record_function if torch.autograd._profiler_enabled() else nullcontext  # type: ignore[attr-defined]
        )
        with mark("rungs"):
            read = [hidden_states.embeddings, *(hidden_states.blocks[i] for i in self.projected_block.values())]
            embeddings, *rest = project([self.embedding_projection, *self.down.values()], read)
            projected = dict(zip(self.down, rest, strict=True))
            slots = [self._drop(projected[name]) for name in self.slot_projections]
            zero = embeddings.new_zeros(()).expand_as(embeddings)
            fuse: Fuse = self.fusion([*slots, zero], hidden_states.mask)

        def rung(n: int, state: Tensor) -> Tensor:
            i = self.layer_indices[n]
            with mark(f"rung {i}"):
                return fuse(i, embeddings if n == 0 else state)

        return rung

    def _drop(self, state: Tensor) -> Tensor:
        """Drop whole states of examples in training, and scale up the others."""
        if not self.training or not self.dropout:
            return state
        return state * F.dropout(state.new_ones(len(state), 1, 1), self.dropout)

    def statistics(self) -> dict[str, Tensor]:
        """Return the gate of each rung, and the weight of each block in its window, if the fusion has any."""
        found = {}
        for i in self.layer_indices:
            if (gate := self.fusion.gate(i)) is not None:
                found[f"gate/rung {i}"] = gate
            if (shares := self.fusion.shares(i)) is not None:
                weights = zip(self.window(i), shares, strict=True)
                found |= {f"window/rung {i}/block {j}": share for j, share in weights if 0 <= j < self.depth}
        return {name: value.detach() for name, value in found.items()}


def select_layers(stacks: Sequence[Stack], drop_layers: Sequence[int]) -> list[list[int]]:
    """Return for every stack the indices of its blocks except `drop_layers` (0 is the lowest).

    Raises:
        UserError: If there are no such blocks, or a stack loses all of its blocks.
    """
    deepest = max(stack.depth for stack in stacks) - 1
    selected = [[i for i in range(stack.depth) if i not in drop_layers] for stack in stacks]
    if not all(selected) or not all(0 <= layer <= deepest for layer in drop_layers):
        raise UserError(
            f"model.drop_layers={list(drop_layers)}: layers are 0 to {deepest}, and each stack must keep one."
        )
    return selected


class SideNetwork(nn.Module):
    """The backbone's architecture at 1/`reduction` of its width, with a side stack and a ladder for each stack.

    Args:
        backbone: The backbone whose hidden states it reads. It is not a part of this module.
        reduction: The backbone's width divided by the side network's (r in the paper).
        drop_layers: Blocks of every stack without a side block (0 is the lowest).
        make_ladder: Creates the ladder of a stack from the backbone's stack, the blocks that have a rung, and the
            width of the side network.

    Raises:
        UserError: If `reduction` does not divide the widths, or `drop_layers` leaves a stack without blocks.
    """

    up: Projection
    """Projection of its states to the backbone's width, if the method adds one."""

    def __init__(
        self,
        backbone: Backbone,
        reduction: int,
        drop_layers: Sequence[int] = (),
        make_ladder: Callable[[Stack, Sequence[int], int], Ladder] = Ladder,
    ) -> None:
        super().__init__()
        self.layer_indices = select_layers(backbone.stacks, drop_layers)
        self.side_model = make_side_model(backbone.base_model, reduction, self.layer_indices)
        self.model = self.side_model.model  # registers its weights
        width = self.side_model.stacks[0].width
        self.ladders = nn.ModuleList(
            make_ladder(stack, indices, width)
            for stack, indices in zip(backbone.stacks, self.layer_indices, strict=True)
        )
        self._rungs: list[Rungs] = []  # of each stack, during a forward pass
        for number, stack in enumerate(self.side_model.stacks):
            for n, block in enumerate(stack.blocks):
                block.register_forward_pre_hook(partial(self._replace_block_input, number, n), with_kwargs=True)

    def forward(self, hidden_states: Sequence[HiddenStates], inputs: Batch, position: Tensor | None = None) -> Tensor:
        """Return the side network's last hidden states.

        Args:
            hidden_states: The backbone's hidden states of all stacks.
            inputs: The backbone's inputs, for their shapes and masks.
            position: The position [batch] whose state is returned, [batch, 1, side width]; None returns all,
                [batch, tokens, side width].
        """
        self._rungs = [ladder(states) for ladder, states in zip(self.ladders, hidden_states, strict=True)]
        blank = blank_inputs(self.side_model, inputs)
        try:
            return self.side_model.forward(blank) if position is None else self.side_model.forward_at(blank, position)
        finally:
            self._rungs = []

    @position_wise
    def _replace_block_input(
        self, stack: int, n: int, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return (self._rungs[stack](n, args[0]), *args[1:]), kwargs


class Projection(nn.Linear):
    """A linear layer that preserves the scale of its input, and computes in the precision of its input.

    The published projections have an initial standard deviation of 0.01, which suits T5's large residual stream. For
    the normalised states of a BERT, their output would be small compared with the side network's own state, and the
    side network would not learn.
    """

    def reset_parameters(self) -> None:
        torch.nn.init.normal_(self.weight, std=self.in_features**-0.5)
        torch.nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype)).to(self.weight.dtype)


def project(projections: Sequence[Any], states: Sequence[Tensor]) -> Sequence[Tensor]:
    """Return the projection of each state [batch, tokens, width].

    States that lie next to each other, as cached ones do, are projected in one product.
    """
    stacked = as_stack(states)
    if stacked is None or not all(has_no_hooks(projection) for projection in projections):
        return [projection(state) for projection, state in zip(projections, states, strict=True)]
    weights, biases = (torch.stack([getattr(p, name) for p in projections]) for name in ("weight", "bias"))
    flat = stacked.flatten(1, 2)
    products = torch.baddbmm(biases.to(flat.dtype).unsqueeze(1), flat, weights.to(flat.dtype).mT)
    projected: Sequence[Tensor] = products.to(weights.dtype).unflatten(1, stacked.shape[1:3]).unbind()
    return projected


def as_stack(states: Sequence[Tensor]) -> Tensor | None:
    """Return contiguous states as a view [states, ...] of their memory if they lie next to each other, or else None."""
    first = states[0]
    storage, size = first.untyped_storage()._cdata, first.numel()
    for number, state in enumerate(states):
        is_next = state.storage_offset() == first.storage_offset() + number * size
        same = state.untyped_storage()._cdata == storage and state.shape == first.shape and state.dtype == first.dtype
        if not (is_next and same and state.is_contiguous()):
            return None
    return first.as_strided((len(states), *first.shape), (size, *first.stride()))
