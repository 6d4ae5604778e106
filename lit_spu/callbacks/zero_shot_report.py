"""Report of the score before training, compared with that of constant answers."""

from __future__ import annotations

import math
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_spu.tasks.metrics import CALIBRATED, format_score, task_metrics


class ZeroShotReport(Callback):
    """Callback that logs `zero_shot/<metric>` of the sanity check before training, and warns if it is at chance.

    It needs a sanity check of the whole validation set (`trainer.num_sanity_val_steps: -1`). Chance is the best score
    of a constant answer. A score below chance + 1/√n, for n validation examples, counts as chance: 1/√n is at least two
    standard errors of an accuracy. The score of calibrated label words is logged beside it, as
    `zero_shot/<metric>_calibrated`.
    """

    def __init__(self) -> None:
        self.score: float | None = None
        self.calibrated: float | None = None
        self._constant_answers: list[Any] = []  # metrics by label
        self._num_examples = 0

    def state_dict(self) -> dict[str, Any]:
        """Return the scores, which a resumed run keeps: it does not begin before training."""
        return {"score": self.score, "calibrated": self.calibrated}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.score, self.calibrated = state_dict["score"], state_dict.get("calibrated")

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: Any,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not trainer.sanity_checking or dataloader_idx or trainer.global_step:
            return
        labels, task = batch["labels"], pl_module.task
        if not self._constant_answers:
            self._constant_answers = [task_metrics(task).to(pl_module.device) for _ in task.labels]
        self._num_examples += len(labels) * trainer.world_size
        for label, metrics in enumerate(self._constant_answers):
            for name in task.metrics:
                metrics[name].update(torch.full_like(labels, label), labels)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        is_whole = trainer.num_sanity_val_batches == trainer.num_val_batches
        if trainer.sanity_checking and is_whole and not trainer.global_step:
            metric, metrics = pl_module.task.metrics[0], pl_module.metrics["val/"]
            self.score = float(metrics[metric].compute())
            if f"{metric}{CALIBRATED}" in metrics:
                self.calibrated = float(metrics[f"{metric}{CALIBRATED}"].compute())
            self._report(metric, self.score)

    def _report(self, metric: str, score: float) -> None:
        chance = max((float(metrics[metric].compute()) for metrics in self._constant_answers), default=0.0)
        calibrated = "" if self.calibrated is None else f" ({format_score(self.calibrated)} calibrated)"
        scores = f"{format_score(score)}{calibrated}; a constant answer has {format_score(chance)}"
        text = f"Before training, {metric} is {scores}."
        if score > chance + 1 / math.sqrt(self._num_examples):
            rank_zero_info(text)
        else:
            rank_zero_warn(
                f"{text} MeZO needs a prompt that the model can answer before training. Check that the language-model"
                " head is pretrained, and that data.template fits the task."
            )

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        for suffix, score in (("", self.score), (CALIBRATED, self.calibrated)):
            if score is not None:
                pl_module.log(f"zero_shot/{pl_module.task.metrics[0]}{suffix}", score)
