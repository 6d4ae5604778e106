"""LST distillation: the side network learns to work without the backbone.

From the project's slides and the k-LST report. The student is ladder side-tuning's side network with its own embeddings
and without rungs: the hidden state that a rung would read at block i is the target of the student's state there. The
trained student is a small model that needs no backbone.
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
from lit_spu.methods.frozen import HiddenStateReader
from lit_spu.nn import distances, pruning
from lit_spu.nn.ladder import select_layers


class LSTDistillation(HiddenStateReader):
    """Train a narrow student by the task, and by the hidden states and logits of its frozen teacher.

    loss = task + λ·mean_i dist(s_i, D_i h_i) + μ·T²·KL(logits), where s_i and h_i are the outputs of the student's and
    the teacher's block i, and D_i is fixed.

    Args:
        reduction: The backbone's width divided by the student's (r).
        drop_layers: Blocks of the teacher without a counterpart in the student, in every stack; 0 is the lowest.
        init: The student's initial weights: the greatest 1/r of each of the teacher's widths, or random. D then selects
            the coordinates that are kept, or is random as well.
        hidden_states_weight: λ.
        logits_weight: μ. The teacher must know the task: by a prompt, or as a fine-tuned classifier in `backbone`.
        temperature: T.
        distance: Distance of hidden states: the squared error over the teacher's variance, the cosine, or the
            divergence of the relations between tokens, which needs no D.

    Raises:
        UserError: If a number is out of range, or the teacher has no logits to learn from.
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
                " logits are random. Use a fine-tuned model as --model.backbone (lit-spu export --format merged writes"
                " one), --model.head=prompt, or --model.logits_weight=0."
            )
        self.hidden_states_weight, self.logits_weight = hidden_states_weight, logits_weight
        self.temperature, self.distance = temperature, getattr(distances, distance)
        self.layer_indices = select_layers(self.backbone.stacks, drop_layers)
        self.student = self.backbone.make_student(reduction, self.layer_indices)
        # D follows from the settings, so no checkpoint needs to hold it
        width, narrow = self.backbone.stacks[0].width, self.student.stacks[0].width
        if init == "magnitude":
            student, teacher = self.student.base_model, self.backbone.base_model
            importance = pruning.magnitude(teacher)
            kept = pruning.init_from_pruned(student, teacher, self.layer_indices, importance)
            down = F.one_hot(kept, width).float()
        else:
            down = torch.randn(narrow, width, generator=torch.Generator().manual_seed(0)) * width**-0.5
        self.register_buffer("down", down, persistent=False)

    def logits_from(self, hidden_states: Sequence[HiddenStates], batch: Batch) -> Tensor:
        """Return the student's logits, which do not depend on the backbone's hidden states."""
        with record_function("student"):
            logits: Tensor = self.student(batch)
        return logits

    def forward(
        self, batch: Batch, hidden_states: Sequence[HiddenStates] | None = None, output_hidden_states: bool = False
    ) -> Any:
        """Return the student's logits [batch, labels], and its own hidden states if `output_hidden_states`."""
        if not output_hidden_states:
            return self.logits_from((), batch)
        with record_function("student"):
            own = self.student.hidden_states(batch)
            return self.student.logits_from(own, batch), own

    def loss(self, batch: Batch, hidden_states: Sequence[HiddenStates] | None = None) -> Tensor:
        logits, own = self(batch, output_hidden_states=True)
        loss = self.student.loss(logits, batch)
        if hidden_states is None and (self.hidden_states_weight or self.logits_weight):
            hidden_states = self.hidden_states(batch)
        hidden_states = hidden_states or ()
        if self.hidden_states_weight:
            distances_ = torch.stack([*self._distances(own, hidden_states)])
            loss = loss + self.hidden_states_weight * distances_.mean()
        if self.logits_weight:
            with torch.no_grad():
                teacher_logits = self.backbone.logits_from(hidden_states, batch)
            distill = (
                F.mse_loss if self.task.regression else partial(distances.divergence, temperature=self.temperature)
            )
            loss = loss + self.logits_weight * distill(logits, teacher_logits)
        return loss

    def _distances(self, student: Sequence[HiddenStates], teacher: Sequence[HiddenStates]) -> Iterator[Tensor]:
        """Return the distance of each of the student's blocks from its counterpart in the teacher."""
        for own, target_states, indices in zip(student, teacher, self.layer_indices, strict=True):
            for state, i in zip(own.blocks, indices, strict=True):
                target = target_states.blocks[i].to(state.dtype)
                if self.distance is not distances.relation:  # the relation compares states of different widths
                    target = F.linear(target, self.down)
                yield self.distance(state, target, target_states.mask)
