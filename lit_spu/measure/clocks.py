"""Time: instants that are right on an accelerator too, durations without their warm-up, and interleaved rounds."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import TypeAlias, cast

import torch

Instant: TypeAlias = "float | torch.cuda.Event"


class Clock:
    """Marks instants in the work of one device, and tells the time between two of them.

    A CUDA device runs behind the program, so there an instant is an event in its queue: marking it waits for nothing.
    Other accelerators are synchronised at every instant; on a CPU it is `time.perf_counter`.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def now(self) -> Instant:
        """This instant."""
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self._device))
            return event
        if self._device.type != "cpu":
            torch.accelerator.synchronize(self._device)
        return time.perf_counter()

    def seconds(self, start: Instant, end: Instant) -> float:
        """Seconds from one instant to a later one; waits until the device has reached it."""
        if isinstance(end, float):
            return end - cast(float, start)
        end.synchronize()
        return float(cast(torch.cuda.Event, start).elapsed_time(end)) / 1000


class Durations:
    """How long something took, each time that it happened.

    Args:
        warmup: the first so many are not kept: they pay for allocation, compilation and caches.
    """

    def __init__(self, warmup: int = 0) -> None:
        self.seconds: list[float] = []
        self._warmup = warmup

    def add(self, seconds: float) -> None:
        """Keep one more, once the warm-up is over."""
        if self._warmup:
            self._warmup -= 1
        else:
            self.seconds.append(seconds)

    def milliseconds(self, quantile: float = 0.5) -> float:
        """A quantile, interpolated: by default the median. There must be at least one duration."""
        return torch.tensor(self.seconds, dtype=torch.float64).quantile(quantile).item() * 1000


def interleave(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, list[float]]:
    """Time every call once a round, round after round, so that a busy machine slows all of them alike.

    Compare two calls by the median of their ratios round by round. The default clock counts the process's own work and
    ignores what other programs take; it adds up threads, so measure with one.

    A call that is short beside the longest runs a few times untimed before it is timed, for a fifth of that one's time:
    the memory that a large call freed goes back to the system in what comes behind it, at that one's expense.

    Returns:
        The seconds of each call, one a round after the warm-up.
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
        longest = max(taken[-1] for taken in seconds.values())
        untimed = {name: int(longest / 5 / max(taken[-1], 1e-9)) for name, taken in seconds.items()}
    return {name: taken[warmup:] for name, taken in seconds.items()}
