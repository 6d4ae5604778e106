"""Count the operators that a training step of every method launches on a GPU, on any machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from unittest.mock import patch

import torch

from benchmarks.methods import FORWARD, FULL, Batch, make_forward_pass, make_plain_copy, make_step, open_cache
from lit_spu.measure import Launches, interleave
from lit_spu.methods.base import Method


@dataclass(frozen=True)
class Count:
    """Counts of one row: launching operators by phase, waits for the device, and tensors copied to it.

    `milliseconds` is the processor time of a step with two short texts and narrow models: Python and dispatch.
    """

    name: str
    forward: int
    backward: int
    optimizer: int
    waits: int
    own_waits: int
    host_copies: int
    milliseconds: float | None = None

    @property
    def total(self) -> int:
        """Number of launching operators."""
        return self.forward + self.backward + self.optimizer


def count_launches(methods: Mapping[str, Method], batch: Batch, rounds: int = 0) -> list[Count]:
    """Count a step of every method, the third one: the first ones create the optimizer's state.

    MeZO draws the noise of tables as on a GPU, where it does not wait to know which rows are read.

    Args:
        methods: Methods by the name of their row.
        batch: The batch of the steps.
        rounds: Number of timed rounds; 0 measures no time.
    """
    on_host = "lit_spu.backbones.activation_cache._is_on_host"  # there, a cache compares tokens
    with patch("lit_spu.optim.noise.SMALL_DRAWS", frozenset[str]()), patch(on_host, lambda batch: False):
        return _count_launches(methods, batch, rounds)


def _count_launches(methods: Mapping[str, Method], batch: Batch, rounds: int) -> list[Count]:
    torch.set_num_threads(1)
    plain = make_plain_copy(methods[FULL].backbone)

    def make_calls(batch: Batch) -> dict[str, tuple[Callable[[], None], list[torch.optim.Optimizer]]]:
        steps = {name: make_step(name, method, open_cache(method, batch)) for name, method in methods.items()}
        return steps | {FORWARD: (make_forward_pass(plain, batch), [])}

    counted: dict[str, Launches] = {}
    for name, (call, optimizers) in make_calls(batch).items():
        call()
        call()
        with Launches(optimizers) as counted[name]:
            call()
    seconds = {}
    if rounds:
        short = {name: tensor[:2, :8] if tensor.dim() > 1 else tensor[:2] for name, tensor in batch.items()}
        seconds = interleave({name: call for name, (call, _) in make_calls(short).items()}, rounds)
    rows = [
        Count(
            name=name,
            forward=launches.by_phase["forward"],
            backward=launches.by_phase["backward"],
            optimizer=launches.by_phase["optimizer"],
            waits=launches.waits.total(),
            own_waits=launches.own_waits,
            host_copies=launches.host_copies.total(),
            milliseconds=1000 * median(seconds[name]) if rounds else None,
        )
        for name, launches in counted.items()
    ]
    return sorted(rows, key=lambda row: row.total)


def make_table(title: str, counts: Sequence[Count]) -> list[str]:
    """Return the lines of a Markdown table."""
    lines = [
        f"| {title} | forward | backward | optimizer | operators | waits, ours | host copies | host ms |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in counts:
        numbers = [
            row.forward,
            row.backward,
            row.optimizer,
            row.total,
            f"{row.waits}, {row.own_waits}",
            row.host_copies,
        ]
        milliseconds = "" if row.milliseconds is None else f"{row.milliseconds:.1f}"
        lines.append("| " + " | ".join(map(str, [row.name, *numbers, milliseconds])) + " |")
    return lines
