"""Hidden states of known texts in one tensor for each stack, from which those of a batch are gathered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from lit_spu.backbones.cached_states import Array, Encoded, Stacks
from lit_spu.backbones.cached_texts import CachedTexts


class StateTables:
    """The states of known texts, [states, positions, width] for each stack, on one device.

    The tokens of the texts have the positions that `CachedTexts` gives them. The state at position 0 is zero, for
    padding.

    Args:
        texts: The texts.
        wanted: For each stack the numbers of its states; a stack without any has no table.
        widths: For each stack the width of its states.
        dtype: The format of the states.
        device: The device that holds them.
    """

    def __init__(
        self,
        texts: CachedTexts,
        wanted: Sequence[Sequence[int]],
        widths: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.texts, self.device = texts, device
        self._is_filled = np.zeros(len(texts), np.bool_)
        self._tables: dict[int, Encoded] = {}
        for stack, counts in enumerate(texts.counts):
            if wanted[stack]:
                # not zeros: the host's memory is taken as it is filled
                shape = len(wanted[stack]), 1 + int(counts.sum())
                numbers = torch.empty(*shape, widths[stack], dtype=dtype, device=device)
                scales = torch.empty(*shape, 1, device=device) if dtype is torch.int8 else None
                self._tables[stack] = Encoded(numbers, scales).map(_with_zero_state)

    @property
    def num_bytes(self) -> int:
        """Bytes of all tables."""
        return sum(tensor.nbytes for table in self._tables.values() for tensor in table if tensor is not None)

    def are_filled(self, text_ids: Array) -> bool:
        """Return whether the tables have the states of all of these texts."""
        return bool(self._is_filled[text_ids].all())

    def positions(self, text_ids: Array, longest: int) -> dict[int, Tensor]:
        """Return the positions [texts, tokens] of texts that are padded to a length, for each stack, on the host."""
        return {
            stack: torch.from_numpy(self.texts.positions(stack, text_ids, longest if stack == 0 else None))
            for stack in self._tables
        }

    def read(self, positions: Mapping[int, Tensor], pinned: bool = False) -> Stacks:
        """Return the states at positions [batch, tokens] of each stack, [states, batch, tokens, width]."""
        gathers = {stack: partial(_gather, to_device(where, self.device), pinned) for stack, where in positions.items()}
        return {stack: self._tables[stack].map(gather) for stack, gather in gathers.items()}

    def fill(self, text_ids: Array, states: Stacks) -> None:
        """Save the states of a batch, if they are not there yet. The host waits only if they come from another device.

        Args:
            text_ids: The texts of the batch, of which some may be equal.
            states: Their states. Those of padding are not read.
        """
        new_ids, rows = np.unique(text_ids, return_index=True)
        is_new = ~self._is_filled[new_ids]
        new_ids, rows = new_ids[is_new], rows[is_new]
        for stack, encoded in states.items():
            longest = encoded.numbers.shape[2]
            positions = self.texts.positions(stack, new_ids, longest)
            is_real = positions > 0
            targets = to_device(torch.from_numpy(positions[is_real]), self.device)
            tokens = torch.from_numpy((rows[:, None] * longest + np.arange(longest))[is_real])
            for table, computed in zip(self._tables[stack], encoded, strict=True):
                if table is not None and computed is not None:
                    chosen = computed.flatten(1, 2).index_select(1, to_device(tokens, computed.device))
                    table.index_copy_(1, targets, to_device(chosen, self.device))
        self._is_filled[new_ids] = True


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device, without a wait from the host to CUDA."""
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=device.type == "cuda")


def _with_zero_state(table: Tensor) -> Tensor:
    table[:, 0] = 0
    return table


def _gather(positions: Tensor, pinned: bool, table: Tensor) -> Tensor:
    """Return the states at positions [batch, tokens] of a table [states, positions, width], in one operator."""
    flat = positions.flatten()
    shape = len(table), len(flat), table.shape[-1]
    out = torch.empty(shape, dtype=table.dtype, device=table.device, pin_memory=pinned)
    torch.index_select(table, 1, flat, out=out)
    return out.view(len(table), *positions.shape, -1)
