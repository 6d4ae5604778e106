"""One training step of a method on made-up tokens, without data or Trainer: what estimates and benchmarks run."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lit_spu.measure import LiveBytes
from lit_spu.methods.base import Method
from lit_spu.methods.zeroth_order import ZerothOrder
from lit_spu.tasks import Task


def batch_of(examples: int, tokens: int, task: Task) -> dict[str, Tensor]:
    """Random tokens without padding, of which every vocabulary has those few."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.rand(examples) if task.regression else torch.randint(len(task.labels), (examples,))
    return {
        "input_ids": torch.randint(7, 16, (examples, tokens), generator=generator),
        "attention_mask": torch.ones(examples, tokens, dtype=torch.long),
        "labels": labels,
        "index": torch.arange(examples),
    }


def training_step(method: Method, batch: dict[str, Tensor]) -> tuple[Callable[..., None], list[torch.optim.Optimizer]]:
    """One training step, on that batch or another, as a call, and its optimizers: the Trainer's, without its logs."""
    alone = SimpleNamespace(broadcast=lambda value: value, reduce=lambda value, **_: value)
    stand_in: Any = SimpleNamespace(estimated_stepping_batches=10_000, strategy=alone, global_step=0, world_size=1)
    stand_in.strategy.backward = lambda loss, _, **inputs: loss.backward(**inputs)
    method.trainer = stand_in
    configured = method.configure_optimizers()
    each = configured if isinstance(configured, list) else [configured]
    optimizers: list[torch.optim.Optimizer] = [one["optimizer"] for one in each]
    method.train()

    def step(batch: dict[str, Tensor] = batch) -> None:
        if isinstance(method, ZerothOrder):
            method.take_step(batch, *optimizers)
            return
        method.loss(batch).backward()
        optimizers[0].step()
        optimizers[0].zero_grad()

    return step, optimizers


def live_bytes(method: Method, step: Callable[[], None], optimizers: list[torch.optim.Optimizer]) -> LiveBytes:
    """The greater of two steps: the first makes the optimizer's state, the second starts with it."""
    counted = []
    for _ in range(2):
        with LiveBytes(method, optimizers) as live:
            step()
        counted.append(live)
    return max(counted, key=lambda live: live.peak_bytes)
