"""Progress bar with the training loss and the monitored metric."""

from __future__ import annotations

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar


class MetricProgressBar(RichProgressBar):
    """Lightning's Rich progress bar with the training loss and the metric that selects the best checkpoint."""

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return `train/loss` and the monitored metric, if they have been logged."""
        checkpoints = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
        names = ["train/loss", *(callback.monitor for callback in checkpoints if callback.monitor)]
        logged = trainer.callback_metrics
        return {name: logged[name].item() for name in dict.fromkeys(names) if name in logged}
