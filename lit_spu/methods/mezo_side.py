"""MeZO over a side network (https://arxiv.org/abs/2305.17333, https://arxiv.org/abs/2206.06522).

What a side network reads of the frozen backbone does not depend on its own weights: one pass of the backbone serves all
evaluations of a step, so that many directions cost little, and with a activation_cache none is needed.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lit_spu.backbones import Batch
from lit_spu.methods.kladder import KLadder
from lit_spu.methods.zeroth_order import ZerothOrder


class MeZOSide(ZerothOrder, KLadder):
    """Train a ladder by MeZO: a way to a metric that has no gradient, best from a ladder that is trained already."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    def take_step(self, batch: Batch, *optimizers: Any) -> Tensor | None:
        taps, kept = self.taps(batch), self.kept
        self.kept = lambda _: taps
        try:
            return super().take_step(batch, *optimizers)
        finally:
            self.kept = kept
