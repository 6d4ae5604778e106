"""Summary of a run, as a file and as a table."""

from __future__ import annotations

import json
import math
import platform
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

from lit_spu.callbacks.first_step import FirstStep
from lit_spu.callbacks.output import run_directory
from lit_spu.checkpoints.run_dir import read_summary
from lit_spu.console import make_console
from lit_spu.files import write_text
from lit_spu.version import __version__

PACKAGES = ("torch", "lightning", "transformers")

TABLE = (
    "memory/peak_mib",
    "memory/live_peak_mib",
    "latency/step_ms",
    "latency/forward_ms",
    "latency/inference_ms",
    "params/trainable",
)
"""Measurements of other callbacks in the closing table; the file has all of them."""


class RunSummary(FirstStep):
    """Callback that writes `summary.json` after fit, validate or test, and prints a closing table.

    A launch that ends before its first step writes nothing. The file is in the run directory. It has `status`
    (`completed`, `interrupted`, or `failed` with an `error`), `command`, `metrics` (the last values), `measured` (the
    `summary` of every other callback: memory in MiB, latency in ms, parameters), `monitor`, `best_score`,
    `best_checkpoint`, `steps`, `epochs`, `wall_seconds`, `device`, `devices` and `versions`. TensorBoard gets the
    method's settings together with the score and the measurements of the closing table, as `final/…`. Validate and test
    add their results to the file of a fit in the same directory, and do not change the rest of it.

    After an interruption or an error, the loss and the learning rate in `metrics` are those of the last logged step: a
    device that failed is not waited for.
    """

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._start_time = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self._start_time = time.perf_counter()

    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._folder = run_directory(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._write(trainer, "completed")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, KeyboardInterrupt | SystemExit):  # the latter includes Lightning's SIGTERMException
            self._write(trainer, "interrupted")
        else:
            self._write(trainer, "failed", f"{type(exception).__name__}: {exception}")

    def _write(
        self, trainer: Trainer, status: Literal["completed", "interrupted", "failed"], error: str | None = None
    ) -> None:
        folder, self._folder = self._folder, None  # so that it is written only once
        command = trainer.state.fn
        is_trial = trainer.fast_dev_run  # type: ignore[attr-defined]
        if not folder or is_trial or not command or command == "predict" or not trainer.is_global_zero:
            return
        record = self._record(trainer) | {"status": status, "command": str(command.value)}
        if error:
            record["error"] = error
        if command == "fit" and trainer.loggers:
            _log_settings(trainer, record)
        if command != "fit" and (fit := read_summary(folder)):
            record = fit | {key: fit.get(key, {}) | record[key] for key in ("metrics", "measured")}
        write_text(folder / "summary.json", json.dumps(record, indent=2) + "\n")
        if status != "failed":  # the error message should be the last output
            _print(f"{command.value} {status}", record, folder)

    def _record(self, trainer: Trainer) -> dict[str, Any]:
        """Return the fields of the file that describe the run so far."""
        device = trainer.strategy.root_device
        best = trainer.checkpoint_callback
        best = best if isinstance(best, ModelCheckpoint) else None
        measured = {
            name: value
            for callback in trainer.callbacks  # type: ignore[attr-defined]
            for name, value in getattr(callback, "summary", {}).items()
        }
        return {
            "metrics": {
                name: _finite(value.item()) for name, value in trainer.callback_metrics.items() if name not in measured
            },
            "measured": {name: _finite(value) for name, value in measured.items()},
            "monitor": best.monitor if best else None,
            "best_score": _finite(float(best.best_model_score)) if best and best.best_model_score is not None else None,
            "best_checkpoint": (best.best_model_path or None) if best else None,
            "steps": trainer.global_step,
            "epochs": trainer.current_epoch,
            "wall_seconds": time.perf_counter() - self._start_time,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device} {platform.machine()}",
            "devices": trainer.world_size,
            "versions": {
                "python": platform.python_version(),
                "lit-spu": __version__,
                **{package: version(package) for package in PACKAGES},
            },
        }


def _log_settings(trainer: Trainer, record: dict[str, Any]) -> None:
    """Log the settings with the final results to TensorBoard, which compares runs in a table."""
    module = trainer.lightning_module
    final = {"score": record["best_score"]} | {name: record["measured"].get(name) for name in TABLE}
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.log_hyperparams(
                {"method": type(module).__name__, **module.hparams},
                {f"final/{name}": value for name, value in final.items() if value is not None},
                step=trainer.global_step,
            )


def _finite(value: float) -> float | None:
    """Return None instead of NaN or infinity, which JSON does not have."""
    return value if math.isfinite(value) else None


def _print(title: str, record: dict[str, Any], folder: Path) -> None:
    from rich.table import Table

    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(justify="right")
    rows = {name: value for name, value in record["metrics"].items() if name.startswith(("val/", "test/"))}
    if record["best_score"] is not None:
        rows[f"best {record['monitor']}"] = record["best_score"]
    rows |= {name: record["measured"][name] for name in TABLE if name in record["measured"]}
    rows["wall_seconds"] = record["wall_seconds"]
    for name, value in rows.items():
        table.add_row(name, _format(value))
    console = make_console()
    console.print(table)
    console.print(f"Run directory: {folder}", soft_wrap=True)


def _format(value: float | None) -> str:
    """Format a number for the table: counts in full, others with four digits."""
    if value is None:
        return "–"
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:.4g}"
