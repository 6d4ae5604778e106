"""Names that `lit_spu` exports: the data module, every callback, every method, and three functions.

Nothing is imported before a name is used, so that `import lit_spu` stays fast.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

from lit_spu.errors import did_you_mean
from lit_spu.registry import classes

FUNCTIONS = ("load", "load_together", "replay")
"""Exported functions; `lit_spu.export.load` defines them."""


def public_classes() -> Iterator[type]:
    """Yield the exported classes: GLUE, then the callbacks, then the methods."""
    from lightning.pytorch import Callback, LightningDataModule

    yield from _concrete_classes("lit_spu.data.glue", LightningDataModule)
    yield from _concrete_classes("lit_spu.callbacks", Callback)
    from lit_spu.methods.base import Method  # here, because importing the methods takes longest

    yield from _concrete_classes("lit_spu.methods", Method)


def find_public(name: str) -> Any:
    """Return the exported class or function of this name.

    Raises:
        AttributeError: if there is none.
    """
    if name in FUNCTIONS:
        from lit_spu.export import load

        return getattr(load, name)
    if not name[:1].isupper():  # no class has such a name, so skip the slow imports
        raise AttributeError(f"module 'lit_spu' has no attribute {name!r}")
    for cls in public_classes():
        if cls.__name__ == name:
            return cls
    hint = did_you_mean(name, {cls.__name__ for cls in public_classes()})
    raise AttributeError(f"module 'lit_spu' has no class {name!r}. {hint}")


def _concrete_classes(package: str, kind: type) -> Iterator[type]:
    for cls in classes(package):
        if issubclass(cls, kind) and not inspect.isabstract(cls):
            yield cls
