"""Measure time: a clock for any device, durations without warm-up, and interleaved timing of several calls."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TypeAlias, cast

import torch

Instant: TypeAlias = "float | torch.cuda.Event"
"""Instant of a `Clock`: seconds, or an event in the queue of a CUDA device."""


class Clock:
    """Clock of the work on one device.

    A CUDA device runs asynchronously, so an instant is an event in its queue. Recording it does not wait. Other
    accelerators are synchronised at every instant. On a CPU, an instant is `time.perf_counter`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def now(self) -> Instant:
        """Return the present instant."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            return event
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        return time.perf_counter()

    def is_capturing(self) -> bool:
        """Return whether a CUDA graph is captured: the work does not run now, and its events cannot be read."""
        return self._device.type == "cuda" and torch.cuda.is_current_stream_capturing()

    def seconds(self, start: Instant, end: Instant) -> float:
        """Return the seconds between two instants. Waits until the device has reached the second one."""
        if isinstance(end, float):
            return end - cast(float, start)
        end.synchronize()
        return float(cast(torch.cuda.Event, start).elapsed_time(end)) / 1000


class Durations:
    """Durations of repeated calls, without the warm-up.

    Args:
        warmup: Number of durations to drop: the first calls pay for allocation, compilation and caches.
    """

    def __init__(self, warmup: int = 0) -> None:
        self.seconds: list[float] = []
        self._warmup = warmup

    def add(self, seconds: float) -> None:
        """Add a duration, or drop it during the warm-up."""
        if self._warmup:
            self._warmup -= 1
        else:
            self.seconds.append(seconds)

    def milliseconds(self, quantile: float = 0.5) -> float:
        """Return an interpolated quantile, by default the median. At least one duration is required."""
        return torch.tensor(self.seconds, dtype=torch.float64).quantile(quantile).item() * 1000


def interleave(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, list[float]]:
    """Time every call once per round, so that other load on the machine slows all calls equally.

    Compare two calls by the median of their ratios in each round. The default clock counts the processor time of this
    process, without other programs. It adds up threads, so measure with one thread.

    The system reclaims the memory of a large call during the calls after it, which slows them. So a call that is much
    shorter than the longest one first runs untimed, for a fifth of the longest call's time.

    Args:
        calls: Functions by name.
        rounds: Number of timed rounds.
        warmup: Number of rounds before them, whose times are dropped.
        clock: Function that returns the present time in seconds.

    Returns:
        The seconds of each call by name, one per timed round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    untimed = dict.fromkeys(calls, 0)
    for _ in range(warmup + rounds):
        for name, call in calls.items():
            for _ in range(untimed[name]):
                call()
            start = clock()
            call()
            seconds[name].append(clock() - start)
        longest = max(durations[-1] for durations in seconds.values())
        untimed = {name: int(longest / 5 / max(durations[-1], 1e-9)) for name, durations in seconds.items()}
    return {name: durations[warmup:] for name, durations in seconds.items()}
