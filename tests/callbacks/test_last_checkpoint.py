"""last.ckpt: few of the short epochs are saved, and always the last one."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer

from lit_spu.callbacks import last_checkpoint
from lit_spu.callbacks.last_checkpoint import LastCheckpoint
from tests.callbacks.conftest import QUIET, Tiny

pytestmark = QUIET


class SlowSaves:
    """Records the steps of saved checkpoints, and makes each save take longer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
        self.steps: list[int] = []
        save = Trainer.save_checkpoint

        def slow(trainer: Trainer, *args: Any, **kwargs: Any) -> None:
            self.steps.append(trainer.global_step)
            time.sleep(seconds)
            save(trainer, *args, **kwargs)

        monkeypatch.setattr(Trainer, "save_checkpoint", slow)


def fit(folder: Path, **settings: Any) -> None:
    Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_train_batches=1,
        limit_val_batches=0,
        callbacks=[LastCheckpoint(folder)],
        **settings,
    ).fit(Tiny())


@pytest.mark.parametrize("settings", [{"max_epochs": 40}, {"max_epochs": -1, "max_steps": 40}])
def test_few_epochs_of_one_batch_are_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, int]
) -> None:
    saves = SlowSaves(monkeypatch, 0.1)  # so at least two seconds of training between two saves
    fit(tmp_path, **settings)
    assert saves.steps[0] == 1
    assert saves.steps[-1] == 40
    assert len(saves.steps) < 10
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 40


def test_all_long_epochs_are_saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saves = SlowSaves(monkeypatch, 0)
    monkeypatch.setattr(last_checkpoint, "SAVE_INTERVAL", 1)  # the disk may be busy
    monkeypatch.setattr(LastCheckpoint, "on_train_epoch_start", lambda *_: time.sleep(0.5), raising=False)
    fit(tmp_path, max_epochs=4)
    assert saves.steps == [1, 2, 3, 4]
