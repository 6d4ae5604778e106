"""Run directories: the files that a run writes, and the checkpoints in them.

A run directory holds:

- `config.yaml`: the settings as run; `--config` reads them to run the same again;
- `launches.jsonl`: a line per launch with its time, command line, package versions and git revision;
- `metrics.csv`: the logged metrics; `tensorboard/` has the same as events;
- `summary.json`: the results;
- `checkpoints/`: `best.ckpt` by the task's metric, and `last.ckpt` of the latest epoch or of an interruption.
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
from lit_spu.safe_yaml import parse_json
from lit_spu.version import __version__

PATTERN = "runs/{task}/{method}/{seed}/{time}"
"""The default run directory."""


def new_run_dir(pattern: str, *, task: str, method: str, seed: object) -> Path:
    """Return the path of a new run directory: `pattern` with its placeholders filled in. Nothing is created.

    Raises:
        UserError: if the pattern has an unknown placeholder.
    """
    names = {"task": task, "method": method, "seed": seed, "time": f"{datetime.now():%Y%m%d-%H%M%S-%f}"}
    try:
        path = Path(pattern.format(**names))
    except (KeyError, IndexError, ValueError) as error:
        placeholder = str(error).strip("'")
        hint = did_you_mean(placeholder, names)
        raise UserError(f"--run_dir: {pattern!r} has an unknown placeholder {placeholder!r}. {hint}") from error
    return path


def check_unused(path: Path) -> None:
    """Check that a run directory has nothing that a new run would replace.

    A run that stopped before its first checkpoint has nothing to continue from: its command can be given again.

    Raises:
        UserError: if it has checkpoints, predictions, or the summary of a completed run.
    """
    completed = read_summary(path).get("status") == "completed"
    if completed or any(path.rglob("*.ckpt")) or any(path.glob("predictions.*")):
        raise UserError(
            f"--run_dir: {path} already holds a run."
            f" Give another directory, or continue that run with --ckpt_path {path}."
        )


def read_summary(path: Path) -> dict[str, Any]:
    """Return the results in a run directory's `summary.json`; nothing if it is absent or unreadable."""
    try:
        summary = parse_json((path / "summary.json").read_text())
    except (OSError, ValueError):
        return {}
    return summary if isinstance(summary, dict) else {}


def keep_metrics(path: Path) -> None:
    """Rename `metrics.csv` of an earlier launch to `metrics.1.csv` and so on, because CSVLogger begins a new file."""
    file = path / "metrics.csv"
    if file.exists():
        file.rename(file.with_suffix(f".{len(list(path.glob('metrics.*.csv'))) + 1}.csv"))


def find_checkpoint(path: str | Path, which: Literal["best", "last"]) -> Path:
    """Return a checkpoint file.

    Args:
        path: The file itself, a run directory, or a folder that `lit-spu export` wrote as safetensors.
        which: The checkpoint to take from a run directory. If it is missing, the other one takes its place.

    Raises:
        UserError: if there is none.
    """
    path = Path(path)
    if path.is_file():
        return path
    # a run that never validated has no best checkpoint; one that was killed after its first validation has no last one
    names = (which, "last", "best")
    for file in (path / trained_weights.WEIGHTS, *(path / "checkpoints" / f"{name}.ckpt" for name in names)):
        if file.is_file():
            return file
    if (path / "config.yaml").exists():
        raise UserError(
            f"{path} is a run that stopped before its first checkpoint. Run it again:"
            f" lit-spu fit --config {path}/config.yaml --run_dir {path}"
        )
    raise UserError(
        f"{path} is no checkpoint and no run directory. Give a checkpoint file, or a run directory that"
        " has checkpoints/last.ckpt."
    )


def saved_config(file: Path) -> dict[str, Any]:
    """Return the settings of `model` and `data` that a checkpoint file was trained with, as in a config file.

    Raises:
        UserError: if the file is damaged, or not the checkpoint of a method.
    """
    try:
        return checkpoint_config(trained_weights.read_checkpoint(file, mmap=True))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is not the checkpoint of a method of lit_spu: {error!r}.") from error


def checkpoint_config(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of `model` and `data` in a checkpoint, as in a config file, and `run`: others by flag."""
    model = dict(checkpoint["hyper_parameters"])
    class_path = model.pop("_class_path", None) or checkpoint["method"]
    data = dict(checkpoint.get("datamodule_hyper_parameters", {}))
    data["task"] = model.pop("task")  # the command line links data.task to the model
    for settings in (model, data):
        settings.pop("_instantiator", None)
    return {"model": {"class_path": class_path, "init_args": model}, "data": data, "run": checkpoint.get("run", {})}


def describe_launch(args: Sequence[str]) -> dict[str, object]:
    """Return a launch's time, command line, package versions and git revision, which are needed to repeat it."""
    packages = ("torch", "lightning", "transformers", "datasets", "jsonargparse")
    return {
        "time": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": shlex.join(["lit-spu", *args]),
        "git": _git_revision(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "lit-spu": __version__,
        **{package: version(package) for package in packages},
    }


def _git_revision() -> str | None:
    """Return the revision of this package's git repository; None without a repository or without git."""
    flags = ("describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    try:
        command = ["git", "-C", str(Path(__file__).parent), *flags]
        return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip() or None
    except OSError:
        return None
