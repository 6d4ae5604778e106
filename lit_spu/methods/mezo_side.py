"""MeZO over a side network (https://arxiv.org/abs/2305.17333, https://arxiv.org/abs/2206.06522).

The frozen backbone's hidden states do not depend on the side network's weights. So one forward pass of the backbone
serves all evaluations of a step, and many directions cost little. With an activation cache, no pass is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lit_spu.backbones import Batch
from lit_spu.methods.ladder import LadderSideTuning
from lit_spu.methods.zeroth_order import ZerothOrder


class MeZOSide(ZerothOrder, LadderSideTuning):
    """Train a ladder by MeZO, for example to maximise a metric. It is best to start from a trained ladder."""

    captures_own_steps = False

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)

    def make_closure(self, batch: Batch) -> Callable[[], Tensor]:
        hidden_states = self.hidden_states(batch)
        return lambda: self.objective_from(self(batch, hidden_states), batch)
