"""The forward and backward pass of a training step as CUDA graphs.

A graph is captured once for each shape of a batch and then replayed: one launch instead of hundreds. It reads its batch
from fixed tensors and writes the gradients to fixed tensors. The optimizer runs outside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple, Protocol, TypeVar

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode  # torch has no public test for it

from lit_spu.backbones import Batch
from lit_spu.backbones.hooks import find_foreign_hooks
from lit_spu.backbones.precision import is_quantized
from lit_spu.methods.finite import FiniteLosses

T = TypeVar("T")

LENGTH_MULTIPLE = 8
"""Batches are padded to a multiple of this length, so that a few graphs serve all of them."""


class Graph(Protocol):
    """Recorded work of a device, such as a `torch.cuda.CUDAGraph`."""

    def replay(self) -> None: ...


class Recorder(Protocol):
    """Function that records the work of another function, which draws random numbers from these generators."""

    def __call__(self, function: Callable[[], object], generators: Iterable[torch.Generator], /) -> Graph: ...


class CudaRecorder:
    """Recorder of CUDA graphs, which share their memory."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, function: Callable[[], object], generators: Iterable[torch.Generator]) -> Graph:
        graph = torch.cuda.CUDAGraph()
        for generator in generators:
            graph.register_generator_state(generator)
        # other threads, such as that of pinned memory, may use the device meanwhile
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            function()
        return graph


class _Captured(NamedTuple):
    graph: Graph
    output: Any  # of the function, in the memory that the graph writes to


