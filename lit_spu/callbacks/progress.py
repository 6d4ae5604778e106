"""Progress bar with the training loss and the monitored metric."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar

INTERVAL = 0.2
"""Seconds between two updates within an epoch. Rich draws less often, and an update takes time."""


class MetricProgressBar(RichProgressBar):
    """Lightning's Rich progress bar with the training loss and the metric that selects the best checkpoint.

    The loss is that of the last step that was logged.
    """

    _updated_at = 0.0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        """Update the bar, unless it was updated shortly before."""
        now = time.monotonic()
        if now - self._updated_at >= INTERVAL or trainer.is_last_batch or trainer.global_step == trainer.max_steps:
            self._updated_at = now
            super().on_train_batch_end(trainer, pl_module, *args)

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return `train/loss` and the monitored metric, if they have been logged."""
        checkpoints = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
        names = ["train/loss", *(callback.monitor for callback in checkpoints if callback.monitor)]
        logged = trainer.callback_metrics
        return {name: logged[name].item() for name in dict.fromkeys(names) if name in logged}
