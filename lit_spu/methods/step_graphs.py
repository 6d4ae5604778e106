"""The forward and backward pass of a training step as CUDA graphs.

A graph is captured once for each shape of a batch and then replayed: one launch instead of hundreds. It reads its batch
from fixed tensors and writes the gradients to fixed tensors. The optimizer runs outside.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.utils._python_dispatch import is_in_torch_dispatch_mode  # torch has no public test for it

from lit_spu.backbones import Batch
from lit_spu.backbones.hooks import find_foreign_hooks
from lit_spu.backbones.precision import is_quantized
from lit_spu.methods.finite import FiniteLosses

LENGTH_MULTIPLE = 8
"""Batches are padded to a multiple of this length, so that a few graphs serve all of them."""


class Graph(Protocol):
    """Recorded work of a device, such as a `torch.cuda.CUDAGraph`."""

    def replay(self) -> None: ...


class CudaRecorder:
    """Function that captures the work of another function as a CUDA graph. All of its graphs share their memory."""

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Callable[[], None]) -> Graph:
        graph = torch.cuda.CUDAGraph()
        # other threads, such as that of pinned memory, may use the device meanwhile
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            run()
        return graph


@dataclass
class _Step:
    """A captured step: what its graph reads and writes."""

    graph: Graph
    batch: list[Tensor]
    loss: Tensor
    grads: list[tuple[nn.Parameter, Tensor]]


class StepGraphs:
    """Graphs of a module's training steps.

    The first step of each shape runs eagerly, the second is captured. Graphs are captured anew if other weights are
    trained than before, or if a weight has moved. A step of fewer examples than usual, such as the last one of an
    epoch, runs eagerly.

    Args:
        module: The module that is trained.
        loss: Function that returns the loss of a batch, a scalar.
        record: Function that records the work of another function.
    """

    def __init__(
        self, module: nn.Module, loss: Callable[[Batch], Tensor], record: Callable[[Callable[[], None]], Graph]
    ) -> None:
        self.num_replays = 0
        self.obstacle: str | None = None
        self._has_failed = False
        self._module, self._compute_loss, self._record = module, loss, record
        self._parameters = [parameter for parameter in module.parameters() if not is_quantized(parameter)]
        self._weights: list[tuple[bool, int]] = []  # whether each is trained, and its address
        self._steps: dict[object, _Step | None] = {}  # None after a first, eager step
        self._grads: dict[nn.Parameter, Tensor] = {}  # common to all graphs
        self._num_examples = 0
        self._replayed: _Step | None = None

    @property
    def has_replayed(self) -> bool:
        """Whether the last step was replayed."""
        return self._replayed is not None

    def set_obstacle(self, reason: str | None) -> None:
        """Run the following steps eagerly for this reason, which is logged; None allows graphs."""
        if self._has_failed:
            return
        if reason and reason != self.obstacle:
            rank_zero_info(f"CUDA graphs are off: {reason}.")
            self._forget()
        self.obstacle = reason

    def loss(self, batch: Batch) -> Tensor | None:
        """Return the loss of a training step, whose gradients `set_gradients` sets; None if it must run eagerly.

        The next step overwrites the loss.
        """
        self._replayed = None
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
        key = tuple((name, tensor.shape, tensor.dtype) for name, tensor in batch.items())
        if key not in self._steps:
            self._steps[key] = None
            return None
        step = self._steps[key] or self._capture(batch)
        if step is None:
            return None
        self._steps[key] = step
        torch._foreach_copy_(step.batch, list(batch.values()))
        step.graph.replay()
        self.num_replays += 1
        self._replayed = step
        return step.loss

    def set_gradients(self) -> bool:
        """Set the gradients of a step that was replayed, instead of its backward pass. Return False for others."""
        if self._replayed is None:
            return False
        for parameter, grad in self._replayed.grads:
            parameter.grad = grad
        return True

    def _capture(self, batch: Batch) -> _Step | None:
        """Return the captured step of a batch, or None if it cannot be captured."""
        if hook := next(find_foreign_hooks(self._module), None):
            self._fail(f"{hook} has a hook, which a replay would not call")
            return None
        fixed = {name: tensor.clone() for name, tensor in batch.items()}
        losses: list[Tensor] = []
        grads: list[tuple[nn.Parameter, Tensor]] = []
        seed = torch.initial_seed()

        def run() -> None:
            loss = self._compute_loss(fixed)
            with torch.autocast(loss.device.type, enabled=False):  # as in an eager step
                loss.backward()
            losses.append(loss.detach())
            grads.extend(self._keep_gradients())

        try:
            with _capturing():
                graph = self._record(run)
            if torch.initial_seed() != seed:
                raise RuntimeError("it sets the random seed")
        except RuntimeError as error:
            self._fail(f"a step of {type(self._module).__name__} cannot be captured ({str(error).splitlines()[0]})")
            return None
        finally:
            self._module.zero_grad()
        return _Step(graph, list(fixed.values()), losses[0], grads)

    def _keep_gradients(self) -> Iterator[tuple[nn.Parameter, Tensor]]:
        """Yield the weights with a gradient and their fixed gradients. Copy the present gradients to these."""
        present = {p: p.grad for p in self._parameters if p.grad is not None}
        known = [p for p in present if p in self._grads]
        if known:
            torch._foreach_copy_([self._grads[p] for p in known], [present[p] for p in known])
        self._grads = present | self._grads  # the first graph's own gradients serve all graphs
        return ((p, self._grads[p]) for p in present)

    def _fail(self, reason: str) -> None:
        self.set_obstacle(reason)
        self._has_failed = True

    def _forget(self) -> None:
        self._steps.clear()
        self._grads.clear()


class CapturedSteps(FiniteLosses):
    """Base class of modules whose training steps can be captured as CUDA graphs."""

    cuda_graphs = False
    step_wrapper: Any = None
    loss: Callable[[Batch], Tensor]

    def __init__(self) -> None:
        super().__init__()
        self.graphs: StepGraphs | None = None

    @property
    def length_multiple(self) -> int:
        """A number of tokens. The data module pads training batches to a multiple of it."""
        return LENGTH_MULTIPLE if self.cuda_graphs and torch.cuda.is_available() else 1

    def captured_loss(self, batch: Batch) -> Tensor:
        """Return the loss of a training step, from a graph if there is one."""
        loss = self.graphs.loss(batch) if self.graphs and self.is_capturable(batch) else None
        return self.loss(batch) if loss is None else loss

    def is_capturable(self, batch: Batch) -> bool:
        """Return whether a step on this batch neither waits for the device nor does anything that is done once."""
        return True

    def set_captured_gradients(self) -> bool:
        """Set the gradients if the last step was replayed; return False if it needs a backward pass."""
        return self.graphs is not None and self.graphs.set_gradients()

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
            self.graphs = StepGraphs(self, self.loss, CudaRecorder())
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
def _capturing() -> Iterator[None]:
    """Context manager without the cache of autocast: a graph has to cast the weights itself."""
    was_enabled = torch.is_autocast_cache_enabled()
    torch.clear_autocast_cache()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(was_enabled)
