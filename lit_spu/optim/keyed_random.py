"""Random numbers by key. A key determines its number, on any machine and in any order of calls."""

from __future__ import annotations

from hashlib import blake2b

import torch

_MASK_64 = 2**64 - 1


def key_of(*parts: int | str) -> int:
    """Return the key of these parts, a hash of 63 bits."""
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


def mix_64(number: int) -> int:
    """Return 64 random-looking bits for an integer (SplitMix64)."""
    x = (number + 1) * 0x9E3779B97F4A7C15 & _MASK_64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _MASK_64
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _MASK_64
    return x ^ x >> 31


class KeyedGenerators:
    """One generator a device, seeded again for each draw."""

    def __init__(self) -> None:
        self._generators: dict[torch.device, torch.Generator] = {}

    def seed(self, device: torch.device, key: int) -> torch.Generator:
        """Return the device's generator, seeded by a key."""
        if device not in self._generators:
            self._generators[device] = torch.Generator(device)
        return self._generators[device].manual_seed(mix_64(key) >> 1)
