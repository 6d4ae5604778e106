"""What a run that was stopped goes on from."""

from __future__ import annotations

import time
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class LastCheckpoint(ModelCheckpoint):
    """`last.ckpt`: the state behind an epoch, behind the last one always, and at an interruption.

    Epochs may be of one batch, as with a few examples a label. Those that end sooner than twenty times what saving
    takes are passed over, so that no more than a twentieth of the time goes into it.

    A callback of its own, for `save_last` of the one that keeps the best would save when there is a new best one only.

    Args:
        folder: Where it lies.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(
            folder, "last", save_on_exception=True, save_on_train_epoch_end=True, enable_version_counter=False
        )
        self._saved = self._took = 0.0

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        began = time.monotonic()
        ends = (
            trainer.should_stop
            or trainer.global_step == trainer.max_steps
            or trainer.current_epoch + 1 == trainer.max_epochs
        )
        if trainer.strategy.broadcast(ends or began - self._saved >= 20 * self._took):
            super().on_train_epoch_end(trainer, pl_module)
            self._saved = time.monotonic()
            self._took = self._saved - began
