"""k-ladder: a linear read-out of the frozen backbone, and a ladder side network that adds to it.

Rung i of the side network (ladder side-tuning, https://arxiv.org/abs/2206.06522) reads the blocks i−k … i+k, as in the
project's slides and the k-LST report. There the side network alone gives the answer: that is `LadderSideTuning` with
the same k. Here the answer starts as the read-out's, and the side network learns what it lacks.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.profiler import record_function

from lit_spu.backbones import Batch, HiddenStates, StateIndices
from lit_spu.methods.ladder import LadderBase
from lit_spu.methods.readout import LinearReadOut
from lit_spu.nn.readout import ReadOut
from lit_spu.ranges import CountOrZero


class KLadder(LinearReadOut, LadderBase):
    """Train a linear read-out of the backbone's blocks and of a side network. At the start the latter adds nothing.

    The logits are W·(blocks) + V·(side network's last state) + b. V starts at zero, W and b at zero or at their fit.

    Args:
        k: Radius of the rungs' windows; 0 reads one block, as LST does.
    """

    def __init__(self, k: CountOrZero = 1, **kwargs: Any) -> None:
        super().__init__(k=k, **kwargs)
        width = self.side.side_model.output_width
        self.side_readout = ReadOut([0], width, self.task.num_logits, self.readout.tokens, bias=False)

    def read_indices(self) -> StateIndices:
        return self.backbone.base_model.all_states()

    def logits_from(self, hidden_states: Sequence[HiddenStates], batch: Batch) -> Tensor:
        states = self.compute_states(hidden_states, batch)
        with record_function("side"):
            state = self.side(states, self.backbone.model_inputs(batch))
            side_states = HiddenStates(state, (state,), states[-1].mask)
            added = self.side_readout(self.side_readout.features(side_states, self.backbone.answer_position(batch)))
        logits: Tensor = self.apply_readout(states, batch) + added
        return logits
