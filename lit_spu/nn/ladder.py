"""Ladder side networks (LST, https://arxiv.org/abs/2206.06522): a narrow copy of the backbone reads it, rung by rung.

The backbone runs first, without gradient, and leaves each block's output; the side network runs on those alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import record_function

from lit_spu.backbones.base import Backbone, Batch, HiddenStates, Stream
from lit_spu.errors import UserError
from lit_spu.nn.fusion import Fuse, Fusion, Gate


class Ladder(nn.Module):
    """The rungs of one stream: rung i reads the backbone's block i, projected down, in front of side block i.

    With a `radius` of k, rung i reads the window of blocks i−k … i+k; blocks beyond the ends are zero. Windows share
    each block's down-projection unless `shared` is off, when every slot of every rung has its own. In training each tap
    of each rung is left out whole, for each example by itself, with the probability `dropout`.
    """

    def __init__(
        self,
        stream: Stream,
        kept: Sequence[int],
        width: int,
        fusion: type[Fusion] = Gate,
        radius: int = 0,
        shared: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.kept, self.depth, self.radius, self.shared = tuple(kept), stream.depth, radius, shared
        self.dropout = dropout
        self.first = Projection(stream.width, width)
        numbers: dict[tuple[int, str, int | None], int] = {}  # with dropout every rung has taps of its own

        def number(i: int, j: int) -> int:
            if not 0 <= j < stream.depth:
                return -1
            return numbers.setdefault((j, self.name(i, j), i if dropout else None), len(numbers))

        windows = {i: [number(i, j) for j in self.window(i)] for i in kept}
        self.blocks = {name: block for block, name, _ in numbers}  # what each projection reads
        self.down = nn.ModuleDict({name: Projection(stream.width, width) for name in self.blocks})
        self.sources = [name for _, name, _ in numbers]  # the projection that each tap comes from
        self.fusion = fusion(stream, windows, width)

    def window(self, i: int) -> range:
        """The backbone's blocks that rung i reads."""
        return range(i - self.radius, i + self.radius + 1)

    def name(self, i: int, j: int) -> str:
        """The name of the down-projection with which rung i reads block j."""
        return str(j) if self.shared else f"{i}<{j}"

    def forward(self, taps: HiddenStates) -> Callable[[int, Tensor], Tensor]:
        """Project the taps down; gives the state that enters the n-th side block, from n and the state that comes."""
        # a mark costs tens of microseconds, of which a rung that reads kept taps has hundreds
        mark: Callable[[str], AbstractContextManager[Any]] = (
            record_function if torch.autograd._profiler_enabled() else nullcontext  # type: ignore[attr-defined]
        )
        zero = self.first.weight.new_zeros(()).expand(*taps.embeddings.shape[:2], self.first.out_features)

        def left_out(tap: Tensor) -> Tensor:
            if self.training and self.dropout:
                return tap * F.dropout(zero.new_ones(len(zero), 1, 1), self.dropout)
            return tap

        with mark("rungs"):
            projected = {name: down(taps.blocks[self.blocks[name]]) for name, down in self.down.items()}
            fuse: Fuse = self.fusion([*(left_out(projected[name]) for name in self.sources), zero], taps.mask)

        def enter(n: int, state: Tensor) -> Tensor:
            i = self.kept[n]
            with mark(f"rung {i}"):
                return fuse(i, self.first(taps.embeddings) if n == 0 else state)

        return enter

    def statistics(self) -> dict[str, Tensor]:
        """What each rung takes: the gate's share of the state, and that of each block in the window."""
        found = {}
        for i in self.kept:
            if (gate := self.fusion.gate(i)) is not None:
                found[f"gate/rung {i}"] = gate
            if (shares := self.fusion.shares(i)) is not None:
                within = ((j, share) for j, share in zip(self.window(i), shares, strict=True) if 0 <= j < self.depth)
                found |= {f"window/rung {i}/block {j}": share for j, share in within}
        return {name: value.detach() for name, value in found.items()}


def kept_blocks(streams: Sequence[Stream], drop_layers: Sequence[int]) -> list[list[int]]:
    """The blocks of every stream but these (0 is the lowest).

    Raises:
        UserError: if there are no such blocks, or a stream is left without any.
    """
    deepest = max(stream.depth for stream in streams) - 1
    kept = [[i for i in range(stream.depth) if i not in drop_layers] for stream in streams]
    if not all(kept) or not all(0 <= layer <= deepest for layer in drop_layers):
        raise UserError(
            f"model.drop_layers={list(drop_layers)}: layers are 0 to {deepest}, and one of each stack must stay."
        )
    return kept


class SideNetwork(nn.Module):
    """The backbone's own architecture at 1/`reduction` of its width, one side stack a stream, fed by a ladder a stream.

    Args:
        backbone: What it stands beside; it is read, not held.
        reduction: The backbone's width over the side network's (r in the paper).
        drop_layers: Blocks of every stream beside which the side network has none (0 is the lowest).

    Raises:
        UserError: if `reduction` does not divide the widths, or `drop_layers` leaves a stream without blocks.
    """

    def __init__(
        self,
        backbone: Backbone,
        reduction: int,
        drop_layers: Sequence[int] = (),
    ) -> None:
        super().__init__()
        self.streams = backbone.streams
        self.kept = kept_blocks(self.streams, drop_layers)
        self.trunk = backbone.base_model.shrunk(reduction, self.kept)
        self.model = self.trunk.model
        self.climb(Ladder)
        self.up = Projection(self.trunk.output_width, backbone.width)

    def climb(self, ladder: Callable[[Stream, Sequence[int], int], Ladder]) -> None:
        """Put new rungs in: `ladder` makes those of a stream from it, its kept blocks and the side network's width."""
        width = self.trunk.streams[0].width
        self.ladders = nn.ModuleList(
            ladder(stream, kept, width) for stream, kept in zip(self.streams, self.kept, strict=True)
        )

    def forward(self, taps: Sequence[HiddenStates], inputs: Batch, position: Tensor) -> Tensor:
        """The hidden state [batch, 1, side width] at one `position` [batch]; a head reads it through `up`."""
        enters = [ladder(tap) for ladder, tap in zip(self.ladders, taps, strict=True)]
        with self.trunk.entered(lambda stream, n, state: enters[stream](n, state)):
            return self.trunk.run_at(self.trunk.inputs_like(inputs), position)


class Projection(nn.Linear):
    """A linear that keeps the scale of what it reads, in the precision of that: what it keeps is no larger.

    The published ones start at a standard deviation of 0.01, which suits T5's large residual stream. Behind the norms
    of a BERT their output would drown in the side network's own, and a narrow side network would not learn.
    """

    def reset_parameters(self) -> None:
        torch.nn.init.normal_(self.weight, std=self.in_features**-0.5)
        torch.nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype)).to(self.weight.dtype)
