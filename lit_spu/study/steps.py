"""Run training steps of a method on random tokens, without data or Trainer, for estimates and benchmarks."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lit_spu.measure import LiveBytes
from lit_spu.methods.base import Method
from lit_spu.methods.step_graphs import Graphs, Recorder
from lit_spu.methods.zeroth_order import ZerothOrder
from lit_spu.tasks import Task


def batch_of(examples: int, tokens: int, task: Task) -> dict[str, Tensor]:
    """Make a random batch without padding. Its token ids lie in 7 to 15, which every vocabulary has."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.rand(examples) if task.regression else torch.randint(len(task.labels), (examples,))
    return {
        "input_ids": torch.randint(7, 16, (examples, tokens), generator=generator),
        "attention_mask": torch.ones(examples, tokens, dtype=torch.long),
        "labels": labels,
        "index": torch.arange(examples),
    }


def training_step(
    method: Method, batch: dict[str, Tensor], record: Recorder | None = None
) -> tuple[Callable[..., None], list[torch.optim.Optimizer]]:
    """Prepare a method for training steps like the Trainer's, but without logging.

    Args:
        method: The method.
        batch: The batch of a step.
        record: Function that records parts of a step as graphs. By default steps are eager.

    Returns:
        A function that runs one step, on `batch` or on the batch that it is given; and the method's optimizers.
    """
    strategy = SimpleNamespace(
        broadcast=lambda value: value,
        reduce=lambda value, **_: value,
        backward=lambda loss, _, **inputs: loss.backward(**inputs),
    )
    trainer: Any = SimpleNamespace(estimated_stepping_batches=10_000, strategy=strategy, global_step=0, world_size=1)
    method.trainer = trainer
    configured = method.configure_optimizers()
    configs = configured if isinstance(configured, list) else [configured]
    optimizers: list[torch.optim.Optimizer] = [config["optimizer"] for config in configs]
    method.train()
    graphs = Graphs(method, record) if record else None

    def step(batch: dict[str, Tensor] = batch) -> None:
        method.graphs = graphs
        if isinstance(method, ZerothOrder):
            method.take_step(batch, *optimizers)
            return
        loss = method.captured_loss(batch)
        if not method.set_captured_gradients():
            loss.backward()
        optimizers[0].step()
        optimizers[0].zero_grad()

    return step, optimizers


def live_bytes(method: Method, step: Callable[[], None], optimizers: list[torch.optim.Optimizer]) -> LiveBytes:
    """Return the live bytes of the larger of two steps.

    The first step allocates the optimizer state in its middle, the second one has it from the beginning.
    """
    measured = []
    for _ in range(2):
        with LiveBytes(method, optimizers) as live:
            step()
        measured.append(live)
    return max(measured, key=lambda live: live.peak_bytes)
