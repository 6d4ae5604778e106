"""Load what was trained: checkpoints, run directories, exports and trajectories."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_spu import __version__, registry
from lit_spu.checkpoints import run_dir, trained_weights
from lit_spu.errors import UserError
from lit_spu.methods.base import Method


def load(path: str | Path) -> Method:
    """What was trained, on the CPU and in evaluation mode.

    Args:
        path: A checkpoint file, a run directory (its best), or a folder that `lit-spu export` wrote as safetensors.

    Raises:
        UserError: if there is no checkpoint, or if it does not belong to a method or to the backbone that it names.
    """
    file = run_dir.checkpoint(path, "best")
    settings = run_dir.made_with(file)
    cls = _maker(settings, file)
    if file.name == trained_weights.WEIGHTS:
        method = cls(**settings["model"]["init_args"], task=settings["data"]["task"])
        trained_weights.restore(method, file)
    else:
        method = cls.load_from_checkpoint(file, map_location="cpu", weights_only=True)
    return method.eval()


def replay(path: str | Path, step: int | None = None) -> Method:
    """A method as MeZO trained it, from the trajectory that its run wrote, without data and without a forward pass.

    Its weights are bitwise those that were trained. It is on the CPU, and in evaluation mode.

    Args:
        path: A trajectory, or the directory of the run that wrote it.
        step: Stop behind so many steps rather than behind the last.

    Raises:
        UserError: if there is no trajectory or no such step, or if its backbone, its weights at the start or its noise
            cannot be had here.
    """
    import torch

    from lit_spu.optim.trajectory import Trajectory

    trajectory = Trajectory.read(path)
    settings = run_dir.settings(trajectory.header)
    cls: type[Any] = _maker(settings, trajectory.file)
    arguments = settings["model"]["init_args"] | {"trajectory": None}
    with torch.random.fork_rng():
        torch.manual_seed(trajectory.header["seed"])
        method = cls(**arguments, task=settings["data"]["task"])
    method.replay(trajectory, step)
    replayed: Method = method.eval()
    return replayed


def _maker(settings: Mapping[str, Any], file: Path) -> type[Method]:
    """The class of the method with these settings, which `file` has.

    Raises:
        UserError: if there is no such method.
    """
    made_by = settings["model"]["class_path"].rpartition(".")[2]
    methods = {cls.__name__: cls for cls in registry.classes("lit_spu.methods")}
    if made_by not in methods:
        raise UserError(f"{file} was made by {made_by}, which is no method of lit_spu {__version__}.")
    return methods[made_by]


def load_together(paths: Mapping[str, str | Path]) -> dict[str, Method]:
    """Several trained methods, by name, that hold their backbone once: what is frozen and equal is one tensor for all.

    Each answers as if it had been loaded alone, so that another adapter is another name, and nothing is loaded again.

    Args:
        paths: What to load, as for `load`. Tasks and methods may differ, the backbone may not.

    Raises:
        UserError: if one cannot be loaded, or is of another backbone than the first.
    """
    loaded: dict[str, Method] = {}
    for name, path in paths.items():
        method = load(path)
        for other_name, other in loaded.items():
            if method.backbone.fingerprint != other.backbone.fingerprint:
                raise UserError(
                    f"{name!r} ({path}) was trained on {method.backbone.name!r}, and {other_name!r} on"
                    f" {other.backbone.name!r}, which is not the same backbone."
                )
            method.backbone.share_frozen_weights(other.backbone)
        loaded[name] = method
    return loaded
