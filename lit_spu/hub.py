"""Whether the Hugging Face hub can be had, found out in seconds; its own client tries for half a minute."""

from __future__ import annotations

import os
import socket
from functools import cache
from urllib.parse import urlsplit
from urllib.request import getproxies


@cache
def reachable(timeout: float = 3.0) -> bool:
    """Whether the hub answers, or, behind a proxy, may answer; asked once a process."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if getproxies().get("https") or os.environ.get("HF_ENDPOINT"):
        return True
    address = urlsplit(constants.ENDPOINT)
    try:
        socket.create_connection((address.hostname, address.port or 443), timeout).close()
    except OSError:
        return False
    return True
