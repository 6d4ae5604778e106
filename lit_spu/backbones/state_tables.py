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
        return sum(part.nbytes for table in self._tables.values() for part in table if part is not None)

    def are_filled(self, rows: Array) -> bool:
        """Return whether the tables have the states of all of these texts."""
        return bool(self._is_filled[rows].all())

    def positions(self, rows: Array, longest: int) -> dict[int, Tensor]:
        """Return the positions [rows, tokens] of texts that are padded to a length, for each stack, on the host."""
        return {
            stack: torch.from_numpy(self.texts.positions(stack, rows, longest if stack == 0 else None))
            for stack in self._tables
        }

    def read(self, positions: Mapping[int, Tensor], pinned: bool = False) -> Stacks:
        """Return the states at positions [batch, tokens] of each stack, [states, batch, tokens, width]."""
        gathers = {stack: partial(_gather, where.to(self.device), pinned) for stack, where in positions.items()}
        return {stack: self._tables[stack].map(gather) for stack, gather in gathers.items()}

    def fill(self, rows: Array, states: Stacks) -> None:
        """Save the states of a batch, if they are not there yet.

        Args:
            rows: The rows of the batch's texts, of which some may be equal.
            states: Their states. Those of padding are not read.
        """
        new_rows, places = np.unique(rows, return_index=True)
        is_new = ~self._is_filled[new_rows]
        new_rows, places = new_rows[is_new], places[is_new]
        for stack, encoded in states.items():
            longest = encoded.numbers.shape[2]
            positions = self.texts.positions(stack, new_rows, longest)
            is_real = positions > 0
            tokens = torch.from_numpy((places[:, None] * longest + np.arange(longest))[is_real])
            for table, part in zip(self._tables[stack], encoded, strict=True):
                if table is not None and part is not None:
                    chosen = part.flatten(1, 2).index_select(1, tokens.to(part.device)).to(self.device)
                    table.index_copy_(1, torch.from_numpy(positions[is_real]).to(self.device), chosen)
        self._is_filled[new_rows] = True


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
