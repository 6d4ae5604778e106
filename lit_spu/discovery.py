"""Finding classes by the modules that they lie in, so that none is listed anywhere."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator


def classes(name: str) -> Iterator[type]:
    """The public classes defined in the module or package `name`; the modules of a package are imported one by one."""
    package = importlib.import_module(name)
    inside = pkgutil.iter_modules(getattr(package, "__path__", []))
    for module in (package, *(importlib.import_module(f"{name}.{info.name}") for info in inside)):
        for key, value in vars(module).items():
            if inspect.isclass(value) and value.__module__ == module.__name__ and not key.startswith("_"):
                yield value
