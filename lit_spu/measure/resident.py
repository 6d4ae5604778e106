"""The peak of the process's resident memory over a window."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from threading import Event, Thread

import psutil

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_INTERVAL = 0.005
"""Seconds between two samples where the kernel keeps no peak that could be reset."""


class ResidentPeak:
    """The highest resident memory of this process since the last `reset`.

    On Linux the kernel's own high-water mark (`VmHWM`), which misses nothing; elsewhere the highest of a sample every
    5 ms. It counts the whole process, imports and what malloc keeps included: compare differences, not ratios.
    """

    def __init__(self) -> None:
        self.exact = False
        """Whether the kernel keeps the peak, rather than a thread that samples."""
        with suppress(OSError):
            self._clear()
            self.exact = True
        self._sampled = 0
        self._stop = Event()
        self._sampler: Thread | None = None
        self.reset()

    def reset(self) -> None:
        """Begin a new window."""
        if self.exact:
            self._clear()
        else:
            self.close()
            self._sampled = _resident_bytes()
            self._stop = Event()
            self._sampler = Thread(target=self._sample, args=(self._stop,), daemon=True)
            self._sampler.start()

    def peak_bytes(self) -> int:
        """Highest resident memory since the last `reset`."""
        if self.exact:
            line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
            return int(line.split()[1]) * 1024
        self._sampled = max(self._sampled, _resident_bytes())
        return self._sampled

    def close(self) -> None:
        """End the sampling, where there is any."""
        self._stop.set()
        if self._sampler:
            self._sampler.join()
            self._sampler = None

    def _clear(self) -> None:
        _CLEAR_REFS.write_text("5")  # 5: set VmHWM back to what is resident now (Linux, proc(5))

    def _sample(self, stop: Event) -> None:
        while not stop.wait(_INTERVAL):
            self._sampled = max(self._sampled, _resident_bytes())


def _resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)
