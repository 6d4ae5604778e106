"""Loading of trained methods from checkpoints, run directories, exports and trajectories."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lit_spu import registry
from lit_spu.checkpoints import run_dir, trained_weights
from lit_spu.errors import UserError
from lit_spu.methods.base import Method
from lit_spu.version import __version__


def load(path: str | Path) -> Method:
    """Load a trained method, on the CPU and in evaluation mode.

    Args:
        path: A checkpoint file, a run directory (its best checkpoint), or a folder that `lit-spu export` wrote as
            safetensors.

    Raises:
        UserError: if there is no checkpoint, or if it does not belong to a method or to the backbone that it names.
    """
    file = run_dir.find_checkpoint(path, "best")
    config = run_dir.saved_config(file)
    cls = _find_method_class(config, file)
    method = cls(**config["model"]["init_args"], task=config["data"]["task"])
    trained_weights.restore_weights(method, file)
    return method.eval()


def replay(path: str | Path, step: int | None = None) -> Method:
    """Rebuild a method that MeZO trained from the trajectory of its run, without data and without a forward pass.

    The weights are bitwise those of the run. The method is on the CPU and in evaluation mode.

    Args:
        path: A trajectory file, or the directory of the run that wrote it.
        step: Stop after this number of steps rather than after the last.

    Raises:
        UserError: if there is no trajectory or no such step, or if the backbone, the initial weights or the noise of
            the run are not available here.
    """
    import torch

    from lit_spu.optim.trajectory import Trajectory

    trajectory = Trajectory.read(path)
    try:
        config = run_dir.checkpoint_config(trajectory.header)
        cls: type[Any] = _find_method_class(config, trajectory.file)
        arguments = config["model"]["init_args"] | {"trajectory": None}
        with torch.random.fork_rng():
            torch.manual_seed(trajectory.header["seed"])
            method = cls(**arguments, task=config["data"]["task"])
        method.replay(trajectory, step)
    except (KeyError, TypeError, AttributeError) as error:  # of settings that the method does not have, or lacks
        raise UserError(f"trajectory: {trajectory.file} was not written by a run of MeZO: {error!r}.") from error
    replayed: Method = method.eval()
    return replayed


def load_together(paths: Mapping[str, str | Path]) -> dict[str, Method]:
    """Load several trained methods that share one backbone in memory: equal frozen weights are one tensor.

    Each method returns the same logits as if it had been loaded alone. Switching between them loads no weights.

    Args:
        paths: Paths as for `load`, by names of your choice. Tasks and methods may differ, the backbone may not.

    Raises:
        UserError: if one cannot be loaded, or has another backbone than the first.
    """
    loaded: dict[str, Method] = {}
    for name, path in paths.items():
        method = load(path)
        for other_name, other in loaded.items():
            if method.backbone.fingerprint != other.backbone.fingerprint:
                raise UserError(
                    f"{name!r} ({path}) was trained on {method.backbone.name!r}, and {other_name!r} on"
                    f" {other.backbone.name!r}, which is not the same backbone. Load them one by one."
                )
            method.backbone.share_frozen_weights(other.backbone)
        loaded[name] = method
    return loaded


def _find_method_class(config: Mapping[str, Any], file: Path) -> type[Method]:
    """Return the class that the config of a checkpoint file names."""
    package, _, name = str(config["model"]["class_path"]).rpartition(".")
    methods = {cls.__name__: cls for cls in registry.classes("lit_spu.methods")}
    if name not in methods or package.partition(".")[0] not in ("", "lit_spu"):
        raise UserError(
            f"{file} was trained by {config['model']['class_path']}, which is not a method of lit_spu {__version__}."
        )
    return methods[name]
