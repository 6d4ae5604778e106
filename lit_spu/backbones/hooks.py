"""Hooks and forward overrides on modules of other libraries.

A hook or an override is *position-wise* if its result at a token position depends on that position alone, or if it
knows the shortcut of `last_position`. A block takes this shortcut only if everything attached to it is position-wise.

This is the only file that reads torch's private tables of hooks: torch has no public access to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from typing import Any, TypeVar

from torch import nn
from torch.nn.modules.module import _has_any_global_hook

Function = TypeVar("Function", bound=Callable[..., Any])

_TABLES = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def position_wise(function: Function) -> Function:
    """Mark a hook or a forward override as position-wise."""
    function.position_wise = True  # type: ignore[attr-defined]
    return function


def override_forward(module: nn.Module, function: Callable[..., Any]) -> Callable[[], None]:
    """Replace a module's forward by `function(inner_forward, *args, **kwargs)`.

    Returns:
        A function that restores the inner forward.
    """
    previous = vars(module).get("forward")
    module.forward = partial(function, module.forward)

    def restore() -> None:
        del module.forward
        if previous is not None:
            module.forward = previous

    return restore


def has_no_hooks(module: nn.Module) -> bool:
    """Return whether a module has no hook of any kind, and torch no global one."""
    return not (_has_any_global_hook() or any(vars(module)[table] for table in _TABLES))


def has_default_forward(module: nn.Module) -> bool:
    """Return whether a module's forward is that of its class, without an override."""
    return "forward" not in vars(module)


def is_class_forward(forward: Callable[..., Any]) -> bool:
    """Return whether an inner forward is that of its module's class, not another override."""
    module = getattr(forward, "__self__", None)
    return module is not None and getattr(forward, "__func__", None) is type(module).forward


def is_position_wise(root: nn.Module) -> bool:
    """Return whether all hooks and forward overrides of a module and of its parts are position-wise."""
    if _has_any_global_hook():
        return False
    for module in root.modules():
        hooks = chain.from_iterable(vars(module)[table].values() for table in _TABLES)
        if not all(_is_marked(function) for function in chain(hooks, _overrides(module))):
            return False
    return True


def find_foreign_hooks(root: nn.Module) -> Iterator[str]:
    """Yield the paths of modules and parameters with a hook or a forward override of another package."""
    if _has_any_global_hook():
        yield "every module"
    for path, module in root.named_modules():
        functions = map(_unwrap, chain(*(vars(module)[table].values() for table in _TABLES), _overrides(module)))
        if any(not str(function.__module__).startswith("lit_spu.") for function in functions):
            yield path or type(module).__name__
    for path, parameter in root.named_parameters():
        if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
            yield path


def _overrides(module: nn.Module) -> Iterator[Any]:
    """Yield the forward overrides of a module, the outermost first."""
    forward = vars(module).get("forward")
    while isinstance(forward, partial):
        yield forward.func
        forward = forward.args[-1]  # the inner forward, see `override_forward`
    if forward is not None and not is_class_forward(forward):
        yield forward


def _is_marked(function: Any) -> bool:
    return getattr(_unwrap(function), "position_wise", False)


def _unwrap(function: Any) -> Any:
    """Return the function whose first arguments a `partial` has bound."""
    while isinstance(function, partial):
        function = function.func
    return function
