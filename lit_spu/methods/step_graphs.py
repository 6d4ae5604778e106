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
    """Function that records the work of another function.

    It is given the random generators that this function draws from, besides torch's global ones.
    """

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

    The first call of each runs eagerly, the second is captured, and it and all others are replayed. All graphs are
    captured again after a weight has moved, other weights are trained, or a module has changed between training and
    evaluation mode. Anything else that Python decides, such as a factor that changes from step to step, stays as it was
    captured. A batch of fewer examples than the one before, such as the last one of an epoch, is not captured.

    Args:
        module: The module that is trained.
        record: Function that records the work of another function.
    """

    def __init__(self, module: nn.Module, record: Recorder) -> None:
        self.num_replays = 0
        self.obstacle: str | None = None
        self.has_replayed = False
        """True if the last step replayed a graph."""
        self.is_capturing = False
        self._has_failed = False
        self._module, self._record = module, record
        self._parameters = [parameter for parameter in module.parameters() if not is_quantized(parameter)]
        self._modules = list(module.modules())
        self._state: tuple[list[bool], list[int], list[bool]] | None = None  # that the graphs belong to
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

    def copy_batch(self, batch: Batch) -> Batch | None:
        """Copy a batch to fixed memory, and return it there. Return None if its step must run eagerly."""
        # a dispatch mode, such as a count of live bytes, sees no operator of a replay
        if self.obstacle or is_in_torch_dispatch_mode() or torch.is_anomaly_enabled():
            return None
        if not all(isinstance(value, Tensor) for value in batch.values()):
            self._fail("a batch holds more than tensors")
            return None
        state = (
            [parameter.requires_grad for parameter in self._parameters],
            [parameter.data_ptr() for parameter in self._parameters],
            [module.training for module in self._modules],
        )
        if state != self._state:
            self._forget()
            self._state = state
        num_before, self._num_examples = self._num_examples, len(batch["labels"])
        if self._num_examples < num_before:
            return None
        self._shape = tuple((name, tensor.shape, tensor.dtype) for name, tensor in batch.items())
        if self._shape not in self._batches:
            self._batches[self._shape] = {name: tensor.clone() for name, tensor in batch.items()}
            return self._batches[self._shape]
        fixed = self._batches[self._shape]
        torch._foreach_copy_(list(fixed.values()), list(batch.values()))
        return fixed

    def run(self, name: str, function: Callable[[], T], generators: Iterable[torch.Generator] = ()) -> T:
        """Return the output of a function of the batch from `copy_batch`. The next replay overwrites it.

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
        """Return the weights that have a gradient, with it. All graphs write to the gradients of the first one."""
        present = {p: p.grad for p in self._parameters if p.grad is not None}
        if not self.is_capturing:
            return list(present.items())
        known = [p for p in present if p in self._grads]
        if known:
            torch._foreach_copy_([self._grads[p] for p in known], [present[p] for p in known])
        self._grads = present | self._grads
        return [(p, self._grads[p]) for p in present]

    def _capture(self, function: Callable[[], object], generators: Iterable[torch.Generator]) -> _Captured | None:
        """Return the graph of a function, or None if it cannot be captured."""
        outputs: list[object] = []
        self.is_capturing = True
        try:
            with _without_cached_casts():
                graph = self._record(lambda: outputs.append(function()), generators)
        except RuntimeError as error:
            cause: BaseException = error
            while cause.__context__:  # the end of a capture that has failed raises an error as well
                cause = cause.__context__
            self._fail(f"a step of {type(self._module).__name__} cannot be captured ({str(cause).splitlines()[0]})")
            return None
        finally:
            self.is_capturing = False
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

    cuda_graphs: bool
    step_wrapper: Any
    takes_plain_steps: bool
    captures_own_steps = False  # whether its own kind of step runs functions by `graphs`
    loss: Callable[[Batch], Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.graphs: Graphs | None = None
        self._gradients: list[tuple[nn.Parameter, Tensor]] | None = None

    @property
    def length_multiple(self) -> int:
        """A number of tokens. The data module pads training batches to a multiple of it."""
        trainer: Any = self._trainer
        return LENGTH_MULTIPLE if self.cuda_graphs and trainer and trainer.strategy.root_device.type == "cuda" else 1

    def copy_batch(self, batch: Batch) -> Batch | None:
        """Return a training batch in fixed memory for graphs, or None if its step must run eagerly."""
        if self.graphs is None:
            return None
        self.graphs.has_replayed = False
        return self.graphs.copy_batch(batch) if self.is_capturable(batch) else None

    def captured_loss(self, batch: Batch) -> Tensor:
        """Return the loss of a training step, from a graph if there is one."""
        self._gradients = None
        fixed = self.copy_batch(batch)
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
        """Return whether a step on this batch can be replayed: it saves nothing for later steps."""
        return True

    def set_captured_gradients(self) -> bool:
        """Set the gradients if `captured_loss` has run the backward pass. Return False if it has not."""
        if self._gradients is None:
            return False
        for parameter, grad in self._gradients:
            parameter.grad = grad
        return True

    def seed_generators(self, seed: int) -> None:
        """Seed torch's generators of this device and the host. `torch.manual_seed` seeds those of all backends.

        Raises:
            RuntimeError: While a graph is captured, which would always draw the same numbers.
        """
        if self.graphs and self.graphs.is_capturing:
            raise RuntimeError("it sets the random seed")
        torch.default_generator.manual_seed(seed)
        if self.device.type != "cpu":
            torch.get_device_module(self.device).manual_seed(seed)

    def graph_obstacle(self) -> str | None:
        """Return why steps cannot be captured, or None."""
        trainer: Any = self.trainer
        obstacles = {
            f"{type(self).__name__} has its own kind of step": not (self.takes_plain_steps or self.captures_own_steps),
            "a callback wraps the training step": self.step_wrapper is not None,
            "blocks are recomputed (model.gradient_checkpointing)": bool(self.hparams.get("gradient_checkpointing")),
            "gradients are accumulated (trainer.accumulate_grad_batches)": trainer.accumulate_grad_batches != 1,
            "the loss is scaled (trainer.precision=16-mixed)": trainer.precision == "16-mixed",
            "there are several devices": trainer.world_size > 1,
        }
        hooks = (f"{path} has a hook, which a replay would not call" for path in find_foreign_hooks(self))
        return next((reason for reason, holds in obstacles.items() if holds), next(hooks, None))

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if self.cuda_graphs and self.device.type == "cuda":
            self.graphs = Graphs(self, CudaRecorder())
        elif self.cuda_graphs:
            rank_zero_info(f"CUDA graphs are off: the device is {self.device.type}.")

    def on_train_start(self) -> None:
        super().on_train_start()
        self._check_obstacles()  # a run that is resumed within an epoch does not start this epoch

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        self._check_obstacles()

    def _check_obstacles(self) -> None:
        if self.graphs:
            self.graphs.set_obstacle(self.graph_obstacle())

    def teardown(self, stage: str) -> None:
        super().teardown(stage)
        self.graphs = self._gradients = None


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
