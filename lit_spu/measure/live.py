"""Measure live tensor bytes by kind. They are counted at every operator, so every run yields the same numbers.

Resident memory on a CPU also contains memory that malloc has not returned (a quarter more, in a full fine-tuning step).
Live bytes are those of tensors alone. They do not contain scratch space inside an operator or inside compiled code.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property
from itertools import accumulate
from types import TracebackType
from typing import Any, Self
from weakref import ReferenceType, ref

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.optim import Optimizer

# private modules: torch has no public module for dispatch modes, or for walking nested values
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves


class Kind(IntEnum):
    """Purpose of a storage. A storage with several purposes counts as the greatest of them."""

    REST = 0
    ACTIVATIONS = 1
    GRADIENTS = 2
    OPTIMIZER = 3
    WEIGHTS = 4


@dataclass(slots=True, eq=False)
class _Lifetime:
    """Size and kind of one storage, which is alive at the samples `born <= sample < died`."""

    nbytes: int
    born: int
    kind: Kind = Kind.REST
    died: float = math.inf


class LiveBytes(TorchDispatchMode):
    """Context manager that counts the bytes of live tensors. Read the results after it has exited.

    It counts the tensors of `module` and `optimizers`, every tensor that operators make inside the context, and every
    tensor from outside that they read (such as a batch). Outside tensors count from the entry on. A storage counts
    once, however many tensors view it.

    A storage's kind may be found only after it was made, and then counts for its whole life. Activations are the
    tensors that autograd saves for the backward pass. Gradients are the tensors in a parameter's `.grad`. Optimizer
    state is the tensors in an optimizer's `state`.

    Args:
        module: Module with the weights: its parameters and buffers.
        optimizers: Optimizers with the optimizer state.

    Attributes:
        entry_bytes: Bytes held on entry.
        peak_bytes: Peak of the bytes held, those on entry included.
        mean_bytes: Mean over the operators of the bytes held, those on entry included.
        by_kind: Bytes of each kind at the peak. They add up to `peak_bytes`.
        marks: Names from `mark`, by the number of operators before them.
    """

    def __init__(self, module: nn.Module | None = None, optimizers: Iterable[Optimizer] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.entry_bytes = self.peak_bytes = 0
        self.mean_bytes = 0.0
        self.by_kind: dict[Kind, int] = {}
        self.marks: dict[int, str] = {}
        self._module = module
        self._optimizers = list(optimizers)
        self._alive: dict[int, tuple[_Lifetime, ReferenceType[torch.UntypedStorage]]] = {}
        self._lifetimes: list[_Lifetime] = []
        self._held = self._sum = self._samples = self._peak_sample = 0
        self._hooks = ExitStack()

    @property
    def above_bytes(self) -> int:
        """Peak of the bytes held beyond those on entry."""
        return self.peak_bytes - self.entry_bytes

    def __enter__(self) -> Self:
        self._classify()
        for parameter in self._parameters():
            if parameter.requires_grad and parameter.is_leaf:
                handle = parameter.register_post_accumulate_grad_hook(self._classify_gradient)
                self._hooks.callback(handle.remove)
        self._hooks.enter_context(saved_tensors_hooks(self._pack, lambda packed: packed))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        self._hooks.close()
        self._classify()
        at_peak = [life for life in self._lifetimes if life.born <= self._peak_sample < life.died]
        self.by_kind = {kind: sum(life.nbytes for life in at_peak if life.kind is kind) for kind in Kind}
        self.mean_bytes = self._sum / self._samples if self._samples else float(self.entry_bytes)
        self._alive.clear()

    @cached_property
    def timeline(self) -> dict[Kind, list[int]]:
        """Bytes of each kind after every operator."""
        return {kind: self._count_timeline(kind) for kind in Kind}

    def mark(self, name: str) -> None:
        """Name the operators from here on, for plots of the timeline."""
        self.marks[self._samples] = name

    def _count_timeline(self, kind: Kind) -> list[int]:
        """Return the bytes of one kind at every sample."""
        change = [0] * (self._samples + 1)
        for life in self._lifetimes:
            if life.kind is kind and life.born < self._samples:
                change[life.born] += life.nbytes
                if life.died < self._samples:
                    change[int(life.died)] -= life.nbytes
        return list(accumulate(change[:-1]))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator, and count its inputs and outputs."""
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):
            self._track(tensor, outside=True)
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            self._track(tensor, outside=False)
        self._sum += self._held
        if self._held > self.peak_bytes:
            self.peak_bytes, self._peak_sample = self._held, self._samples
        self._samples += 1
        return result

    def _track(self, tensor: Tensor, *, outside: bool) -> _Lifetime | None:
        """Return the lifetime of a tensor's storage, or None if it has no storage.

        A new lifetime begins now, or at entry if the tensor comes from `outside`.
        """
        try:
            storage = tensor.untyped_storage()
        except NotImplementedError:  # a sparse tensor; its indices and values are tracked on their own
            return None
        key, nbytes = id(storage), storage.nbytes()
        if key in self._alive:
            life, _ = self._alive[key]
            if life.nbytes == nbytes:
                return life
            self._release(key)  # resized: count the storage again with its new size
        life = _Lifetime(nbytes, born=0 if outside else self._samples)
        self._alive[key] = (life, ref(storage, lambda _: self._release(key)))
        self._lifetimes.append(life)
        self._held += nbytes
        if outside:
            self.entry_bytes += nbytes
            self.peak_bytes += nbytes
            self._sum += nbytes * self._samples
        return life

    def _release(self, key: int) -> None:
        life, _ = self._alive.pop(key)
        life.died = self._samples
        self._held -= life.nbytes

    def _parameters(self) -> Iterable[nn.Parameter]:
        return self._module.parameters() if self._module else ()

    def _set_kind(self, value: object, kind: Kind) -> None:
        for tensor in _tensors(value):
            life = self._track(tensor, outside=True)
            if life:
                life.kind = max(life.kind, kind)

    def _pack(self, tensor: Tensor) -> Tensor:
        self._set_kind(tensor, Kind.ACTIVATIONS)
        return tensor.detach()  # not the tensor itself: a saved output would keep its own autograd node alive

    def _classify_gradient(self, parameter: Tensor) -> None:
        self._set_kind(parameter.grad, Kind.GRADIENTS)

    def _classify(self) -> None:
        """Set the kind of all tensors that the module and the optimizers hold now."""
        for parameter in self._parameters():
            self._set_kind(parameter, Kind.WEIGHTS)
            self._set_kind(parameter.grad, Kind.GRADIENTS)
        for buffer in self._module.buffers() if self._module else ():
            self._set_kind(buffer, Kind.WEIGHTS)
        for optimizer in self._optimizers:
            self._set_kind(list(optimizer.state.values()), Kind.OPTIMIZER)


def _tensors(values: object) -> Iterator[Tensor]:
    """Yield the tensors among nested values that have a storage.

    A quantised or sharded tensor has no storage itself: its parts are yielded instead.
    """
    for leaf in tree_leaves(values):
        if isinstance(leaf, Tensor) and leaf.device.type != "meta":
            if type(leaf) not in (Tensor, nn.Parameter) and is_traceable_wrapper_subclass(leaf):
                names, _ = leaf.__tensor_flatten__()
                yield from _tensors([getattr(leaf, name) for name in names])
            else:
                yield leaf
