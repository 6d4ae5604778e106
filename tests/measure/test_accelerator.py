"""Peak memory of an accelerator, and the error if there is none."""

from __future__ import annotations

import pytest
import torch

from lit_spu.measure import MIB, AcceleratorPeak


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
def test_the_error_names_a_device_without_counters() -> None:
    with pytest.raises(RuntimeError, match="no memory counters for cuda:0"):
        AcceleratorPeak(torch.device("cuda:0"))


@pytest.mark.gpu
def test_counts_a_known_allocation_until_reset() -> None:
    peak = AcceleratorPeak(torch.device("cuda:0"))
    before, _ = peak.peak_bytes()
    tensor = torch.ones(64 * MIB, device="cuda:0")
    del tensor
    allocated, reserved = peak.peak_bytes()
    assert allocated - before == 256 * MIB
    assert reserved >= allocated
    peak.reset()
    assert peak.peak_bytes()[0] == before
