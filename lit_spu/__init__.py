"""Fine-tune pretrained transformers for little memory and time.

`from lit_spu import GLUE, KLadder, Memory`: the data module, every callback and every method are found by their names
and imported when they are asked for, so that `import lit_spu` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from lit_spu.methods.base import Method

__version__ = "0.1.0"


def load(path: str | Path) -> Method:
    """The trained method of a checkpoint file, or of a run directory (its best), on the CPU and in evaluation mode.

    Raises:
        UserError: if there is no checkpoint, or if it does not belong to a method.
    """
    from lit_spu import discovery, runs
    from lit_spu.errors import UserError

    file = runs.checkpoint(path, "best")
    made_by = runs.made_with(file)["model"]["class_path"].rpartition(".")[2]
    methods = {cls.__name__: cls for cls in discovery.classes("lit_spu.methods")}
    if made_by not in methods:
        raise UserError(f"{file} was made by {made_by}, which is no method of lit_spu {__version__}.")
    method: Method = methods[made_by].load_from_checkpoint(file, map_location="cpu", weights_only=True)  # type: ignore[attr-defined]
    return method.eval()


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
