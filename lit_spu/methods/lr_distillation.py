"""LR distillation: a teacher says how large a step is, by how far the student's answers are from its own.

From the project's slides, which found it no better than fine-tuning: compare it with its control, a plain schedule of
the same mean learning rate (`control`).
"""

from __future__ import annotations

import json
from glob import glob
from pathlib import Path
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor

from lit_spu.backbones import Batch
from lit_spu.errors import UserError
from lit_spu.methods.base import Method
from lit_spu.methods.teacher import Teacher
from lit_spu.nn import distances

NOTHING = 1e-6
"""A distance below is none: what rounding leaves of it may be less than 0, or divided by as much."""


class LRDistillation(Method):
    """Train every weight by lr_t = schedule(t) · clip(d_t / d_0, low, high), and by the task's loss alone.

    d_t is the distance of the student's scores of a batch from its teacher's, which are computed once for all examples,
    and d_0 its mean over the first steps. What Adafactor and AdamW move a weight by is in proportion to lr_t.

    Args:
        teacher: Who knows the task: a run directory, a checkpoint or an export of a method; or a Hugging Face folder or
            name. It may be of another family and size, and have another tokenizer.
        distance: Of scores: the divergence of the softened ones, the mean squared error, or one minus the cosine. Of a
            task without labels, where there is one score, it must be the error.
        temperature: How soft the scores are made for the divergence.
        reference: How many steps d_0 is the mean of; meanwhile, of those so far.
        low: Least factor.
        high: Greatest factor.
        skip_below: Where d_t is less, there is no backward pass and no step; on one device.
        schedule: Linear warm-up and decay, or a constant rate, so that the distance alone makes it fall.
        control: Instead of a teacher's, the mean factor of another run (its directory, or a pattern of it), in every
            step: the same mean learning rate.

    Raises:
        UserError: if a number is out of range; before training, if there is no such teacher, it was trained for other
            labels or cannot read the data, or `control` is no run of LR distillation.
    """

    answers: Tensor
    """The teacher's, [examples, labels], while it trains."""

    def __init__(
        self,
        teacher: str,
        distance: Literal["divergence", "mse", "cosine"] = "divergence",
        temperature: float = 1.0,
        reference: int = 20,
        low: float = 0.0,
        high: float = 2.0,
        skip_below: float = 0.0,
        schedule: Literal["linear", "constant"] = "linear",
        control: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not 0 <= low <= high or reference < 1 or temperature <= 0 or skip_below < 0:
            raise UserError(
                f"model.low={low} and model.high={high} must be 0 or more, in this order, model.reference={reference}"
                f" at least 1, model.temperature={temperature} above 0, and model.skip_below={skip_below} at least 0."
            )
        if self.task.regression and distance != "mse":
            raise UserError(f"model.distance={distance}: {self.task.name} has one score, of which only mse can tell.")
        self.distance, self.temperature, self.reference = distance, temperature, reference
        self.low, self.high, self.skip_below, self.schedule = low, high, skip_below, schedule
        self.teacher, self.control = teacher, control
        self.mean_factor: float | None = None
        self.start, self.steps_seen = 0.0, 0  # d_0, and how many steps it is the mean of
        self.scaled = self.plain = 0.0  # the sums of the learning rate with the factor and without
        self.skipped = 0
        self._pending: list[float] = []  # factors of the batches of a step
        self._scheduled: list[float] = []

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if stage != "fit":
            return
        if self.skip_below and self.trainer.world_size > 1:
            raise UserError("model.skip_below: several devices cannot leave out a backward pass. Use one, or 0.")
        if self.control:
            self.mean_factor = _mean_factor(self.control)
            return
        data = getattr(self.trainer, "datamodule", None)
        self.answers = Teacher(self.teacher, self.task).answers(data, self.trainer.strategy.root_device)

    def step_loss(self, batch: Batch) -> Tensor | None:
        scores = self(batch)
        loss = self.backbone.loss(scores, batch)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["input_ids"]))
        groups = self.trainer.optimizers[0].param_groups
        if not self._pending:
            self._scheduled = [group["lr"] for group in groups]
        factor = self.mean_factor
        if factor is None:
            distance = self._distance(scores.detach(), batch)
            self.log("distance", distance, batch_size=len(batch["input_ids"]))
            if distance < self.skip_below:
                self.skipped += 1
                self.log("train/skipped", float(self.skipped))
                return None
            factor = self._factor(distance)
        self._pending.append(factor)
        mean = sum(self._pending) / len(self._pending)
        for group, lr in zip(groups, self._scheduled, strict=True):
            group["lr"] = lr * mean
        self.log_dict({"lr": groups[0]["lr"], "lr/factor": mean})
        return loss

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, and give the schedule its rate back."""
        super().optimizer_step(*args, **kwargs)
        groups = self.trainer.optimizers[0].param_groups
        taken = bool(self._pending)
        self.plain += self._scheduled[0]
        self.scaled += groups[0]["lr"] if taken else 0.0
        self.log("lr/mean_factor", self.scaled / self.plain if self.plain else 0.0)
        for group, lr in zip(groups, self._scheduled, strict=True):
            group["lr"] = lr
        self._pending = []

    def _distance(self, scores: Tensor, batch: Batch) -> float:
        """How far the scores [batch, labels] of all ranks are from the teacher's."""
        theirs = self.answers[batch["index"]].to(scores.dtype)
        if self.distance == "divergence":
            found = distances.divergence(scores, theirs, self.temperature)
        elif self.distance == "mse":
            found = F.mse_loss(scores, theirs)
        else:
            found = 1 - F.cosine_similarity(scores, theirs, dim=-1).mean()
        distance = float(self.trainer.strategy.reduce(found, reduce_op="mean"))
        return 0.0 if distance < NOTHING else distance

    def _factor(self, distance: float) -> float:
        """What a distance makes of the learning rate."""
        if self.steps_seen < self.reference:
            self.steps_seen += 1
            self.start += (distance - self.start) / self.steps_seen
        return min(self.high, max(self.low, distance / self.start if self.start else 0.0))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["lr_distillation"] = [self.start, self.steps_seen, self.scaled, self.plain, self.skipped]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.start, self.steps_seen, self.scaled, self.plain, self.skipped = checkpoint["lr_distillation"]


def _mean_factor(run: str) -> float:
    """The mean factor of a run's learning rate; of several that a pattern matches, of the last."""
    summary = Path(max(glob(run), default=run)) / "summary.json"
    try:
        factor: float = json.loads(summary.read_text())["metrics"]["lr/mean_factor"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"model.control: {run} is not the directory of a run of LRDistillation that ended.") from error
    return factor
