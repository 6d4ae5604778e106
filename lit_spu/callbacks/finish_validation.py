"""A validation that was interrupted is not lost."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class FinishValidation(Callback):
    """Validates anew when a run is resumed that was interrupted while it validated.

    Lightning would go on with the next epoch, or validate on the examples alone that were left, and take what it finds
    there for the epoch's score.
    """

    def __init__(self) -> None:
        self._midway = False

    def state_dict(self) -> dict[str, Any]:
        """Whether a validation is going on."""
        return {"midway": self._midway}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if checkpoint["callbacks"].get(self.state_key, {}).get("midway"):
            progress = checkpoint["loops"]["fit_loop"]["epoch_loop.val_loop.batch_progress"]
            for counts in (progress["total"], progress["current"]):  # in the middle of the first batch
                counts |= {"ready": 1, "started": 1, "processed": 0, "completed": 0}

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._midway = not trainer.sanity_checking

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._midway = False
