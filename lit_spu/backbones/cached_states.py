"""Hidden states in the formats of the activation cache: rounded, and as the bytes of a record."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lit_spu.backbones.activation_store import Record

_NUMPY_DTYPES = {torch.float32: np.float32, torch.bfloat16: np.int16, torch.int8: np.int8}  # numpy has no bfloat16
_SCALE_BYTES = 4

Array = np.ndarray[Any, np.dtype[np.int64]]


class Encoded(NamedTuple):
    """Hidden states of one stack, in the format of the cache."""

    numbers: Tensor  # [states, batch, tokens, width]
    scales: Tensor | None  # [states, batch, tokens, 1] of int8

    @classmethod
    def round(cls, states: Tensor, dtype: torch.dtype) -> Encoded:
        """Return states [states, batch, tokens, width] in a format; int8 has a scale for each token of each state."""
        if dtype is not torch.int8:
            return cls(states.to(dtype), None)
        scales = states.float().abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
        return cls((states / scales).round().to(dtype), scales)

    def decode(self, dtype: torch.dtype) -> Tensor:
        """Return the states in a dtype, [states, batch, tokens, width]."""
        return (self.numbers if self.scales is None else self.numbers * self.scales).to(dtype)

    def map(self, function: Callable[[Tensor], Tensor]) -> Encoded:
        """Apply a function to the numbers and to the scales."""
        return Encoded(function(self.numbers), None if self.scales is None else function(self.scales))

    def to(self, device: torch.device) -> Encoded:
        """Copy to a device, without a wait if this is in pinned memory."""
        return self.map(lambda tensor: tensor.to(device, non_blocking=True))


Stacks = Mapping[int, Encoded]
"""Hidden states by stack, without the stacks that have none."""


def num_bytes(num_states: int, num_tokens: int, width: int, dtype: torch.dtype) -> int:
    """Return the bytes that the states of some tokens take."""
    scale = _SCALE_BYTES if dtype is torch.int8 else 0
    return num_states * num_tokens * (width * dtype.itemsize + scale)


def to_record(states: Stacks, row: int, counts: Sequence[Array]) -> Record:
    """Return the bytes of one text of a batch: for each stack its states [states, tokens, width], then the scales.

    Args:
        states: The states of the batch, in the memory of the host.
        row: The text's row in the batch.
        counts: The number of tokens of each text, for each stack.
    """
    arrays = [
        tensor[:, row, : counts[stack][row]].contiguous().view(torch.uint8).numpy().reshape(-1)
        for stack, encoded in states.items()
        for tensor in encoded
        if tensor is not None
    ]
    record: Record = np.concatenate(arrays)
    return record


class RecordReader:
    """A reader of the records of a batch, stack by stack.

    Args:
        records: The record of each text.
        dtype: The format of the numbers.
        pinned: Return tensors in pinned memory.
    """

    def __init__(self, records: Sequence[Record], dtype: torch.dtype, pinned: bool) -> None:
        self.rest, self.dtype, self.pinned = list(records), dtype, pinned

    def read(self, num_states: int, counts: Array, longest: int, width: int) -> Encoded:
        """Return the states of the next stack, zero after the end of a text.

        Args:
            num_states: Number of states of each token.
            counts: The number of tokens of each text.
            longest: The number of tokens to which the texts are padded.
            width: Width of the states.
        """
        shape = num_states, len(counts), longest
        numbers = torch.empty(*shape, width, dtype=self.dtype, pin_memory=self.pinned)
        scales = torch.empty(*shape, 1, pin_memory=self.pinned) if self.dtype is torch.int8 else None
        raw = (numbers.view(torch.int16) if self.dtype is torch.bfloat16 else numbers).numpy()
        for row, count in enumerate(counts.tolist()):
            for array in (raw, None if scales is None else scales.numpy()):
                if array is not None:
                    array[:, row, :count] = self._take(row, array.dtype, num_states, count, array.shape[-1])
                    array[:, row, count:] = 0
        return Encoded(numbers, scales)

    def _take(self, row: int, dtype: Any, *shape: int) -> Any:
        """Remove and return the next numbers of a text's record."""
        end = math.prod(shape) * np.dtype(dtype).itemsize
        taken, self.rest[row] = self.rest[row][:end], self.rest[row][end:]
        return taken.view(dtype).reshape(shape)
