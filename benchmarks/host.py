"""Host time of a step in the Trainer, compared with a bare step: models so narrow that there is nothing to compute."""

from __future__ import annotations

import io
import time
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from benchmarks.methods import CONFIGS, Batch
from lit_spu.__main__ import main
from lit_spu.methods.base import Method
from lit_spu.study.grid import build
from lit_spu.study.steps import batch_of, training_step

METHODS = ("full", "lora", "lst", "kladder")
BLOCK = 10
"""Number of steps that are timed together: as many as from one logged step to the next."""


@dataclass(frozen=True)
class Overhead:
    """Processor time of a step of one method. The ratios are to a bare step."""

    name: str
    milliseconds: float
    lightning: float
    trainer: float


class Interleave(Callback):
    """Callback that runs a block of bare steps before every block of the Trainer's, and times both.

    Args:
        config: Config file of the method.
    """

    last: Interleave
    """The one that was created last."""

    def __init__(self, config: str) -> None:
        self.config = Path(config)
        self.bare: list[float] = []
        self.trainer: list[float] = []
        self._start = 0.0
        type(self).last = self

    @property
    def ratio(self) -> float:
        """Median of the ratios of a block to the mean of the bare ones around it, without the first two blocks."""
        around = zip(self.bare, self.bare[1:], strict=False)
        ratios = [2 * seconds / sum(pair) for seconds, pair in zip(self.trainer, around, strict=True)]
        return median(ratios[2:])

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        method = getattr(pl_module, "method", pl_module)
        twin = build(self.config, backbone=method.backbone.name, task=method.task.name)
        self._bare_step, _ = training_step(twin, batch_of(3, 8, twin.task))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Batch, batch_idx: int) -> None:
        if batch_idx % BLOCK:
            return
        start = time.process_time()
        if batch_idx:
            self.trainer.append(start - self._start)
        for _ in range(BLOCK):
            self._bare_step(batch)
        self._start = time.process_time()
        self.bare.append(self._start - start)


class LossAlone(LightningModule):
    """A method's loss and optimizer as a plain module, which logs nothing."""

    def __init__(self, method: Method) -> None:
        super().__init__()
        self.method = method

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        return self.method.loss(batch)

    def configure_optimizers(self) -> Any:
        self.method.trainer = self.trainer
        return self.method.configure_optimizers()


def measure_overheads(backbone: Path, blocks: int, names: Sequence[str] = METHODS) -> list[Overhead]:
    """Measure the host time of methods.

    Args:
        backbone: Folder of a narrow backbone.
        blocks: Number of blocks of steps.
        names: Names of config files.
    """
    torch.set_num_threads(1)
    found = []
    for name in names:
        with TemporaryDirectory() as folder, redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            config = CONFIGS / f"{name}.yaml"
            alone = _run_lightning(config, backbone, blocks)
            ours = _run_command(config, backbone, blocks, folder)
        found.append(Overhead(name, 1000 * median(ours.bare) / BLOCK, alone.ratio, ours.ratio))
    return found


def _run_lightning(config: Path, backbone: Path, blocks: int) -> Interleave:
    """Run a Trainer with no other callback and without loggers."""
    method = build(config, backbone=str(backbone))
    batches: Any = [batch_of(3, 8, method.task)] * (blocks * BLOCK)
    interleave = Interleave(str(config))
    Trainer(
        accelerator="cpu",
        max_epochs=1,
        callbacks=[interleave],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(LossAlone(method), DataLoader(batches, batch_size=None))
    return interleave


def _run_command(config: Path, backbone: Path, blocks: int, folder: str) -> Interleave:
    """Run `lit-spu fit` with the callbacks and loggers that it has by default."""
    sizes = {"batch_size": 3, "max_length": 8, "limit_train": 3 * blocks * BLOCK, "limit_validation": 3}
    main(
        [
            *("fit", f"--config={config}", f"--model.backbone={backbone}", f"--run_dir={folder}/run"),
            *(f"--data.{name}={value}" for name, value in sizes.items()),
            *("--trainer.accelerator=cpu", "--trainer.max_epochs=1"),
            *("--trainer.callbacks+=benchmarks.host.Interleave", f"--trainer.callbacks.config={config}"),
        ]
    )
    return Interleave.last


def make_table(title: str, overheads: Sequence[Overhead]) -> list[str]:
    """Return the lines of a Markdown table."""
    lines = [
        f"| {title} | bare step, host ms | Lightning alone | fit |",
        "|---|---:|---:|---:|",
    ]
    return lines + [f"| {o.name} | {o.milliseconds:.1f} | {o.lightning:.2f} | {o.trainer:.2f} |" for o in overheads]
