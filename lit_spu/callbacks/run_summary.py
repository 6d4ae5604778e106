"""What a run came to, in a file and in a table."""

from __future__ import annotations

import json
import math
import platform
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger

PACKAGES = ("lit-spu", "torch", "lightning", "transformers")

TABLE = (
    "memory/peak_mib",
    "memory/live_peak_mib",
    "latency/step_ms",
    "latency/forward_ms",
    "latency/inference_ms",
    "params/trainable",
)
"""What other callbacks measured that the closing table shows; the file has all of it."""


class RunSummary(Callback):
    """Writes `summary.json` into the run directory after fit, validate or test, and prints a closing table.

    The file says: `status` (`completed`, `interrupted` or `failed`, then with the `error`), `command`, `metrics` (the
    last of each), `measured` (the `summary` of every other callback: memory in MiB, latency in ms, parameters),
    `monitor`, `best_score`, `best_checkpoint`, `steps`, `epochs`, `wall_seconds`, `device`, `devices` and `versions`.
    TensorBoard gets the settings of the method with the score and the figures of the closing table, as `final/…`.
    Validate and test add what they found to what a fit in the same directory wrote, and leave the rest of it.
    """

    def __init__(self) -> None:
        self._folder: Path | None = None
        self._began = 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._began = time.perf_counter()
        self._folder = Path(
            trainer.log_dir or trainer.default_root_dir
        )  # asked for on every rank: Lightning broadcasts

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._write(trainer, "completed")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if isinstance(exception, KeyboardInterrupt | SystemExit):  # Lightning's SIGTERMException is the latter
            self._write(trainer, "interrupted")
        else:
            self._write(trainer, "failed", f"{type(exception).__name__}: {exception}")

    def _write(
        self, trainer: Trainer, status: Literal["completed", "interrupted", "failed"], error: str | None = None
    ) -> None:
        folder, self._folder = self._folder, None
        command = trainer.state.fn
        if not folder or not command or command == "predict" or not trainer.is_global_zero:
            return
        path = folder / "summary.json"
        record = self._record(trainer) | {"status": status, "command": str(command.value)}
        if error:
            record["error"] = error
        if command == "fit" and trainer.loggers:
            _log_settings(trainer, record)
        if command != "fit" and path.exists():
            fit = json.loads(path.read_text())
            added = {key: fit[key] | record[key] for key in ("metrics", "measured")}
            record = fit | added
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(record, indent=2) + "\n")
        if status != "failed":  # then the error is what to read
            _print(f"{command.value} {status}", record, folder)

    def _record(self, trainer: Trainer) -> dict[str, Any]:
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
            "wall_seconds": time.perf_counter() - self._began,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device} {platform.machine()}",
            "devices": trainer.world_size,
            "versions": {"python": platform.python_version(), **_versions()},
        }


def _log_settings(trainer: Trainer, record: dict[str, Any]) -> None:
    """Hand TensorBoard the settings together with what they led to, which its table of runs compares."""
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
    """JSON has no NaN."""
    return value if math.isfinite(value) else None


def _versions() -> dict[str, str]:
    found: dict[str, str] = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # used from its source folder, or not needed
            continue
    return found


def _print(title: str, record: dict[str, Any], folder: Path) -> None:
    from rich.console import Console
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
        table.add_row(name, _written(value))
    console = Console()
    console.print(table)
    console.print(f"Run directory: {folder}", soft_wrap=True, highlight=False)


def _written(value: float | None) -> str:
    """Counts in full, measures with four digits."""
    if value is None:
        return "undefined"
    return f"{value:,.0f}" if value == int(value) or abs(value) >= 1000 else f"{value:.4g}"
