"""LST distillation: the side network learns to do without the backbone that it stands beside.

From the project's slides and the k-LST report. The student is ladder side-tuning's side network, with embeddings of its
own and without rungs: what a rung would have read at block i is the target of its own state there. Once trained it is a
small model of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import record_function

from lit_spu.backbones import Batch, HiddenStates
from lit_spu.errors import UserError
from lit_spu.methods.base import HiddenStateReader
from lit_spu.nn import distances, pruning
from lit_spu.nn.ladder import kept_blocks


class LSTDistillation(HiddenStateReader):
    """Train a narrow student by the task, and by what its frozen teacher computes and answers.

    loss = task + λ·mean_i dist(s_i, D_i h_i) + μ·T²·KL(scores), with s_i and h_i the outputs of the student's and the
    teacher's block i, and D_i fixed.

    Args:
        reduction: The backbone's width over the student's (r).
        drop_layers: Blocks of the teacher for which the student has none, in every stack; 0 is the lowest.
        init: The student's weights: the teacher's, of which the greatest 1/r of each width is kept, or random. D then
            picks the coordinates that are kept, or is random, too.
        hidden_states_weight: λ.
        logits_weight: μ. The teacher must know the task: a prompt, or a fine-tuned classifier as `backbone`.
        temperature: T.
        distance: Of states: the squared error over the teacher's variance, the cosine, or how the relations of the
            tokens to each other diverge, which needs no D.

    Raises:
        UserError: if a number is out of range, or the teacher has no answers to learn from.
    """

    down: Tensor

    def __init__(
        self,
        reduction: int = 4,
        drop_layers: Sequence[int] = (),
        init: Literal["magnitude", "random"] = "magnitude",
        hidden_states_weight: float = 1.0,
        logits_weight: float = 0.0,
        temperature: float = 2.0,
        distance: Literal["mse", "cosine", "relation"] = "mse",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.backbone.requires_grad_(False)
        if init == "magnitude" and kwargs.get("backbone_precision") == "int8":
            raise UserError("model.init=magnitude cannot prune weights in int8: use bf16 or fp32, or init=random.")
        if logits_weight and not self.backbone.head_is_pretrained:
            raise UserError(
                f"model.logits_weight={logits_weight}: the classification head of {self.backbone.name} is new, and its"
                " scores are random. Give a fine-tuned model as --model.backbone (lit-spu export --format merged writes"
                " one), --model.head=prompt, or --model.logits_weight=0."
            )
        self.hidden_states_weight, self.logits_weight, self.temperature = (
            hidden_states_weight,
            logits_weight,
            temperature,
        )
        self.distance = getattr(distances, distance)
        self.kept_blocks = kept_blocks(self.backbone.streams, drop_layers)
        self.student = self.backbone.student(reduction, self.kept_blocks)
        # D is the same whenever the method is made again: no checkpoint needs to hold it
        width, narrow = self.backbone.streams[0].width, self.student.streams[0].width
        if init == "magnitude":
            kept = pruning.init_from_pruned(
                self.student.base_model,
                self.backbone.base_model,
                self.kept_blocks,
                pruning.magnitude(self.backbone.base_model),
            )
            down = F.one_hot(kept, width).float()
        else:
            down = torch.randn(narrow, width, generator=torch.Generator().manual_seed(0)) * width**-0.5
        self.register_buffer("down", down, persistent=False)

    def forward(self, batch: Batch) -> Tensor:
        with record_function("student"):
            scores: Tensor = self.student(batch)
        return scores

    def loss(self, batch: Batch) -> Tensor:
        with self.student.base_model.tapped(self.student.inputs(batch)) as own:
            scores = self(batch)
        loss = self.student.loss(scores, batch)
        if self.hidden_states_weight or self.logits_weight:
            taught = self.taps(batch)
        if self.hidden_states_weight:
            loss = loss + self.hidden_states_weight * torch.stack([*self._distances(own(), taught)]).mean()
        if self.logits_weight:
            with torch.no_grad():
                answers = self.backbone.scores(taught, batch)
            apart = F.mse_loss if self.task.regression else partial(distances.divergence, temperature=self.temperature)
            loss = loss + self.logits_weight * apart(scores, answers)
        return loss

    def _distances(self, student: Sequence[HiddenStates], teacher: Sequence[HiddenStates]) -> Iterator[Tensor]:
        """Of each of the student's blocks from the teacher's block that it stands for."""
        for own, taught, kept in zip(student, teacher, self.kept_blocks, strict=True):
            for state, i in zip(own.blocks, kept, strict=True):
                target = taught.blocks[i].to(state.dtype)
                if self.distance is not distances.relation:  # which compares what widths may differ in
                    target = F.linear(target, self.down)
                yield self.distance(state, target, taught.mask)
