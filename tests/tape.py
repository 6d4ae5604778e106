"""A recorder of graphs that plays on a CPU, by the rules of a CUDA graph.

It records the operators of a function on their very tensors and refuses those whose result Python needs. A replay runs
the same operators on the same memory: all that Python has decided, and all numbers that it has passed, stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from lit_spu.measure.launches import HOST_READS, computes, needs_value


class RefuseHostReads(TorchFunctionMode):
    """Refuses to copy a tensor to the host, which no dispatch mode sees on a CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in HOST_READS:
            raise RuntimeError(f"operation not permitted when stream is capturing: {func.__name__}")
        return func(*args, **(kwargs or {}))


class Tape(TorchDispatchMode):
    """Recorded operators; `replay` runs them again."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operators: list[tuple[Any, Any, Any, list[tuple[Tensor, int]]]] = []
        self._written: list[tuple[Tensor, Tensor]] = []  # tensors, and their values before

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        if needs_value(func, name, tensors):
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        if name == "lift_fresh":
            raise RuntimeError("a copy from the host's memory, which changes until the replay")
        self._written += [(tensor, tensor.clone()) for tensor in _written(func, args, kwargs)]
        outputs = func(*args, **kwargs)
        leaves = [(leaf, number) for number, leaf in enumerate(tree_leaves(outputs)) if isinstance(leaf, Tensor)]
        if computes(func, name, tensors, [leaf for leaf, _ in leaves]):
            inputs = {tensor.untyped_storage()._cdata for tensor in tensors}
            fresh = [(leaf.detach(), n) for leaf, n in leaves if leaf.untyped_storage()._cdata not in inputs]
            # detached: the memory, as a graph holds it, not the autograd graph
            self.operators.append((func, *tree_map_only(Tensor, Tensor.detach, (args, kwargs)), fresh))
        return outputs

    @torch.no_grad()
    def undo(self) -> None:
        """Restore what the recorded operators have written."""
        while self._written:
            tensor, before = self._written.pop()
            tensor.copy_(before)

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, fresh in self.operators:
            results = tree_leaves(func(*args, **kwargs))
            for target, number in fresh:
                target.copy_(results[number])


def record(function: Callable[[], object], generators: Iterable[torch.Generator] = ()) -> Tape:
    """Record a function. As under capture, it draws random numbers and changes tensors in the replays only."""
    every = [torch.default_generator, *generators]
    states = [generator.get_state() for generator in every]
    tape = Tape()
    try:
        with RefuseHostReads(), tape:
            function()
    finally:
        tape.undo()
        for generator, state in zip(every, states, strict=True):
            generator.set_state(state)
    return tape


def _written(func: Any, args: Any, kwargs: Any) -> list[Tensor]:
    """Return the tensors that an operator writes to."""
    arguments = func._schema.arguments
    values = {argument.name: value for argument, value in zip(arguments, args, strict=False)} | kwargs
    names = [argument.name for argument in arguments if argument.alias_info and argument.alias_info.is_write]
    return [leaf.detach() for name in names for leaf in tree_leaves(values.get(name)) if isinstance(leaf, Tensor)]
