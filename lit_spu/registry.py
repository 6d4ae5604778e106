"""Discovery of classes by the package that holds them, and of their settings, so that no file lists them."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
from collections.abc import Iterator
from inspect import Parameter


def classes(name: str) -> Iterator[type]:
    """Yield the public classes that a module, or every module of a package, defines.

    Args:
        name: Full name of the module or package. The modules of a package are imported one by one.
    """
    package = importlib.import_module(name)
    submodules = pkgutil.iter_modules(getattr(package, "__path__", []))
    for module in (package, *(importlib.import_module(f"{name}.{info.name}") for info in submodules)):
        for key, value in vars(module).items():
            if inspect.isclass(value) and value.__module__ == module.__name__ and not key.startswith("_"):
                yield value


def concrete_subclasses(cls: type) -> list[type]:
    """Return the imported subclasses of a class that are public and not abstract, each once."""
    found: dict[type, None] = {}  # a dict keeps the order; a class with two bases is reached twice
    subclass: type
    for subclass in cls.__subclasses__():
        if not inspect.isabstract(subclass) and not subclass.__name__.startswith("_"):
            found[subclass] = None
        found.update(dict.fromkeys(concrete_subclasses(subclass)))
    return list(found)


def settings(cls: type) -> dict[str, tuple[type, Parameter]]:
    """Return the named arguments of a class's constructor, its own before those of its bases.

    Returns:
        By name, the class that declares the argument, and the argument.
    """
    found: dict[str, tuple[type, Parameter]] = {}
    for base in cls.__mro__:
        if "__init__" in vars(base):
            _, *parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
            for parameter in parameters:
                if parameter.kind not in (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD):
                    found.setdefault(parameter.name, (base, parameter))
    return found
