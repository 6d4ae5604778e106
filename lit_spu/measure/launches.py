"""Count the operators of a step as a GPU would run them, on any machine.

At the size of small models, a step on a GPU is bound by the host, which launches one or a few kernels for each operator
and stops where Python needs a value from the device. These counts are the same in every run.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer
from torch.overrides import TorchFunctionMode

# private modules: torch has no public module for dispatch modes, or for walking nested values
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

Phase = Literal["forward", "backward", "optimizer"]

FUSED_ON_CUDA: dict[Callable[..., Any], tuple[int, int]] = {
    F.scaled_dot_product_attention: (1, 3),
    F.rms_norm: (1, 1),
}
"""Functions that CUDA computes in one kernel and a CPU in many: the operators of a forward and of a backward pass."""

HOST_READS = (Tensor.tolist, Tensor.numpy, Tensor.cpu)
"""Functions that copy a tensor to the host. On a CPU they run no operator, but on a device they wait."""

PROJECT = str(Path(__file__).parents[1])


class Launches(TorchDispatchMode):
    """Context manager that counts operators.

    Views and empty tensors launch nothing. Every other operator counts once, though some launch several kernels. The
    functions of `FUSED_ON_CUDA` count as on CUDA.

    Args:
        optimizers: Optimizers whose steps are counted as a phase.

    Attributes:
        by_phase: Number of launching operators by phase.
        by_operator: The same by phase and name.
        waits: Number of operators whose result Python or the shape of a tensor needs, by the line of code that ran
            them. A device must have finished its work before they return.
        host_copies: Number of tensors made from Python numbers, by line of code. They are copied to the device.
    """

    def __init__(self, optimizers: Iterable[Optimizer] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.by_phase: Counter[Phase] = Counter()
        self.by_operator: Counter[tuple[Phase, str]] = Counter()
        self.waits: Counter[str] = Counter()
        self.host_copies: Counter[str] = Counter()
        self._optimizers = list(optimizers)
        self._in_optimizer = self._is_paused = False
        self._exits = ExitStack()

    @property
    def total(self) -> int:
        """Number of launching operators."""
        return self.by_phase.total()

    @property
    def own_waits(self) -> int:
        """Number of waits caused by this package's code."""
        return sum(count for place, count in self.waits.items() if place.startswith("lit_spu/"))

    def __enter__(self) -> Self:
        for optimizer in self._optimizers:
            hooks = (
                optimizer.register_step_pre_hook(lambda *_: self._set_in_optimizer(True)),
                optimizer.register_step_post_hook(lambda *_: self._set_in_optimizer(False)),
            )
            for hook in hooks:
                self._exits.callback(hook.remove)
        self._exits.enter_context(_Functions(self))
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        self._exits.close()

    def _set_in_optimizer(self, is_in: bool) -> None:
        self._in_optimizer = is_in

    def count(self, name: str, number: int = 1) -> None:
        """Count launches of an operator in the present phase."""
        is_backward = torch._C._current_autograd_node() is not None  # torch has no public test for it
        phase: Phase = "backward" if is_backward else "optimizer" if self._in_optimizer else "forward"
        self.by_phase[phase] += number
        self.by_operator[phase, name] += number

    @contextmanager
    def pause(self) -> Iterator[None]:
        """Context manager in which nothing is counted."""
        before, self._is_paused = self._is_paused, True
        try:
            yield
        finally:
            self._is_paused = before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._is_paused:
            return result
        name = func._schema.name.removeprefix("aten::")
        inputs = _tensors((args, kwargs))
        if name == "lift_fresh":
            self.host_copies[_find_place()] += 1
        elif needs_value(func, name, inputs):
            self.waits[_find_place()] += 1
            self.count(name, len(_tensors(result)))
        elif computes(func, name, inputs, _tensors(result)):
            self.count(name)
        return result


class _Functions(TorchFunctionMode):
    """Function mode that counts the functions of `FUSED_ON_CUDA` as a whole, and those of `HOST_READS` as waits."""

    def __init__(self, launches: Launches) -> None:
        super().__init__()
        self.launches = launches

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in HOST_READS:
            self.launches.waits[_find_place()] += 1
        if func not in FUSED_ON_CUDA or self.launches._is_paused:
            return func(*args, **kwargs)
        names = list(kwargs)

        def run(*values: Any) -> Any:
            return func(*values[: len(args)], **dict(zip(names, values[len(args) :], strict=True)))

        return _FusedFunction.apply(self.launches, run, FUSED_ON_CUDA[func], func.__name__, *args, *kwargs.values())  # type: ignore[no-untyped-call]


class _FusedFunction(torch.autograd.Function):
    """A function as one node whose operators are not counted one by one."""

    @staticmethod
    def forward(ctx: Any, launches: Launches, run: Any, counts: tuple[int, int], name: str, *values: Any) -> Any:
        launches.count(name, counts[0])
        needs_grad = ctx.needs_input_grad[4:]
        with launches.pause(), torch.enable_grad():
            ctx.values = [
                value.detach().requires_grad_(needed) if isinstance(value, Tensor) else value
                for value, needed in zip(values, needs_grad, strict=True)
            ]
            ctx.output = run(*ctx.values)
        ctx.launches, ctx.count, ctx.name = launches, counts[1], name
        return ctx.output.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Any, ...]:
        ctx.launches.count(f"{ctx.name}_backward", ctx.count)
        wanted = [value for value in ctx.values if isinstance(value, Tensor) and value.requires_grad]
        with ctx.launches.pause():
            found = iter(torch.autograd.grad(ctx.output, wanted, grads))
        own = (next(found) if isinstance(v, Tensor) and v.requires_grad else None for v in ctx.values)
        return (None, None, None, None, *own)


def _tensors(values: object) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def needs_value(func: Any, name: str, inputs: list[Tensor]) -> bool:
    """Return whether the host needs a value or a shape that an operator computes."""
    if name.startswith("index"):  # tagged, but only the places of a mask have to be counted
        return any(tensor.dtype is torch.bool for tensor in inputs[1:])
    return not {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}.isdisjoint(func.tags)


def computes(func: Any, name: str, inputs: list[Tensor], outputs: list[Tensor]) -> bool:
    """Return whether an operator computes something: whether it writes to a tensor, or to new memory."""
    if name.removeprefix("new_").startswith("empty"):
        return False
    if func._schema.is_mutable:
        return True
    storages = {tensor.untyped_storage()._cdata for tensor in inputs}
    return any(tensor.untyped_storage()._cdata not in storages for tensor in outputs)


def _find_place() -> str:
    """Return the innermost running line of this package or of transformers."""
    frame: FrameType | None = sys._getframe(2)
    while frame:
        file = frame.f_code.co_filename
        if file.startswith(PROJECT) and file != __file__:
            return f"lit_spu/{Path(file).relative_to(PROJECT)}:{frame.f_lineno}"
        if "/transformers/" in file:
            return f"transformers/{file.rpartition('/transformers/')[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"
