"""A tiny LightningModule, and a Trainer that writes into a temporary directory."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.profiler import record_function
from torch.utils.data import DataLoader

MakeTrainer = Callable[..., Trainer]

QUIET = [
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),  # Lightning 2.6 under torch 2.13
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),  # eight tiny batches need no workers
]


class Tiny(LightningModule):
    """A linear classifier on eight features."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 2)

    def forward(self, batch: Tensor) -> Tensor:
        with record_function("backbone"):
            logits: Tensor = self.layer(batch)
        return logits

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss: Tensor = self(batch).square().mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("val/accuracy", self(batch).mean(), batch_size=len(batch))

    def test_step(self, batch: Tensor, batch_idx: int) -> None:
        self.log("test/accuracy", self(batch).mean(), batch_size=len(batch))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(cast(Any, torch.ones(32, 8)), batch_size=4)  # eight batches; a tensor is a dataset

    val_dataloader = test_dataloader = predict_dataloader = train_dataloader


class Manual(Tiny):
    """Manual optimization with a step after every fourth batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> Any:
        optimizer = self.optimizers()
        self.manual_backward(self(batch).square().mean())
        if batch_idx % 4 == 3:
            optimizer.step()  # type: ignore[union-attr]
            optimizer.zero_grad()  # type: ignore[union-attr]


def logged(folder: Path, name: str) -> list[float]:
    """Return all values that were logged under a name, in order."""
    rows = csv.DictReader((folder / "run/0/metrics.csv").read_text().splitlines())
    return [float(row[name]) for row in rows if row.get(name)]


@pytest.fixture
def make_trainer(tmp_path: Path) -> MakeTrainer:
    def make(*callbacks: Any, **settings: Any) -> Trainer:
        return Trainer(
            **{
                "accelerator": "cpu",
                "max_epochs": 1,
                "logger": CSVLogger(tmp_path, name="run", version="0"),
                "callbacks": list(callbacks),
                "enable_checkpointing": False,
                "enable_progress_bar": False,
                "enable_model_summary": False,
                "log_every_n_steps": 1,
                "num_sanity_val_steps": 0,
                **settings,
            }
        )

    return make
