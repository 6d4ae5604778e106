"""Ladder side-tuning (Sung, Cho, Bansal 2022, https://arxiv.org/abs/2206.06522).

A narrow side network reads the frozen backbone's blocks through gated rungs and answers in its place. Gradients flow
through the side network alone, so nothing of the backbone is stored for the backward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.profiler import record_function

from lit_spu.backbones import Batch
from lit_spu.methods.base import TapReader
from lit_spu.nn.ladder import SideNetwork


class LadderSideTuning(TapReader):
    """Train a side network beside the frozen backbone.

    Args:
        reduction: The backbone's width over the side network's (r).
        drop_layers: Blocks beside which the side network has none, in every stack; 0 is the lowest.
        activation_checkpointing: Recompute the side network's feed-forwards in the backward pass, which costs a per
            cent of a step. Off, a step takes up to a quarter more memory.
    """

    def __init__(
        self,
        reduction: int = 8,
        drop_layers: Sequence[int] = (),
        activation_checkpointing: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.side = SideNetwork(self.backbone, reduction, drop_layers)
        if activation_checkpointing:
            self.side.trunk.recompute_feed_forwards()

    def forward(self, batch: Batch) -> Tensor:
        taps = self.taps(batch)
        with record_function("side"):
            hidden = self.side(taps, self.backbone.inputs(batch))
            state = self.side.up(self.backbone.read(hidden, batch))
        return self.backbone.head(state)
