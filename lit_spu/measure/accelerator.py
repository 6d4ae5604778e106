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

    def allocated_bytes(self) -> int:
        """Return the peak of the bytes in tensors since the last `reset`."""
        return torch.accelerator.max_memory_allocated(self._device)

    def reserved_bytes(self) -> int:
        """Return the peak of the bytes taken from the device since the last `reset`."""
        return torch.accelerator.max_memory_reserved(self._device)
