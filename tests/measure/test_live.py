"""Live bytes compared with sums by hand, the profiler, and the garbage collector."""

from __future__ import annotations

import gc
import json
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils._python_dispatch import TorchDispatchMode

from lit_spu.measure import Kind, LiveBytes

KIB = 1024


def kib(count: int) -> Tensor:
    return torch.zeros(count * KIB, dtype=torch.uint8)


@given(sizes=st.lists(st.integers(1, 64), min_size=1, max_size=8), num_alive=st.integers(0, 7))
@settings(deadline=None, max_examples=30)
def test_peak_is_the_largest_sum_of_live_tensors(sizes: list[int], num_alive: int) -> None:
    alive: list[Tensor] = []
    most = 0
    with LiveBytes() as live:
        for size in sizes:
            alive.append(kib(size))
            most = max(most, sum(tensor.nbytes for tensor in alive))
            del alive[: max(0, len(alive) - num_alive)]
    assert live.entry_bytes == 0
    assert live.peak_bytes == live.above_bytes == most
    assert live.by_kind[Kind.REST] == most


def test_views_count_once_and_freed_storages_do_not_count() -> None:
    with LiveBytes() as live:
        tensor = kib(4)
        view = tensor[: 2 * KIB].view(2, KIB)
        del tensor
        other = kib(3)  # 7 KiB: the view holds all four
        del view
        kib(1)
    assert live.peak_bytes == 7 * KIB
    assert other.nbytes == 3 * KIB


def test_mean_is_over_operators() -> None:
    with LiveBytes() as live:
        first = kib(2)
        second = kib(4)
        del first
        third = kib(6)
    assert live.mean_bytes == pytest.approx((2 + 6 + 10) * KIB / 3)
    assert second.nbytes + third.nbytes == 10 * KIB


def test_tensors_from_outside_count_from_the_start() -> None:
    module = nn.Linear(8, 8, bias=False)
    batch = torch.ones(16, 8)
    with LiveBytes(module) as live, torch.no_grad():
        held = kib(1)
        module(batch)
    made = held.nbytes + 16 * 8 * 4
    assert live.entry_bytes == 8 * 8 * 4 + batch.nbytes
    assert live.above_bytes == made
    assert live.mean_bytes > live.entry_bytes + held.nbytes
    assert sum(live.by_kind.values()) == live.peak_bytes


def test_a_resized_storage_counts_under_its_new_size() -> None:
    with LiveBytes() as live:
        tensor = kib(1)
        tensor.resize_(5 * KIB)
        kib(1)
    assert live.peak_bytes == 6 * KIB


def test_kinds_of_a_training_step() -> None:
    """A chain x → Linear → ReLU → Linear: every tensor can be counted by hand."""
    width, batch = 64, 256
    model = nn.Sequential(nn.Linear(width, width, bias=False), nn.ReLU(), nn.Linear(width, width, bias=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, foreach=False, fused=True)
    inputs = torch.randn(batch, width)

    def step() -> None:
        torch.autograd.backward(model(inputs).sum())
        optimizer.step()
        optimizer.zero_grad()

    with LiveBytes(model, [optimizer]) as first:
        step()
    weights, activation = 2 * width * width * 4, batch * width * 4
    assert first.entry_bytes == weights + inputs.nbytes
    with LiveBytes(model, [optimizer]) as second:
        step()
    state = 2 * weights
    assert second.by_kind[Kind.WEIGHTS] == weights
    assert state <= second.by_kind[Kind.OPTIMIZER] <= state + 64  # and a step counter per parameter
    # The peak is in the backward pass. The second weight's gradient exists, x and relu(x) are saved (relu(x) once, for
    # the ReLU and the Linear), and the gradients of relu(x) and of its input are being computed.
    assert second.by_kind[Kind.ACTIVATIONS] == 2 * activation
    assert second.by_kind[Kind.GRADIENTS] == weights // 2
    assert second.by_kind[Kind.REST] <= 2 * activation + 64


def test_gradients_and_optimizer_state_have_their_kinds_at_the_peak() -> None:
    """Weights so large that the step itself is the peak: weights, gradients and both moments."""
    model = nn.Linear(512, 512, bias=False)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    with LiveBytes(model, [optimizer]) as live:
        torch.autograd.backward(model(torch.ones(1, 512)).sum())
        optimizer.step()
        optimizer.zero_grad()
    weights = 512 * 512 * 4
    assert live.by_kind[Kind.WEIGHTS] == weights
    assert live.by_kind[Kind.GRADIENTS] == weights
    assert live.by_kind[Kind.OPTIMIZER] == pytest.approx(2 * weights, abs=64)
    assert live.by_kind[Kind.REST] < 0.01 * weights


def test_agrees_with_the_profiler(tmp_path: Path) -> None:
    """In a training step it counts every byte of the allocator, except tiny scalars that no operator makes."""
    model = nn.Sequential(nn.Linear(64, 256), nn.GELU(), nn.LayerNorm(256), nn.Linear(256, 64), nn.Dropout(0.1))
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    inputs = torch.randn(128, 64)

    def step() -> None:
        torch.autograd.backward(model(inputs).square().mean())
        optimizer.step()
        optimizer.zero_grad()

    step()
    with LiveBytes(model, [optimizer]) as live:
        step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    profile.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event["name"] == "[memory]")
    assert live.above_bytes == pytest.approx(max(accumulate(change for _, change in changes)), rel=0.01)


