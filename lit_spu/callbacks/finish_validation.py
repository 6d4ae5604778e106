"""Repeat a validation that was interrupted, and validate after the last step."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class FinishValidation(Callback):
    """Callback that repeats an interrupted validation from its first batch when the run is resumed.

    Lightning would continue with the next epoch, or validate on the remaining batches alone and report the result as
    the epoch's metrics. A run that ends within an epoch, by `max_steps`, is validated after its last step.
    """

    def __init__(self) -> None:
        self._is_validating = False
        self._logged_steps: int | None = None

    def state_dict(self) -> dict[str, Any]:
        """Return whether a validation is running."""
        return {"is_validating": self._is_validating}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        loops = checkpoint["loops"]["fit_loop"]
        batches = loops["epoch_loop.batch_progress"]["total"]
        if batches["processed"] < batches["started"]:  # interrupted within a step, which is repeated
            self._logged_steps = loops["epoch_loop.state_dict"]["_batches_that_stepped"]
        if checkpoint["callbacks"].get(self.state_key, {}).get("is_validating"):
            progress = loops["epoch_loop.val_loop.batch_progress"]
            for counts in (progress["total"], progress["current"]):
                # as though the first batch had been interrupted: Lightning then validates from this batch on
                counts |= {"ready": 1, "started": 1, "processed": 0, "completed": 0}

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if self._logged_steps is not None:  # Lightning counts the repeated step twice in the loggers' steps
            trainer.fit_loop.epoch_loop._batches_that_stepped = self._logged_steps
            self._logged_steps = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == trainer.max_steps:
            trainer.should_stop = True  # Lightning validates then, also within an epoch

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._is_validating = not trainer.sanity_checking

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._is_validating = False
