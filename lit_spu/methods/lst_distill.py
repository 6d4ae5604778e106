"""LST distillation: the frozen backbone teaches a narrow student, which then works without it.

From the project's slides and the k-LST report. The student is the side network of ladder side-tuning with embeddings of
its own and without rungs. The backbone's hidden states, which rungs would read, are targets for the student's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import record_function

from lit_spu.backbones import Batch, HiddenStates
from lit_spu.errors import UserError
from lit_spu.methods.frozen import HiddenStateReader
from lit_spu.nn import distances, pruning
from lit_spu.nn.ladder import select_layers
from lit_spu.ranges import Count, CountOrZero, Length, Positive, PositiveOrZero


class LSTDistillation(HiddenStateReader):
    """Train a narrow student by the task, and by the hidden states and logits of its teacher, the frozen backbone.

    loss = task + λ·mean_i dist(s_i, D h_i) + μ·T²·KL(logits), where s_i is the output of a block of the student, h_i
    that of its counterpart in the teacher, and D a fixed projection to the student's width. For a regression, the
    squared error takes the place of T²·KL.

    Args:
        reduction: The backbone's width divided by the student's (r).
        drop_layers: Blocks of the teacher without a counterpart in the student, in every stack; 0 is the lowest.
        init: Initial weights of the student. `magnitude` keeps the teacher's greatest weights, 1/r of each width, and D
            selects the kept coordinates. With `random`, D is random as well.
        hidden_states_weight: λ.
        logits_weight: μ. The teacher must know the task: by a prompt, or as a fine-tuned classifier in `backbone`.
        temperature: T.
        distance: Distance of hidden states: the squared error divided by the teacher's variance, one minus the cosine,
            or the divergence of the relations between tokens, which needs no D.

    Raises:
        UserError: If a number is out of range, or the teacher has no logits to learn from.
    """

    down: Tensor

    def __init__(
        self,
        reduction: Count = 4,
        drop_layers: Annotated[Sequence[CountOrZero], Length()] = (),
        init: Literal["magnitude", "random"] = "magnitude",
        hidden_states_weight: PositiveOrZero = 1.0,
        logits_weight: PositiveOrZero = 0.0,
        temperature: Positive = 2.0,
        distance: Literal["mse", "cosine", "relation"] = "mse",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.backbone.requires_grad_(False)
        if init == "magnitude" and kwargs.get("backbone_precision") == "int8":
            raise UserError("model.init=magnitude cannot prune weights in int8: use bf16 or fp32, or init=random.")
        if logits_weight:
            self.backbone.check_knows_answers(
                f"model.logits_weight={logits_weight}",
                "Its logits would be random: use a fine-tuned model as --model.backbone (lit-spu export --format merged"
                " writes one), --model.head=prompt, or --model.logits_weight=0.",
            )
        self.hidden_states_weight, self.logits_weight = hidden_states_weight, logits_weight
        self.temperature, self.distance = temperature, getattr(distances, distance)
        self.layer_indices = select_layers(self.backbone.stacks, drop_layers)
        self.student = self.backbone.make_student(reduction, self.layer_indices)
        # D follows from the settings, so checkpoints do not save it
        width, narrow = self.backbone.stacks[0].width, self.student.stacks[0].width
        if init == "magnitude":
            student, teacher = self.student.base_model, self.backbone.base_model
            importance = pruning.magnitude(teacher)
            coordinates = pruning.init_from_pruned(student, teacher, self.layer_indices, importance)
            down = F.one_hot(coordinates, width).float()
        else:
            down = torch.randn(narrow, width, generator=torch.Generator().manual_seed(0)) * width**-0.5
        self.register_buffer("down", down, persistent=False)

    def logits_from(self, hidden_states: Sequence[HiddenStates], batch: Batch) -> Tensor:
        """Return the student's logits, which do not depend on the backbone's hidden states."""
        with record_function("student"):
            logits: Tensor = self.student(batch)
        return logits

    def forward(self, batch: Batch, hidden_states: Sequence[HiddenStates] | None = None) -> Tensor:
        """Return the student's logits [batch, labels], without a pass of the backbone."""
        return self.logits_from((), batch)

    def loss(self, batch: Batch, hidden_states: Sequence[HiddenStates] | None = None) -> Tensor:
        with record_function("student"):
            student_states = self.student.hidden_states(batch)
            logits = self.student.logits_from(student_states, batch)
        loss = self.student.loss(logits, batch)
        if not self.hidden_states_weight and not self.logits_weight:
            return loss
        teacher_states = hidden_states or self.hidden_states(batch)
        if self.hidden_states_weight:
            found = torch.stack([*self._distances(student_states, teacher_states)])
            loss = loss + self.hidden_states_weight * found.mean()
        if self.logits_weight:
            with torch.no_grad():
                teacher_logits = self.backbone.logits_from(teacher_states, batch)
            loss = loss + self.logits_weight * self._logits_distance(logits, teacher_logits)
        return loss

    def _logits_distance(self, student: Tensor, teacher: Tensor) -> Tensor:
        if self.task.regression:
            return F.mse_loss(student, teacher)
        return distances.divergence(student, teacher, self.temperature)

    def _distances(self, student: Sequence[HiddenStates], teacher: Sequence[HiddenStates]) -> Iterator[Tensor]:
        """Yield the distance of the output of each of the student's blocks from its counterpart in the teacher."""
        for student_stack, teacher_stack, indices in zip(student, teacher, self.layer_indices, strict=True):
            for state, i in zip(student_stack.blocks, indices, strict=True):
                target = teacher_stack.blocks[i].to(state.dtype)
                if self.distance is not distances.relation:  # the relation compares states of different widths
                    target = F.linear(target, self.down)
                yield self.distance(state, target, teacher_stack.mask)
