"""The checkpoint from which a stopped run is resumed."""

from __future__ import annotations

import time
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_spu.callbacks.first_step import FirstStep
from lit_spu.errors import UserError
from lit_spu.ranges import Checked

SAVE_INTERVAL = 20
"""Least time between two saves, in multiples of the time that the last save took: at most 5 % of a run is saving."""


class LastCheckpoint(Checked, FirstStep, ModelCheckpoint):
    """Callback that saves `last.ckpt` after epochs, always after the last one, and at an interruption.

    An epoch may consist of one batch, as with a few examples per label. Epochs that end soon after a save are therefore
    skipped (see `SAVE_INTERVAL`).

    This is a separate callback because `save_last` of the callback that saves the best checkpoint only saves when there
    is a new best one. An interruption or a failure before the first step of a launch saves nothing: what was loaded
    may differ from the checkpoint in its place. Errors of the user, such as a full disk or a loss of NaN, save nothing
    either.

    Args:
        folder: Folder of `last.ckpt`.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(
            folder, "last", save_on_exception=True, save_on_train_epoch_end=True, enable_version_counter=False
        )
        self._saved_at = self._save_seconds = 0.0

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do nothing at once: epochs and interruptions save."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        now = time.monotonic()
        is_last_epoch = (
            trainer.should_stop
            or trainer.global_step == trainer.max_steps
            or trainer.current_epoch + 1 == trainer.max_epochs
        )
        is_due = now - self._saved_at >= SAVE_INTERVAL * self._save_seconds
        self._begin_once(trainer, pl_module)
        if trainer.strategy.broadcast(is_last_epoch or is_due):  # ranks must agree: all of them take part in saving
            super().on_train_epoch_end(trainer, pl_module)
            self._saved_at = time.monotonic()
            self._save_seconds = self._saved_at - now

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self.has_begun and not isinstance(exception, UserError):  # the checkpoint in its place is a good one
            super().on_exception(trainer, pl_module, exception)
