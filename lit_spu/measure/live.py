"""Live tensor bytes: what a stretch of code holds, by kind; counted at every operator, so the same on every run.

Resident memory on a CPU also shows what malloc has not given back (a quarter more, on a full fine-tuning step); these
bytes are the tensors alone. They leave out scratch space inside one operator and everything inside compiled code.
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
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves


class Kind(IntEnum):
    """What a storage is for. One that serves several ends counts as the greatest of them."""

    REST = 0
    ACTIVATIONS = 1
    GRADIENTS = 2
    OPTIMIZER = 3
    WEIGHTS = 4


@dataclass(slots=True, eq=False)
class _Lifetime:
    """One storage, alive at the samples `born <= sample < died`."""

    nbytes: int
    born: int
    kind: Kind = Kind.REST
    died: float = math.inf


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of live tensors while it is entered; the figures are there once it is left.

    Held are the tensors of `module` and `optimizers`, whatever operators make meanwhile, and whatever from outside they
    read (a batch), as though it had been there from the start. Storages count once, however many tensors view them. A
    storage's kind is what it turns out to be, from its birth on: activations are what autograd saves for the backward
    pass, gradients what arrives in a parameter's `.grad`, the optimizer's what lies in its state.

    Args:
        module: its parameters and buffers are the weights.
        optimizers: theirs is the optimizer state.

    Attributes:
        entry_bytes: held on entry.
        peak_bytes: most held at once, what was held on entry included.
        mean_bytes: mean over the operators, what was held on entry included.
        by_kind: bytes of each kind at the peak; they add up to `peak_bytes`.
        marks: what `mark` named, by the number of operators before it.
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
        """Most bytes held at once beyond those on entry."""
        return self.peak_bytes - self.entry_bytes

    def __enter__(self) -> Self:
        self._classify()
        for parameter in self._parameters():
            if parameter.requires_grad and parameter.is_leaf:
                handle = parameter.register_post_accumulate_grad_hook(self._classify_gradient)
                self._hooks.callback(handle.remove)
        # Detached, because a saved tensor that is its own node's output would otherwise keep that node alive for ever.
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
        """Bytes of each kind after every operator; the entries of one moment add up to what was held then."""
        return {kind: self._held_by(kind) for kind in Kind}

    def mark(self, name: str) -> None:
        """Name what follows, for those who look at the timeline."""
        self.marks[self._samples] = name

    def _held_by(self, kind: Kind) -> list[int]:
        """What storages of a kind held at every sample."""
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
        """Run the operator, then count."""
        kwargs = kwargs or {}
        for tensor in _tensors((args, kwargs)):
            self._see(tensor, outside=True)
        result = func(*args, **kwargs)
        for tensor in _tensors(result):
            self._see(tensor, outside=False)
        self._sum += self._held
        if self._held > self.peak_bytes:
            self.peak_bytes, self._peak_sample = self._held, self._samples
        self._samples += 1
        return result

    def _see(self, tensor: Tensor, *, outside: bool) -> _Lifetime | None:
        """The lifetime of the tensor's storage, begun now, or at entry if the tensor comes from `outside`."""
        try:
            storage = tensor.untyped_storage()
        except NotImplementedError:  # sparse tensors have none; their indices and values are seen for themselves
            return None
        key, nbytes = id(storage), storage.nbytes()
        if key in self._alive:
            life, _ = self._alive[key]
            if life.nbytes == nbytes:
                return life
            self._end(key)  # resized: the storage goes on under another size
        life = _Lifetime(nbytes, born=0 if outside else self._samples)
        self._alive[key] = (life, ref(storage, lambda _: self._end(key)))
        self._lifetimes.append(life)
        self._held += nbytes
        if outside:
            self.entry_bytes += nbytes
            self.peak_bytes += nbytes
            self._sum += nbytes * self._samples
        return life

    def _end(self, key: int) -> None:
        life, _ = self._alive.pop(key)
        life.died = self._samples
        self._held -= life.nbytes

    def _parameters(self) -> Iterable[nn.Parameter]:
        return self._module.parameters() if self._module else ()

    def _mark(self, value: object, kind: Kind) -> None:
        for tensor in _tensors(value):
            life = self._see(tensor, outside=True)
            if life:
                life.kind = max(life.kind, kind)

    def _pack(self, tensor: Tensor) -> Tensor:
        self._mark(tensor, Kind.ACTIVATIONS)
        return tensor.detach()

    def _classify_gradient(self, parameter: Tensor) -> None:
        self._mark(parameter.grad, Kind.GRADIENTS)

    def _classify(self) -> None:
        """Mark what the module and the optimizers hold now."""
        for parameter in self._parameters():
            self._mark(parameter, Kind.WEIGHTS)
            self._mark(parameter.grad, Kind.GRADIENTS)
        for buffer in self._module.buffers() if self._module else ():
            self._mark(buffer, Kind.WEIGHTS)
        for optimizer in self._optimizers:
            self._mark(list(optimizer.state.values()), Kind.OPTIMIZER)


def _tensors(values: object) -> Iterator[Tensor]:
    """The tensors with a storage among nested values; a quantised or sharded one has it in its parts."""
    for leaf in tree_leaves(values):
        if isinstance(leaf, Tensor) and leaf.device.type != "meta":
            if type(leaf) not in (Tensor, nn.Parameter) and is_traceable_wrapper_subclass(leaf):
                names, _ = leaf.__tensor_flatten__()
                yield from _tensors([getattr(leaf, name) for name in names])
            else:
                yield leaf
