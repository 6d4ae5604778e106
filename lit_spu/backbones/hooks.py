"""Hooks and forward overrides on modules that others have written.

A hook or an override is *position-wise* if it treats all token positions alike. The shortcut of `last_position` runs in
a block only if all that is attached there is.

This file is the only one that reads torch's private tables of hooks: torch has no public way to ask for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any, TypeVar

from torch import nn
from torch.nn.modules.module import _has_any_global_hook
from torch.utils.hooks import RemovableHandle

Function = TypeVar("Function", bound=Callable[..., Any])

_TABLES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def position_wise(function: Function) -> Function:
    """Mark a hook or a forward override as one that treats all token positions alike."""
    function.position_wise = True  # type: ignore[attr-defined]
    return function


def override_forward(module: nn.Module, function: Callable[..., Any]) -> Callable[[], None]:
    """Replace a module's forward by `function(inner_forward, *args, **kwargs)`.

    Returns:
        A function that puts the inner forward back.
    """
    previous = vars(module).get("forward")
    module.forward = partial(function, module.forward)

    def restore() -> None:
        del module.forward
        if previous is not None:
            module.forward = previous

    return restore


@contextmanager
def temporary_hooks(handles: Iterable[RemovableHandle]) -> Iterator[None]:
    """Remove hooks at the end of a `with` block, also after an error."""
    registered = list(handles)
    try:
        yield
    finally:
        for handle in registered:
            handle.remove()


def has_no_hooks(module: nn.Module) -> bool:
    """Return whether no hook of any kind runs with a module, global ones included."""
    return not (_has_any_global_hook() or any(vars(module)[table] for table in _TABLES))


def has_default_forward(module: nn.Module) -> bool:
    """Return whether a module runs the forward of its class."""
    return "forward" not in vars(module)


def is_position_wise(root: nn.Module) -> bool:
    """Return whether all hooks and forward overrides of a module and of its parts are position-wise."""
    if _has_any_global_hook():
        return False
    for module in root.modules():
        attributes = vars(module)
        attached = chain.from_iterable(attributes[table].values() for table in _TABLES)
        override = [attributes["forward"]] if "forward" in attributes else []
        if not all(_is_marked(function) for function in chain(attached, override)):
            return False
    return True


def _is_marked(function: Any) -> bool:
    while isinstance(function, partial):
        function = function.func
    return getattr(function, "position_wise", False)
