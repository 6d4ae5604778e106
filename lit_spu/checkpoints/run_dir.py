"""Run directories: where a run puts what it writes, and how a checkpoint is found again.

A run directory holds `config.yaml`, the settings as run (give them back with --config to run the same again),
`launches.jsonl`, a line a launch with its time, command line, versions and git revision, `metrics.csv`, what was logged
(`tensorboard/` has the same as events), `summary.json`, and `checkpoints/`: `best.ckpt` by the task's metric and
`last.ckpt` of the latest epoch or of an interruption.
"""

from __future__ import annotations

import platform
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from datetime import datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

from lit_spu.checkpoints import trained_weights
from lit_spu.errors import UserError, did_you_mean

PATTERN = "runs/{task}/{method}/{seed}/{time}"
"""The default run directory."""


def directory(pattern: str, *, task: str, method: str, seed: object) -> Path:
    """The run directory that `pattern` stands for.

    Raises:
        UserError: if the pattern has an unknown placeholder, or if the directory holds a run already.
    """
    names = {"task": task, "method": method, "seed": seed, "time": f"{datetime.now():%Y%m%d-%H%M%S-%f}"}
    try:
        path = Path(pattern.format(**names))
    except (KeyError, IndexError, ValueError) as error:
        placeholder = str(error).strip("'")
        hint = did_you_mean(placeholder, names)
        raise UserError(f"--run_dir: {pattern!r} has no placeholder {placeholder!r}. {hint}") from error
    if (path / "config.yaml").exists():
        raise UserError(
            f"--run_dir: {path} holds a run already."
            f" Give another directory, or continue that run with --ckpt_path {path}."
        )
    return path


def checkpoint(path: str | Path, which: Literal["best", "last"]) -> Path:
    """The checkpoint file at `path`, which may also be a run directory: then its best or its last.

    Of a folder that `lit-spu export` wrote as safetensors, it is the file of the weights.

    Raises:
        UserError: if there is none.
    """
    path = Path(path)
    if path.is_file():
        return path
    # a run that never validated has no best one
    for file in (path / trained_weights.WEIGHTS, *(path / "checkpoints" / f"{name}.ckpt" for name in (which, "last"))):
        if file.is_file():
            return file
    problem = "is a run that saved no checkpoint" if (path / "config.yaml").exists() else "is no checkpoint and no run"
    raise UserError(f"--ckpt_path: {path} {problem}. Give a file, or a run directory that has checkpoints/last.ckpt.")


def made_with(file: Path) -> dict[str, Any]:
    """The settings of `model` and `data` that a checkpoint was made with, as a config file would give them.

    Raises:
        UserError: if it is not the checkpoint of a method.
    """
    import torch

    try:
        return settings(
            trained_weights.read(file, weights=False)
            if file.name == trained_weights.WEIGHTS
            else torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        )
    except UserError:
        raise
    except Exception as error:  # whatever torch makes of a file that is something else
        raise UserError(f"--ckpt_path: {file} is not the checkpoint of a method of lit_spu.") from error


def settings(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of `model` and `data` in a checkpoint."""
    model = dict(checkpoint["hyper_parameters"])
    made_by = model.pop("_class_path", None) or checkpoint["method"]
    data = dict(checkpoint.get("datamodule_hyper_parameters", {}))
    data["task"] = model.pop("task")  # one task for both, given to the data
    for either in (model, data):
        either.pop("_instantiator", None)
    return {"model": {"class_path": made_by, "init_args": model}, "data": data}


def launch(args: Sequence[str]) -> dict[str, object]:
    """What is needed to run the same again: the command line, the versions and the revision of the code."""
    packages = ("lit-spu", "torch", "lightning", "transformers", "datasets", "jsonargparse")
    git = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(["lit-spu", *args]),
        "git": git.stdout.strip() or None,
        "python": platform.python_version(),
        "platform": platform.platform(),
        **{package: version(package) for package in packages},
    }
