"""Fine-tune pretrained transformers for little memory and time.

`from lit_spu import GLUE, KLadder, Memory`: the data module, every callback and every method are found by their names
and imported when they are asked for, so that `import lit_spu` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from pathlib import Path

    from lit_spu.methods.base import Method

__version__ = "0.1.0"


def load(path: str | Path) -> Method:
    """What was trained, on the CPU and in evaluation mode.

    Args:
        path: A checkpoint file, a run directory (its best), or a folder that `lit-spu export` wrote as safetensors.

    Raises:
        UserError: if there is no checkpoint, or if it does not belong to a method or to the backbone that it names.
    """
    from lit_spu import runs, trained

    file = runs.checkpoint(path, "best")
    settings = runs.made_with(file)
    cls = _maker(settings, file)
    if file.name == trained.WEIGHTS:
        method = cls(**settings["model"]["init_args"], task=settings["data"]["task"])
        trained.restore(method, file)
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

    from lit_spu import runs
    from lit_spu.optim.trajectory import Trajectory

    trajectory = Trajectory.read(path)
    settings = runs.settings(trajectory.header)
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
    from lit_spu import discovery
    from lit_spu.errors import UserError

    made_by = settings["model"]["class_path"].rpartition(".")[2]
    methods = {cls.__name__: cls for cls in discovery.classes("lit_spu.methods")}
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
    from lit_spu.errors import UserError

    loaded: dict[str, Method] = {}
    for name, path in paths.items():
        method = load(path)
        for other_name, other in loaded.items():
            if method.backbone.fingerprint != other.backbone.fingerprint:
                raise UserError(
                    f"{name!r} ({path}) was trained on {method.backbone.name!r}, and {other_name!r} on"
                    f" {other.backbone.name!r}, which is not the same backbone."
                )
            method.backbone.share(other.backbone)
        loaded[name] = method
    return loaded


def _classes() -> Iterator[type]:
    from lit_spu import discovery

    for name in ("data.glue", "callbacks", "methods"):  # lightest first
        yield from discovery.classes(f"lit_spu.{name}")


def __getattr__(name: str) -> Any:
    if not name[:1].isupper():  # no class, so a module or nothing: not worth importing all for
        raise AttributeError(f"module 'lit_spu' has no attribute {name!r}")
    for cls in _classes():
        if cls.__name__ == name:
            return globals().setdefault(name, cls)
    from lit_spu.errors import did_you_mean

    hint = did_you_mean(name, {cls.__name__ for cls in _classes()})
    raise AttributeError(f"module 'lit_spu' has no class {name!r}. {hint}")


def __dir__() -> list[str]:
    return sorted({*globals(), *(cls.__name__ for cls in _classes())})
