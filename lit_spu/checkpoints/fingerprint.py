"""Fingerprints of weights: short values that differ when the weights differ."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def fingerprint(named: Iterable[tuple[str, Tensor]]) -> str:
    """Return 16 hexadecimal digits, a hash of named tensors.

    The hash covers their names, their shapes and 64 values of each tensor at even distances.
    """
    digest = hashlib.sha256()
    for name, tensor in named:
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 64)][:64].float().cpu()
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()[:16]


def checksum(tensors: Iterable[Tensor]) -> Tensor:
    """Return an int64 checksum of all bits of some tensors, a scalar on their device.

    Each element's bits count as an integer. The checksum is a weighted sum of the tensors' sums, with the weights 1, 3,
    5 and so on.
    """
    bits = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = [tensor.detach().contiguous().view(bits[tensor.element_size()]).sum() for tensor in tensors]
    return sum(((2 * number + 1) * total for number, total in enumerate(sums)), torch.zeros_like(sums[0]))
