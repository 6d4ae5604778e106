"""The checkpoint of `--ckpt_path`: its settings, and how those of the command line differ from them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_spu.checkpoints import run_dir, trained_weights
from lit_spu.errors import UserError, name_flag
from lit_spu.safe_yaml import read_mapping
from lit_spu.tasks import load_task

_FREE = {f"data.{name}" for name in ("task", "source", "num_workers", "cache", "text", "limit_test")}
"""Settings of the data that a resumed run may change. The task and the examples themselves are compared."""

_REPEATED = (
    "accumulate_grad_batches",
    "gradient_clip_val",
    "gradient_clip_algorithm",
    "limit_train_batches",
    "limit_val_batches",
)
"""Settings of the trainer that, with its precision, change the numbers. The length may change: a warning says so."""

_PRECISIONS = {"None": "32-true", "32": "32-true", "16": "16-mixed", "bf16": "bf16-mixed", "64": "64-true"}
"""Lightning's names of the precisions that have several."""


def describe_run(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a resumed run must repeat, besides the model's and the data's, by flag."""
    trainer = config["trainer"]
    precision = _PRECISIONS.get(str(trainer["precision"]), trainer["precision"])
    settings = {name: trainer[name] for name in _REPEATED} | {"precision": precision}
    return {"seed_everything": config["seed_everything"]} | {f"trainer.{name}": settings[name] for name in settings}


class RecordRun(Callback):
    """Callback that adds the settings of the run to its checkpoints, as `run`.

    Args:
        settings: The settings by flag (`describe_run`).
    """

    def __init__(self, settings: Mapping[str, Any]) -> None:
        self.settings = dict(settings)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["run"] = self.settings


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint file with the settings that it was trained with."""

    file: Path
    config: Mapping[str, Any]
    """The settings, as in a config file: `model` and `data`; if a run is resumed, also those of its trainer."""
    run: Mapping[str, Any] = field(default_factory=dict)
    """The settings of the run that a resumed run must repeat, by flag (`describe_run`)."""
    resumed_dir: Path | None = None
    """The run directory that a resumed run continues in."""

    @property
    def is_export(self) -> bool:
        """Return whether `lit-spu export` wrote the file as safetensors, which Lightning cannot read."""
        return self.file.name == trained_weights.WEIGHTS

    def find_differences(self, model: Mapping[str, Any]) -> list[str]:
        """Return the settings of the model that differ from the checkpoint's, as `--flag=value (checkpoint: value)`.

        Args:
            model: The settings as given, with `class_path` and `init_args`.

        Raises:
            UserError: if the checkpoint belongs to another method.
        """
        saved, given = self.config["model"], model["init_args"]
        saved_method, given_method = (settings["class_path"].rpartition(".")[2] for settings in (saved, model))
        if saved_method != given_method:
            raise UserError(
                f"--model: {given_method}, but the checkpoint {self.file} holds {saved_method}."
                " Leave out --model and its config."
            )
        differences = [
            f"--model.{name}={given.get(name)} (checkpoint: {value})"
            for name, value in saved["init_args"].items()
            if given.get(name) != value
        ]
        given_task, saved_task = given["task"], self.config["data"]["task"]
        if load_task(given_task) != load_task(saved_task):
            differences.append(f"--data.task={given_task} (checkpoint: {saved_task})")
        return differences

    def find_run_differences(self, config: Mapping[str, Any]) -> list[str]:
        """Return the settings of data, seed and trainer that would change the numbers of a resumed run."""
        before = {f"data.{name}": value for name, value in self.config["data"].items()}
        now = {f"data.{name}": value for name, value in config["data"].items()}
        before, now = before | dict(self.run), now | describe_run(config)
        return [
            f"--{name}={now.get(name)} (checkpoint: {value})"
            for name, value in before.items()
            if name not in _FREE and now.get(name) != value
        ]

    def check_resumable(self, differences: list[str]) -> None:
        """Check that training can continue from here with the given settings.

        Raises:
            UserError: if the file is an export, or a setting differs.
        """
        if self.is_export:
            raise UserError(
                f"--ckpt_path: {self.file} holds trained weights alone, not a run that can continue. Give the directory"
                " of a run, or leave out --ckpt_path to start a new one."
            )
        if differences:
            raise UserError(
                f"--ckpt_path resumes a run with its own settings, but these differ: {', '.join(differences)}.\n"
                "Leave them out, or leave out --ckpt_path to start a new run."
            )


def open_checkpoint(path: str, subcommand: str) -> Checkpoint:
    """Read the settings of a checkpoint.

    Args:
        path: A checkpoint file, a run directory, or a folder of `lit-spu export`.
        subcommand: `fit` takes the last checkpoint of a run directory and resumes that run; the others take the best.

    Raises:
        UserError: if there is no checkpoint.
    """
    with name_flag("--ckpt_path"):
        file = run_dir.find_checkpoint(path, "last" if subcommand == "fit" else "best")
        config = run_dir.saved_config(file)
    run = config.pop("run")
    if subcommand != "fit":
        return Checkpoint(file, config)
    run_config = Path(path, "config.yaml")
    if not run_config.exists():
        return Checkpoint(file, config | dict(run), run)
    saved = read_mapping(run_config)
    if missing := [name for name in ("trainer", "seed_everything") if name not in saved]:
        raise UserError(
            f"--ckpt_path: {run_config} lacks {missing[0]}: it is incomplete or was changed. Give {file}, to continue"
            " in a new run directory."
        )
    settings = {"trainer": saved["trainer"], "seed_everything": saved["seed_everything"]}
    return Checkpoint(file, config | settings, run, Path(path))
