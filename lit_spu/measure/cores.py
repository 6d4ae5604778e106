"""The processor's share of this process."""

from __future__ import annotations

import os


def cores() -> int:
    """How many cores this process may use; where the system cannot tell, how many there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
