"""k-ladder: the mean of two classifiers on one frozen backbone, a linear read-out and a ladder side network.

Rung i of the side network (ladder side-tuning, https://arxiv.org/abs/2206.06522) reads the blocks i−k … i+k, as in the
project's slides and the k-LST report. There the side network alone gives the answer: that is `LadderSideTuning` with
the same k.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lit_spu.backbones import Batch, HiddenStates, StateIndices
from lit_spu.methods.ladder import LadderSideTuning
from lit_spu.methods.readout import LinearReadOut
from lit_spu.ranges import CountOrZero


class KLadder(LinearReadOut, LadderSideTuning):
    """Train a linear read-out and a ladder, each by the loss of its own logits. The answer is the mean of their logits.

    With one loss for the mean, the read-out explains the training examples long before the ladder does, and leaves it
    no gradient.

    Args:
        k: Radius of the rungs' windows; 0 reads one block, as LST does.
        joint: Train both by the loss of their mean, for comparison.
    """

    def __init__(self, k: CountOrZero = 1, joint: bool = False, **kwargs: Any) -> None:
        super().__init__(k=k, **kwargs)
        self.joint = joint
        self.backbone.head_modules.requires_grad_(self.backbone.has_classifier)  # the ladder uses it, as in LST

    def read_indices(self) -> StateIndices:
        own = super().read_indices()
        ladders: list[Any] = list(self.side.ladders)
        return [{*read, *ladder.read_indices()} for read, ladder in zip(own, ladders, strict=True)]

    def both_logits(self, hidden_states: Sequence[HiddenStates], batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the logits of the read-out and of the ladder, both [batch, labels]."""
        states = self.compute_states(hidden_states, batch)
        return self.apply_readout(states, batch), LadderSideTuning.logits_from(self, states, batch)

    def logits_from(self, hidden_states: Sequence[HiddenStates], batch: Batch) -> Tensor:
        return torch.stack(self.both_logits(hidden_states, batch)).mean(0)

    def loss(self, batch: Batch, hidden_states: Sequence[HiddenStates] | None = None) -> Tensor:
        """Return the sum of both losses, or with `joint` the loss of the mean logits; a scalar."""
        if self.joint:
            return super().loss(batch, hidden_states)
        readout, ladder = self.both_logits(hidden_states or self.hidden_states(batch), batch)
        return self.backbone.loss(readout, batch) + self.backbone.loss(ladder, batch)
