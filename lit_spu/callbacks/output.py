"""Output shared by the callbacks: figures for the loggers, and the run directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from lightning.pytorch import Trainer


def log_now(trainer: Trainer, figures: Mapping[str, float]) -> None:
    """Send figures of rank zero to the loggers unchanged, at the current step.

    `LightningModule.log` would round counts to float32. At the end of an epoch it would also reduce over the ranks,
    which hangs if a rank has nothing to report.
    """
    for logger in trainer.loggers if figures and not trainer.sanity_checking else ():
        logger.log_metrics(dict(figures), step=trainer.global_step)


def run_directory(trainer: Trainer) -> Path:
    """Return the directory that a run writes into. Call it on every rank, because Lightning broadcasts the path."""
    return Path(trainer.log_dir or trainer.default_root_dir)
