"""Peak resident memory compared with an allocation of known size."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lit_spu.measure import MIB, ResidentPeak, resident

SIZE = 192 * MIB  # too large for malloc's pools, so it is returned to the system


@pytest.fixture(params=["kernel", "sampled"])
def peak(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ResidentPeak]:
    if request.param == "sampled":
        monkeypatch.setattr(resident, "_CLEAR_REFS", tmp_path / "absent" / "clear_refs")
    peak = ResidentPeak()
    if request.param == "kernel" and not peak.exact:
        pytest.skip("this system has no peak that can be reset")
    assert peak.exact == (request.param == "kernel")
    yield peak
    peak.close()


def test_counts_a_known_allocation_until_reset(peak: ResidentPeak) -> None:
    peak.reset()
    before = peak.peak_bytes()
    tensor = torch.ones(SIZE // 4)
    held = peak.peak_bytes()
    del tensor
    after = peak.peak_bytes()
    peak.reset()
    assert held - before == pytest.approx(SIZE, rel=0.05)
    assert after == pytest.approx(held, abs=MIB)  # the kernel counts in batches of pages
    assert peak.peak_bytes() - before < 0.1 * SIZE


def test_the_sampler_counts_memory_freed_before_the_reading(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(resident, "_CLEAR_REFS", tmp_path / "absent" / "clear_refs")
    peak = ResidentPeak()
    before = peak.peak_bytes()
    tensor = torch.ones(SIZE // 4)
    for _ in range(50):
        tensor.add_(1)  # long enough for several samples
    del tensor
    assert peak.peak_bytes() - before == pytest.approx(SIZE, rel=0.05)
    peak.close()
