"""LR distillation: a step's learning rate depends on the distance between the student's and a teacher's logits.

From the project's slides. There it was no better than fine-tuning, so compare it with `control`: a plain schedule with
the same mean learning rate.
"""

from __future__ import annotations

from glob import glob
from pathlib import Path
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from lit_spu.backbones import Batch
from lit_spu.errors import UserError
from lit_spu.methods.base import Method
from lit_spu.methods.teacher import Teacher
from lit_spu.nn import distances
from lit_spu.ranges import Count, Positive, PositiveOrZero, Text
from lit_spu.safe_yaml import parse_json

MIN_DISTANCE = 1e-6
"""Smaller distances count as 0: they are rounding errors, which may be negative or become the divisor d_0."""

_SAVED = ("reference_distance", "num_reference_steps", "scaled_lr_sum", "plain_lr_sum", "num_skipped")
"""Attributes that a checkpoint saves."""


class LRDistillation(Method):
    """Train every weight with the task's loss alone, at lr_t = schedule(t) · clip(d_t / d_0, min_factor, max_factor).

    d_t is the distance between the student's and the teacher's logits on the batch. d_0, the reference distance, is its
    mean over the first steps. The teacher's logits of all training examples are computed once, before training. The
    updates of Adafactor and AdamW are proportional to lr_t.

    Args:
        teacher: A run directory, a checkpoint or an export of a method; or a Hugging Face folder or name. Its family,
            size and tokenizer may differ from the student's.
        distance: Distance of logits: the divergence of the softened distributions, the mean squared error, or one minus
            the cosine. For a regression, with its single logit, it must be mse.
        temperature: Temperature of the softened distributions in the divergence.
        reference_steps: Number of steps that d_0 is the mean of. During these steps, it is the mean so far.
        min_factor: Smallest factor on the learning rate.
        max_factor: Largest factor on the learning rate.
        skip_below: Skip the backward pass and the step if d_t is smaller than this; on one device only.
        schedule: Linear warm-up and decay, or a constant learning rate, which the distance alone then changes.
        control: A run directory, or a glob pattern of one. Train without a teacher, and multiply every step's learning
            rate by the mean factor of that run, which makes the mean learning rates equal.

    Raises:
        UserError: If a number is out of range. In `setup`, if there is no such teacher, if it was trained for other
            labels or cannot read the data, or if `control` is not a finished run of LR distillation.
    """

    teacher_logits: Tensor
    """The teacher's logits of all training examples, [examples, labels]; set while it trains."""

    def __init__(
        self,
        teacher: Text,
        distance: Literal["divergence", "mse", "cosine"] = "divergence",
        temperature: Positive = 1.0,
        reference_steps: Count = 20,
        min_factor: PositiveOrZero = 0.0,
        max_factor: PositiveOrZero = 2.0,
        skip_below: PositiveOrZero = 0.0,
        schedule: Literal["linear", "constant"] = "linear",
        control: Text | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if min_factor > max_factor:
            raise UserError(f"model.min_factor={min_factor} must be at most model.max_factor={max_factor}.")
        if self.task.regression and distance != "mse":
            raise UserError(
                f"model.distance={distance}: {self.task.name} is a regression with one logit, for which only mse works."
            )
        self.distance, self.temperature, self.reference_steps = distance, temperature, reference_steps
        self.min_factor, self.max_factor, self.skip_below = min_factor, max_factor, skip_below
        self.schedule, self.teacher, self.control = schedule, teacher, control
        self.control_factor: float | None = None
        self.reference_distance, self.num_reference_steps = 0.0, 0  # d_0, and the number of steps in this mean
        self.scaled_lr_sum = self.plain_lr_sum = 0.0  # sums of the learning rates with the factor and without it
        self.num_skipped = 0
        self._step_factors: list[float] = []  # of this step's batches so far; several if gradients are accumulated
        self._scheduled_lrs: list[float] = []  # each parameter group's learning rate without the factor

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage != "fit":
            return
        if self.skip_below and self.trainer.world_size > 1:
            raise UserError(
                f"model.skip_below={self.skip_below}: several devices cannot skip a backward pass. Use one device"
                " (--trainer.devices 1), or 0."
            )
        if self.control:
            self.control_factor = _read_mean_factor(self.control)
            return
        data = getattr(self.trainer, "datamodule", None)
        device = self.trainer.strategy.root_device
        self.teacher_logits = Teacher(self.teacher, self.task).compute_logits(data, device)

    def step_loss(self, batch: Batch) -> Tensor | None:
        logits = self(batch)
        loss = self.backbone.loss(logits, batch)
        self.log_loss(loss)
        groups = self.trainer.optimizers[0].param_groups
        if not self._step_factors:
            self._scheduled_lrs = [group["lr"] for group in groups]
        factor = self.control_factor
        if factor is None:
            distance = self._distance(logits.detach(), batch)
            self.log_step("distance", distance)
            if distance < self.skip_below:
                self.num_skipped += 1
                self.log_step("train/skipped", self.num_skipped)
                return None
            factor = self._factor(distance)
        self._step_factors.append(factor)
        mean_factor = sum(self._step_factors) / len(self._step_factors)
        for group, lr in zip(groups, self._scheduled_lrs, strict=True):
            group["lr"] = lr * mean_factor
        self.log_step("lr", groups[0]["lr"])
        self.log_step("lr/factor", mean_factor)
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        self.plain_lr_sum += self._scheduled_lrs[0]
        self.scaled_lr_sum += optimizer.param_groups[0]["lr"] if self._step_factors else 0.0  # 0 for a skipped step
        self.log_step("lr/mean_factor", self.scaled_lr_sum / self.plain_lr_sum if self.plain_lr_sum else 0.0)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Take a step, and restore the scheduled learning rates."""
        super().optimizer_step(*args, **kwargs)
        for group, lr in zip(self.trainer.optimizers[0].param_groups, self._scheduled_lrs, strict=True):
            group["lr"] = lr
        self._step_factors = []

    def _distance(self, logits: Tensor, batch: Batch) -> float:
        """Return the distance of logits [batch, labels] from the teacher's, averaged over the ranks."""
        teacher_logits = self.teacher_logits[batch["index"]].to(logits.dtype)
        if self.distance == "divergence":
            on_rank = distances.divergence(logits, teacher_logits, self.temperature)
        elif self.distance == "mse":
            on_rank = F.mse_loss(logits, teacher_logits)
        else:
            on_rank = 1 - F.cosine_similarity(logits, teacher_logits, dim=-1).mean()
        distance = float(self.trainer.strategy.reduce(on_rank, reduce_op="mean"))
        return 0.0 if distance < MIN_DISTANCE else distance

    def _factor(self, distance: float) -> float:
        """Return the factor on the learning rate for a distance. The first distances also update d_0."""
        if self.num_reference_steps < self.reference_steps:
            self.num_reference_steps += 1
            self.reference_distance += (distance - self.reference_distance) / self.num_reference_steps
        ratio = distance / self.reference_distance if self.reference_distance else 0.0
        return min(self.max_factor, max(self.min_factor, ratio))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["lr_distillation"] = {name: getattr(self, name) for name in _SAVED}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        for name in _SAVED:
            setattr(self, name, checkpoint["lr_distillation"][name])


def _read_mean_factor(run: str) -> float:
    """Return the mean factor on the learning rate of a run, or of the last run that a pattern matches."""
    summary = Path(max(glob(run), default=run)) / "summary.json"
    try:
        return float(parse_json(summary.read_text())["metrics"]["lr/mean_factor"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"model.control: {run} is not the directory of a finished run of LRDistillation (no lr/mean_factor in"
            f" {summary})."
        ) from error
