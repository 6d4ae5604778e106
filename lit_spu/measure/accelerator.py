"""Measure the peak memory of an accelerator."""

from __future__ import annotations

import torch


class AcceleratorPeak:
    """Peak memory of torch's allocator on one device since the last `reset`.

    Allocated bytes belong to tensors. Reserved bytes are those that the allocator took from the device, so that other
    processes cannot use them.

    Args:
        device: An accelerator.

    Raises:
        RuntimeError: If torch has no memory counters for the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        try:
            self.reset()
        except (AttributeError, NotImplementedError, RuntimeError) as error:  # depends on device and version
            raise RuntimeError(f"torch has no memory counters for {device}") from error

    def reset(self) -> None:
        """Forget the peaks so far."""
        torch.accelerator.reset_peak_memory_stats(self._device)

    def peak_bytes(self) -> tuple[int, int]:
        """Return the peaks since the last `reset`: the bytes in tensors, and the bytes taken from the device."""
        counts = torch.accelerator.memory_stats(self._device)  # at once, because it copies all of its many counters
        return counts.get("allocated_bytes.all.peak", 0), counts.get("reserved_bytes.all.peak", 0)
