"""Fine-tune pretrained transformers for little memory and time.

`from lit_spu import GLUE, KLadder, Memory`: the data module, every callback and every method are found by their names
and imported when they are asked for, so that `import lit_spu` costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator

__version__ = "0.1.0"


_FUNCTIONS = ("load", "load_together", "replay")


def _classes() -> Iterator[type]:
    from lit_spu import registry

    for name in ("data.glue", "callbacks", "methods"):  # lightest first
        yield from registry.classes(f"lit_spu.{name}")


def __getattr__(name: str) -> Any:
    if name in _FUNCTIONS:
        from lit_spu.export import load as loading

        return globals().setdefault(name, getattr(loading, name))
    if not name[:1].isupper():  # no class, so a module or nothing: not worth importing all for
        raise AttributeError(f"module 'lit_spu' has no attribute {name!r}")
    for cls in _classes():
        if cls.__name__ == name:
            return globals().setdefault(name, cls)
    from lit_spu.errors import did_you_mean

    hint = did_you_mean(name, {cls.__name__ for cls in _classes()})
    raise AttributeError(f"module 'lit_spu' has no class {name!r}. {hint}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_FUNCTIONS, *(cls.__name__ for cls in _classes())})
