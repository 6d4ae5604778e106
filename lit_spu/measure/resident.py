"""Measure the peak of the process's resident memory."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread
from weakref import finalize

import psutil

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_INTERVAL = 0.005
"""Seconds between two samples, if the kernel has no peak that can be reset."""


class ResidentPeak:
    """Peak resident memory of this process since the last `reset`.

    On Linux, the kernel records the exact peak (`VmHWM`). Elsewhere a thread takes a sample every 5 ms. The peak
    belongs to the whole process, with imports and memory that malloc has not returned: compare differences, not ratios.
    """

    def __init__(self) -> None:
        self.exact = False
        """True if the kernel records the peak, False if a thread takes samples."""
        self._status = self._clear_refs = -1  # kept open: opening costs more than reading
        with suppress(OSError):
            self._clear_refs, self._status = self._open(_CLEAR_REFS, os.O_WRONLY), self._open(_STATUS, os.O_RDONLY)
            self._reset_kernel_peak()
            self.exact = True
        self._sampled = 0
        self._stop = Event()
        self._sampler: Thread | None = None
        self.reset()

    def reset(self) -> None:
        """Forget the peak so far."""
        if self.exact:
            self._reset_kernel_peak()
        else:
            self.close()
            self._sampled = _resident_bytes()
            self._stop = Event()
            self._sampler = Thread(target=self._sample, args=(self._stop,), daemon=True)
            self._sampler.start()

    def peak_bytes(self) -> int:
        """Return the peak resident bytes since the last `reset`."""
        if self.exact:
            _, _, peak = os.pread(self._status, 1 << 16, 0).partition(b"VmHWM:")
            return int(peak.split(maxsplit=1)[0]) * 1024
        self._sampled = max(self._sampled, _resident_bytes())
        return self._sampled

    def close(self) -> None:
        """Stop the sampling thread, if there is one."""
        self._stop.set()
        if self._sampler:
            self._sampler.join()
            self._sampler = None

    def _reset_kernel_peak(self) -> None:
        os.write(self._clear_refs, b"5")  # 5 sets VmHWM to the present resident memory (Linux, proc(5))

    def _open(self, path: Path, flags: int) -> int:
        """Open a file until this object is deleted."""
        file = os.open(path, flags)
        finalize(self, os.close, file)
        return file

    def _sample(self, stop: Event) -> None:
        while not stop.wait(_INTERVAL):
            self._sampled = max(self._sampled, _resident_bytes())


def _resident_bytes() -> int:
    return int(psutil.Process().memory_info().rss)
