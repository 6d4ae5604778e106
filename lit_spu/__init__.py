"""Memory- and time-efficient fine-tuning of pretrained transformers.

`from lit_spu import GLUE, KLadder, Memory` finds the data module, every callback and every method by name.
Type checkers and editors read `__init__.pyi`, which `make stub` generates.
"""

from typing import Any

from lit_spu.version import __version__ as __version__


def __getattr__(name: str) -> Any:
    from lit_spu.public import find_public

    return globals().setdefault(name, find_public(name))


def __dir__() -> list[str]:
    from lit_spu.public import FUNCTIONS, public_classes

    return sorted({*globals(), *FUNCTIONS, *(cls.__name__ for cls in public_classes())})