def test_gradients_are_the_same_with_and_without_counting() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    inputs = torch.randn(3, 4)
    plain = torch.autograd.grad(model(inputs).sum(), list(model.parameters()))
    with LiveBytes(model):
        tracked = torch.autograd.grad(model(inputs).sum(), list(model.parameters()))
    assert all(torch.equal(*pair) for pair in zip(plain, tracked, strict=True))


def test_hooks_and_counting_end_with_the_context() -> None:
    parameter = nn.Parameter(torch.ones(2))
    module = nn.Module()
    module.parameter = parameter

    def fail() -> None:
        torch.autograd.backward((parameter * 2).sum())
        raise RuntimeError("not a step")

    live = LiveBytes(module)
    with pytest.raises(RuntimeError, match="not a step"), live:
        fail()
    assert not parameter._post_accumulate_grad_hooks
    peak = live.peak_bytes
    assert peak > 0
    kib(1)
    assert live.peak_bytes == peak


class _Gc(TorchDispatchMode):
    """Independent count: after each operator, all tensors that the garbage collector finds."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.before = self._count()
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.peak = max(self.peak, self._count() - self.before)
        return result

    @staticmethod
    def _count() -> int:  # by type(): some objects warn if isinstance reads their __class__
        storages = {tensor.untyped_storage() for tensor in gc.get_objects() if issubclass(type(tensor), Tensor)}
        return sum(storage.nbytes() for storage in storages)


def test_agrees_with_the_garbage_collector() -> None:
    """In a forward pass without gradients, every tensor has a Python object that the collector finds."""
    model = nn.Sequential(*[nn.Linear(128, 128) for _ in range(4)])
    inputs = torch.randn(64, 128)
    gc.collect()

    def forward() -> None:
        hidden = [inputs]
        for layer in model:
            hidden.append(layer(hidden[-1]).relu())

    with torch.no_grad():
        with _Gc() as collector:
            forward()
        with LiveBytes(model) as live:
            forward()
    assert live.above_bytes == pytest.approx(collector.peak, rel=0.03)


def test_the_timeline_adds_up() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))
    optimizer = torch.optim.AdamW(model.parameters())
    with LiveBytes(model, [optimizer]) as live:
        loss = model(torch.randn(16, 64)).sum()
        live.mark("backward")
        loss.backward()
        optimizer.step()
    totals = [sum(held) for held in zip(*live.timeline.values(), strict=True)]
    assert max(totals) == live.peak_bytes
    assert {kind: held[totals.index(max(totals))] for kind, held in live.timeline.items()} == live.by_kind
    assert sum(totals) / len(totals) == pytest.approx(live.mean_bytes)
    weights = sum(p.nbytes for p in model.parameters())
    assert set(live.timeline[Kind.WEIGHTS]) == {weights}
    (began,) = live.marks
    assert set(live.timeline[Kind.GRADIENTS][:began]) == {0}
    assert live.timeline[Kind.GRADIENTS][-1] == weights
    assert live.timeline[Kind.OPTIMIZER][-1] >= 2 * weights


def test_a_tensor_of_parts_is_the_sum_of_its_parts() -> None:
    """Like quantised weights: the whole tensor has a shape, but no storage."""
    two = TwoTensor(torch.ones(10), torch.ones(10))
    module = nn.ParameterList([nn.Parameter(two, requires_grad=False)])
    with LiveBytes(module) as live:
        module[0].sum()
    assert live.by_kind[Kind.WEIGHTS] == 2 * 10 * 4
