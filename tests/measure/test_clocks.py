"""Clocks and durations compared with known times."""

from __future__ import annotations

import time
from itertools import count

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lit_spu.measure import Clock, Durations, interleave


@given(
    seconds=st.lists(st.floats(1e-6, 1e3), min_size=1, max_size=30),
    warmup=st.integers(0, 5),
    quantile=st.sampled_from([0.0, 0.5, 0.95, 1.0]),
)
def test_quantiles_skip_the_warmup(seconds: list[float], warmup: int, quantile: float) -> None:
    durations = Durations(warmup)
    for value in [1e6] * warmup + seconds:
        durations.add(value)
    ordered = sorted(seconds)
    place = quantile * (len(ordered) - 1)
    low, high = ordered[int(place)], ordered[min(int(place) + 1, len(ordered) - 1)]
    assert durations.milliseconds(quantile) == pytest.approx(1000 * (low + (place - int(place)) * (high - low)))


def test_a_clock_measures_a_sleep() -> None:
    clock = Clock(torch.device("cpu"))
    start = clock.now()
    time.sleep(0.05)
    assert 0.05 <= clock.seconds(start, clock.now()) < 0.5


def test_interleaved_calls_alternate_and_the_warmup_is_dropped() -> None:
    ticks = count()
    order: list[str] = []

    def a() -> None:
        order.append("a")

    def b() -> None:
        order.append("b")
        next(ticks)

    seconds = interleave({"a": a, "b": b}, rounds=3, warmup=2, clock=lambda: float(next(ticks)))
    assert order == ["a", "b"] * 5
    assert seconds == {"a": [1.0] * 3, "b": [2.0] * 3}  # b itself advances the clock by one


def test_a_short_call_runs_untimed_after_a_long_one() -> None:
    now = 0.0
    order: list[str] = []

    def taking(name: str, seconds: float) -> None:
        nonlocal now
        now += seconds
        order.append(name)

    calls = {
        "long": lambda: taking("long", 20.0),
        "half": lambda: taking("half", 10.0),
        "one": lambda: taking("one", 1),
    }
    seconds = interleave(calls, rounds=2, warmup=1, clock=lambda: now)
    # the first four short calls of a round are untimed: a fifth of the long call
    assert order == ["long", "half", "one"] + ["long", "half", *["one"] * 5] * 2
    assert seconds == {"long": [20.0] * 2, "half": [10.0] * 2, "one": [1.0] * 2}


@pytest.mark.gpu
def test_a_cuda_clock_times_the_device_instead_of_the_queueing() -> None:
    device = torch.device("cuda")
    clock = Clock(device)
    matrix = torch.randn(8192, 8192, device=device)
    matrix @ matrix
    torch.cuda.synchronize()
    queue_start = time.perf_counter()
    start = clock.now()
    for _ in range(20):
        matrix @ matrix
    end = clock.now()
    queued = time.perf_counter() - queue_start
    assert clock.seconds(start, end) > 2 * queued
