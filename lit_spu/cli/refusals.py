"""Settings that this command line cannot honour. They are refused before a model is loaded, never ignored."""

from __future__ import annotations

from collections.abc import Mapping
from pkgutil import resolve_name
from typing import Any

from lightning.pytorch.callbacks import (
    BaseFinetuning,
    BatchSizeFinder,
    Callback,
    GradientAccumulationScheduler,
    LearningRateFinder,
    ModelPruning,
    StochasticWeightAveraging,
    WeightAveraging,
)

from lit_spu.callbacks.rank_check import RankCheck
from lit_spu.callbacks.trajectory_recorder import TrajectoryRecorder
from lit_spu.callbacks.zero_shot_report import ZeroShotReport
from lit_spu.checkpoints import run_dir
from lit_spu.errors import UserError

_CHANGING: Mapping[type[Callback], str] = {
    LearningRateFinder: "the learning rate: compare rates with lit-spu compare, and set --model.lr",
    BatchSizeFinder: "the batch size: lit-spu estimate --budget finds one; set --data.batch_size",
    GradientAccumulationScheduler: "the batch size: set --trainer.accumulate_grad_batches for the whole run",
    StochasticWeightAveraging: "the learning rate and the weights that a checkpoint holds: leave it out",
    WeightAveraging: "the weights that a checkpoint holds: leave it out",
    BaseFinetuning: "the trained weights: use GradualFreezing, or a method that freezes, such as LastLayers",
    ModelPruning: "the weights: leave it out",
}
"""Callbacks that change a run after its settings were written down, with what they change and what to do instead."""

_OF_MEZO = (RankCheck, TrajectoryRecorder, ZeroShotReport)
"""Callbacks that MeZO's methods add themselves, and that work with nothing else."""


def check_honoured(settings: Mapping[str, Any], subcommand: str) -> None:
    """Check that no setting would be ignored, and that no callback would change one later.

    Args:
        settings: The settings of the subcommand.
        subcommand: fit, validate, test or predict.

    Raises:
        UserError: If one would be.
    """
    trainer, text = settings["trainer"], settings["data"]["text"]
    root, overfit = trainer["default_root_dir"], trainer["overfit_batches"]
    given = {
        "trainer.default_root_dir": (root is not None, f"the run directory has all files: give --run_dir={root}/run"),
        "trainer.overfit_batches": (bool(overfit), "it would break up the batches: set --data.limit_train"),
        "trainer.use_distributed_sampler": (
            not trainer["use_distributed_sampler"],
            "each device always gets its share of the examples: leave it out",
        ),
        "trainer.model_registry": (trainer["model_registry"] is not None, "checkpoints are files: give --ckpt_path"),
        "trainer.enable_checkpointing": (
            subcommand != "fit" and bool(trainer["enable_checkpointing"]),
            f"{subcommand} saves no checkpoints: leave it out",
        ),
        "weights_only": (not settings["weights_only"], "a checkpoint is data and runs no code: leave it out"),
        "return_predictions": (bool(settings.get("return_predictions")), "predictions are in files: give --output"),
        "data.text": (text is not None and subcommand != "predict", "only predict reads texts: leave it out"),
        "run_dir": (
            text is not None and settings["run_dir"] != run_dir.PATTERN,
            "texts of --data.text are answered without a run: give --output for a file",
        ),
    }
    for flag, (is_ignored, advice) in given.items():
        if is_ignored:
            value: Any = settings
            for key in flag.split("."):
                value = value[key]
            raise UserError(f"--{flag}={value} has no effect here, because {advice}.")
    for callback in _classes(trainer["callbacks"]):
        if issubclass(callback, _OF_MEZO):
            raise UserError(
                f"--trainer.callbacks: {callback.__name__} is a part of MeZO, which adds it itself: leave it out."
            )
        for cls, change in _CHANGING.items():
            if issubclass(callback, cls):
                raise UserError(
                    f"--trainer.callbacks: {callback.__name__} would change what the run's settings do not say,"
                    f" {change}."
                )


def _classes(callbacks: Any) -> list[type]:
    """Return the classes of the given callbacks. A function that returns a callback is no class."""
    listed = callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []
    found = [resolve_name(callback["class_path"]) for callback in listed]
    return [cls for cls in found if isinstance(cls, type)]
