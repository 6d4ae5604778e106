"""Finding classes by the modules that they lie in, and their settings, so that none is listed anywhere."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from inspect import Parameter


def classes(name: str) -> Iterator[type]:
    """The public classes defined in the module or package `name`; the modules of a package are imported one by one."""
    package = importlib.import_module(name)
    inside = pkgutil.iter_modules(getattr(package, "__path__", []))
    for module in (package, *(importlib.import_module(f"{name}.{info.name}") for info in inside)):
        for key, value in vars(module).items():
            if inspect.isclass(value) and value.__module__ == module.__name__ and not key.startswith("_"):
                yield value


def settings(cls: type) -> dict[str, tuple[type, Parameter]]:
    """The named arguments of a class's constructor, each with the class that declares it, its own before others."""
    found: dict[str, tuple[type, Parameter]] = {}
    for base in cls.__mro__:
        if "__init__" in vars(base):
            _, *parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
            for parameter in parameters:
                if parameter.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD):
                    found.setdefault(parameter.name, (base, parameter))
    return found