class Graphs:
    """Graphs of functions of a batch, one for each function and shape of a batch.

    The first call of each runs eagerly, the second is captured and replayed, as are all others. Functions are captured
    anew if other weights are trained than before, or if a weight has moved. A batch of fewer examples than usual, such
    as the last one of an epoch, is not captured.

    Args:
        module: The module that is trained.
        record: Function that records the work of another function.
    """

    def __init__(self, module: nn.Module, record: Recorder) -> None:
        self.num_replays = 0
        self.obstacle: str | None = None
        self.has_replayed = False
        """Whether the last step replayed a graph."""
        self._has_failed = False
        self._module, self._record = module, record
        self._parameters = [parameter for parameter in module.parameters() if not is_quantized(parameter)]
        self._weights: list[tuple[bool, int]] = []  # whether each is trained, and its address
        self._batches: dict[object, dict[str, Tensor]] = {}  # by shape, in fixed memory
        self._shape: object = None  # of the present batch
        self._captured: dict[tuple[object, str], _Captured | None] = {}  # None after a first, eager call
        self._grads: dict[nn.Parameter, Tensor] = {}  # common to all graphs
        self._num_examples = 0

    def set_obstacle(self, reason: str | None) -> None:
        """Run the following steps eagerly for this reason, which is logged; None allows graphs."""
        if self._has_failed:
            return
        if reason and reason != self.obstacle:
            rank_zero_info(f"CUDA graphs are off: {reason}.")
            self._forget()
        self.obstacle = reason

    def fix(self, batch: Batch) -> Batch | None:
        """Copy a batch to fixed memory, and return it there. Return None if its step must run eagerly."""
        self.has_replayed = False
        # a dispatch mode, such as a count of live bytes, sees no operator of a replay
        if self.obstacle or is_in_torch_dispatch_mode() or torch.is_anomaly_enabled():
            return None
        weights = [(parameter.requires_grad, parameter.data_ptr()) for parameter in self._parameters]
        if weights != self._weights:
            self._forget()
            self._weights = weights
        num_examples = len(batch["labels"])
        self._num_examples = max(self._num_examples, num_examples)
        if num_examples < self._num_examples:
            return None
        self._shape = tuple((name, tensor.shape, tensor.dtype) for name, tensor in batch.items())
        if self._shape not in self._batches:
            self._batches[self._shape] = {name: tensor.clone() for name, tensor in batch.items()}
            return self._batches[self._shape]
        fixed = self._batches[self._shape]
        torch._foreach_copy_(list(fixed.values()), list(batch.values()))
        return fixed

    def run(self, name: str, function: Callable[[], T], generators: Iterable[torch.Generator] = ()) -> T:
        """Return the output of a function of the batch that `fix` has returned. The next replay overwrites it.

        Args:
            name: Name of the function. Calls of one name must do the same for batches of one shape.
            function: The function.
            generators: The random generators that it draws from, besides torch's global ones.
        """
        key = self._shape, name
        if self.obstacle or key not in self._captured:
            self._captured[key] = None
            return function()
        captured = self._captured[key] or self._capture(function, generators)
        if captured is None:
            return function()
        self._captured[key] = captured
        captured.graph.replay()
        self.num_replays += 1
        self.has_replayed = True
        output: T = captured.output
        return output

    def keep_gradients(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Return the weights with a gradient, and their gradients in memory that is common to all graphs."""
        present = {p: p.grad for p in self._parameters if p.grad is not None}
        known = [p for p in present if p in self._grads]
        if known:
            torch._foreach_copy_([self._grads[p] for p in known], [present[p] for p in known])
        self._grads = present | self._grads  # the first function's own gradients serve all
        return [(p, self._grads[p]) for p in present]

    def _capture(self, function: Callable[[], object], generators: Iterable[torch.Generator]) -> _Captured | None:
        """Return the graph of a function, or None if it cannot be captured."""
        if hook := next(find_foreign_hooks(self._module), None):
            self._fail(f"{hook} has a hook, which a replay would not call")
            return None
        outputs: list[object] = []
        seed = torch.initial_seed()
        try:
            with _without_cached_casts():
                graph = self._record(lambda: outputs.append(function()), generators)
            if torch.initial_seed() != seed:
                raise RuntimeError("it sets the random seed")
        except RuntimeError as error:
            self._fail(f"a step of {type(self._module).__name__} cannot be captured ({str(error).splitlines()[0]})")
            return None
        return _Captured(graph, outputs[0])

    def _fail(self, reason: str) -> None:
        self.set_obstacle(reason)
        self._has_failed = True

    def _forget(self) -> None:
        self._captured.clear()
        self._batches.clear()
        self._grads.clear()


class CapturedSteps(FiniteLosses):
    """Base class of modules whose training steps can be captured as CUDA graphs."""

    cuda_graphs = False
    step_wrapper: Any = None
    loss: Callable[[Batch], Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.graphs: Graphs | None = None
        self._gradients: list[tuple[nn.Parameter, Tensor]] | None = None

    @property
    def length_multiple(self) -> int:
        """A number of tokens. The data module pads training batches to a multiple of it."""
        return LENGTH_MULTIPLE if self.cuda_graphs and torch.cuda.is_available() else 1

    def fix_batch(self, batch: Batch) -> Batch | None:
        """Return a training batch in fixed memory for graphs, or None if its step must run eagerly."""
        return self.graphs.fix(batch) if self.graphs and self.is_capturable(batch) else None

    def captured_loss(self, batch: Batch) -> Tensor:
        """Return the loss of a training step, from a graph if there is one."""
        self._gradients = None
        fixed = self.fix_batch(batch)
        if fixed is None or self.graphs is None:
            return self.loss(batch)
        loss, self._gradients = self.graphs.run("step", partial(self._run_both_passes, self.graphs, fixed))
        return loss

    def _run_both_passes(self, graphs: Graphs, batch: Batch) -> tuple[Tensor, list[tuple[nn.Parameter, Tensor]]]:
        self.zero_grad()
        loss = self.loss(batch)
        with torch.autocast(loss.device.type, enabled=False):  # as in an eager step
            loss.backward()
        return loss.detach(), graphs.keep_gradients()

    def is_capturable(self, batch: Batch) -> bool:
        """Return whether a step on this batch neither waits for the device nor does anything that is done once."""
        return True

    def set_captured_gradients(self) -> bool:
        """Set the gradients if `captured_loss` has run the backward pass. Return False if it has not."""
        if self._gradients is None:
            return False
        for parameter, grad in self._gradients:
            parameter.grad = grad
        return True

    def graph_obstacle(self) -> str | None:
        """Return why the steps of this epoch cannot be captured, or None."""
        trainer: Any = self.trainer
        obstacles = {
            f"{type(self).__name__} takes its steps itself": not self.automatic_optimization,
            "a callback wraps the training step": self.step_wrapper is not None,
            "blocks are recomputed (model.gradient_checkpointing)": bool(self.hparams.get("gradient_checkpointing")),
            "gradients are accumulated (trainer.accumulate_grad_batches)": trainer.accumulate_grad_batches != 1,
            "the loss is scaled (trainer.precision=16-mixed)": trainer.precision == "16-mixed",
            "there are several devices": trainer.world_size > 1,
        }
        return next((reason for reason, holds in obstacles.items() if holds), None)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.cuda_graphs and self.device.type == "cuda":
            self.graphs = Graphs(self, CudaRecorder())
        elif self.cuda_graphs:
            rank_zero_info(f"CUDA graphs are off: the device is {self.device.type}.")

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        if self.graphs:
            self.graphs.set_obstacle(self.graph_obstacle())

    def teardown(self, stage: str) -> None:
        super().teardown(stage)
        self.graphs = None


@contextmanager
def _without_cached_casts() -> Iterator[None]:
    """Context manager without the cache of autocast, so that a graph casts the weights itself."""
    was_enabled = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(was_enabled)
