"""Output shared by callbacks and methods: figures for the loggers, and the run directory."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer


def log_now(trainer: Trainer, figures: Mapping[str, float]) -> None:
    """Send figures of rank zero to the loggers unchanged, at the current step.

    `LightningModule.log` would round counts to float32. At the end of an epoch it would also reduce over the ranks,
    which hangs if a rank has nothing to report.
    """
    for logger in trainer.loggers if figures and not trainer.sanity_checking else ():
        logger.log_metrics(dict(figures), step=trainer.global_step)


def is_step_logged(trainer: Trainer) -> bool:
    """Return whether the values of this training batch are read: by the loggers, or after the epoch or the run.

    Callbacks and methods log nothing in all other batches, because Lightning makes tensors of values and reads them.
    """
    return bool(
        trainer._logger_connector.should_update_logs  # Lightning's own rule, which its callbacks read there, too
        or trainer.is_last_batch
        or trainer.global_step == trainer.max_steps
        or trainer.fast_dev_run  # type: ignore[attr-defined]
    )


def read_interval(trainer: Any) -> int:
    """Return the number of batches between two reads of values that stay on the device."""
    return getattr(trainer, "log_every_n_steps", 0) or 50  # 0 logs nothing; 50 is the Trainer's default


def has_replayed(pl_module: Any) -> bool:
    """Return whether the last step of a module was replayed as a CUDA graph."""
    graphs = getattr(pl_module, "graphs", None)
    return graphs is not None and graphs.has_replayed


def monitored_names(trainer: Trainer) -> set[str]:
    """Return the names of the values that callbacks and learning-rate schedules monitor, or put into file names."""
    names = {config.monitor for config in trainer.lr_scheduler_configs}
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        names.add(getattr(callback, "monitor", None))
        names.update(re.findall(r"{(.*?)[:}]", str(getattr(callback, "filename", ""))))
    return {name for name in names if name}


def log_figures(pl_module: LightningModule, figures: Mapping[str, float]) -> None:
    """Log figures of a training batch, at its end. Call it if `is_step_logged`."""
    pl_module.log_dict({name: on_host(value) for name, value in figures.items()}, on_step=True, on_epoch=False)


def on_host(value: float | torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return a number as a tensor on the host, to be logged: Lightning would copy a number to the device and back."""
    return torch.as_tensor(value, dtype=dtype, device="cpu")


def run_directory(trainer: Trainer) -> Path:
    """Return the directory that a run writes into. Call it on every rank, because Lightning broadcasts the path."""
    return Path(trainer.log_dir or trainer.default_root_dir)
