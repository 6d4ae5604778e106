"""The peak of an accelerator's memory over a window."""

from __future__ import annotations

import torch


class AcceleratorPeak:
    """The most memory that torch's allocator of one device gave out, and held, since the last `reset`.

    Allocated is what tensors took; reserved is what the allocator took from the device for them, and so what other
    processes cannot have.

    Args:
        device: an accelerator.

    Raises:
        RuntimeError: if torch keeps no memory counters for the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        try:
            self.reset()
        except (AttributeError, NotImplementedError, RuntimeError) as error:  # which one differs by device and version
            raise RuntimeError(f"torch keeps no memory counters for {device}") from error

    def reset(self) -> None:
        """Begin a new window."""
        torch.accelerator.reset_peak_memory_stats(self._device)

    def allocated_bytes(self) -> int:
        """Most bytes in tensors at once since the last `reset`."""
        return torch.accelerator.max_memory_allocated(self._device)

    def reserved_bytes(self) -> int:
        """Most bytes taken from the device at once since the last `reset`."""
        return torch.accelerator.max_memory_reserved(self._device)
