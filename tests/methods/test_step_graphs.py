"""Captured training steps compared with eager ones. A tape plays the graphs on a CPU, by the rules of a CUDA graph."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from transformers import masking_utils

from lit_spu.methods.base import Method
from lit_spu.methods.step_graphs import CapturedSteps, StepGraphs
from tests.runs import METHODS, fit, made
from tests.tape import record

FIRST_ORDER = [name for name in METHODS if not name.startswith("mezo")]


class Capture(Callback):
    """Plays the graphs of a run on a tape, and counts the operators outside of them in the last step."""

    def __init__(self) -> None:
        self.graphs: StepGraphs | None = None
        self.replays: list[int] = []
        self.losses: list[float] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, Method)
        self.graphs = pl_module.graphs = StepGraphs(pl_module, pl_module.loss, record)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self.losses.append(float(outputs["loss"]))
        self.replays.append(self.graphs.num_replays if self.graphs else 0)


class Losses(Capture):
    """Notes the losses of an eager run."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None: ...


@pytest.fixture(autouse=True)
def capturing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let transformers take the path of a capture, where it does not look at the values of a mask, and pad batches."""
    monkeypatch.setattr(masking_utils, "is_tracing", lambda *_: True)
    monkeypatch.setattr(CapturedSteps, "length_multiple", 8)


def compare(config: str, backbone: str, folder: Path, *callbacks: Callback, **settings: Any) -> Capture:
    """Train eagerly and with graphs, and compare losses and weights."""
    trainer_settings = settings.pop("trainer", {})
    found = []
    for capture in (Losses(), Capture()):
        method = made(config, backbone, gradient_checkpointing=False, **settings)
        fit(method, folder, capture, *callbacks, **{"max_epochs": 4, **trainer_settings})
        found.append((capture, method))
    (eager, one), (captured, other) = found
    torch.testing.assert_close(captured.losses, eager.losses, rtol=1e-6, atol=1e-6)
    for a, b in zip(one.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    return captured


@pytest.mark.parametrize("config", FIRST_ORDER)
def test_a_captured_step_is_the_eager_one(config: str, tmp_path: Path) -> None:
    captured = compare(config, "mini-bert", tmp_path)
    print(config, captured.replays[-1], captured.graphs.obstacle)
