"""Progress bar: the metrics it shows, and its output if there is no terminal."""

from __future__ import annotations

from pathlib import Path

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_spu.callbacks.progress import MetricProgressBar
from tests.callbacks.conftest import QUIET, MakeTrainer, Tiny

pytestmark = QUIET


def test_progress_bar_shows_the_loss_and_the_monitored_metric(
    make_trainer: MakeTrainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bar, module = MetricProgressBar(), Tiny()
    best = ModelCheckpoint(tmp_path / "checkpoints", monitor="val/accuracy")
    trainer = make_trainer(bar, best, enable_progress_bar=True, enable_checkpointing=True)
    trainer.fit(module)
    shown = bar.get_metrics(trainer, module)
    assert list(shown) == ["train/loss", "val/accuracy"]  # and no v_num
    assert shown["val/accuracy"] == trainer.callback_metrics["val/accuracy"].item()
    assert capsys.readouterr().out.count("Epoch") <= 1  # not a terminal, so no line for each refresh
