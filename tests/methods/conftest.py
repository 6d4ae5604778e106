"""Runs of seconds for the tests of the methods."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer

from lit_spu.data.glue import GLUE
from lit_spu.methods.base import Method

Run = Callable[..., Trainer]


@pytest.fixture
def data(tmp_path: Path) -> Callable[..., GLUE]:
    """Makes a small data module of sample data."""

    def make(task: str = "sst2", **settings: Any) -> GLUE:
        defaults: dict[str, Any] = {"batch_size": 8, "limit_train": 32, "limit_validation": 20, "limit_test": 12}
        return GLUE(task=task, cache=str(tmp_path / "cache"), **{**defaults, **settings})

    return make


@pytest.fixture
def fit(tmp_path: Path) -> Run:
    """Trains a method on a data module for a few steps; gives the trainer."""

    def run(
        method: Method, data: GLUE, *callbacks: Callback, ckpt_path: Path | None = None, **settings: Any
    ) -> Trainer:
        defaults: dict[str, Any] = {
            "max_epochs": 1,
            "accelerator": "cpu",
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "default_root_dir": tmp_path,
            "callbacks": list(callbacks),
            "log_every_n_steps": 1,  # so that callbacks can read the values of a step
        }
        trainer = Trainer(**{**defaults, **settings})
        trainer.fit(method, data, ckpt_path=ckpt_path)
        return trainer

    return run
