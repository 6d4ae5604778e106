"""What the callbacks log between steps."""

from __future__ import annotations

from collections.abc import Mapping

from lightning.pytorch import Trainer


def log_now(trainer: Trainer, figures: Mapping[str, float]) -> None:
    """Hand figures of rank zero to the loggers as they are.

    `LightningModule.log` would round counts to float32 and, at the end of an epoch, ask for a reduction over the ranks,
    which hangs where a rank has nothing to report.
    """
    for logger in trainer.loggers if figures and not trainer.sanity_checking else ():
        logger.log_metrics(dict(figures), step=trainer.global_step)
