"""Forward passes with perturbed weights, without a change to the weights themselves.

While a block runs, its weights are views of scratch memory that holds flat + scale·z. Afterwards they are views of
their unit's buffer again, to which nothing was written.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_spu.backbones.hooks import override_forward, position_wise
from lit_spu.optim.noise import Noise
from lit_spu.optim.units import ALIGNMENT, Layout, Unit


class Perturbed:
    """Perturbation of a model's weights during forward passes.

    Args:
        layout: The units of the weights.
        noise: Distribution of z. Its `begin` chooses the direction and its scale.
        readers: Modules that read rows of a table, called with the row indices first, and their tables.
    """

    def __init__(self, layout: Layout, noise: Noise, readers: Sequence[tuple[nn.Module, nn.Parameter]]) -> None:
        self.layout, self.noise = layout, noise
        # fp32 units are perturbed last: noise for units of other dtypes is drawn in their scratch memory before
        self.blocks = [(b, sorted(units, key=lambda unit: unit.dtype is torch.float32)) for b, units in layout.blocks]
        tables = {table.weights[0]: table for table in layout.tables}
        self.readers = [(module, tables[weight]) for module, weight in readers if weight in tables]

    def flatten(self) -> None:
        """Allocate the buffers and the scratch memory of all units whose weights are not in a buffer."""
        num_moved = sum(unit.flatten() for unit in self.layout.units)
        if not num_moved:
            return
        sizes: dict[tuple[torch.device, torch.dtype], int] = defaultdict(int)
        scratch_begins = []
        for _, units in self.blocks:  # one block runs at a time: they share their memory
            ends: dict[torch.dtype, int] = defaultdict(int)
            for unit in units:
                scratch_begins.append((unit, ends[unit.dtype]))
                ends[unit.dtype] += -(-unit.numel // ALIGNMENT) * ALIGNMENT
                sizes[unit.device, unit.dtype] = max(sizes[unit.device, unit.dtype], ends[unit.dtype])
        memory = {
            (device, dtype): self.noise.buffer(max(size, self.noise.buffer_numel), device)
            if dtype is torch.float32
            else torch.empty(size, dtype=dtype, device=device)
            for (device, dtype), size in sizes.items()
        }
        for unit, begin in scratch_begins:
            unit.set_scratch(memory[unit.device, unit.dtype][begin : begin + unit.numel])
        for unit in self.layout.others:
            unit.set_scratch(torch.empty_like(unit.flat))

    @contextmanager
    def apply(self, active: Collection[Unit]) -> Iterator[None]:
        """Context manager in which the active units are perturbed."""
        restores: list[Callable[[], None]] = []
        cached_casts = torch.is_autocast_cache_enabled()
        try:
            torch.set_autocast_cache_enabled(False)  # the cache knows a weight by its identity
            for unit in self.layout.others:
                if unit in active:
                    self._swap(unit)
            for block, units in self.blocks:
                if found := [unit for unit in units if unit in active]:
                    restores.append(override_forward(block, partial(self._run_block, found)))
            for module, table in self.readers:
                if table in active:
                    restores.append(override_forward(module, partial(self._read_rows, table)))
            yield
        finally:
            torch.set_autocast_cache_enabled(cached_casts)
            for restore in reversed(restores):
                restore()
            for unit in self.layout.units:
                unit.restore_if_swapped()

    def _swap(self, unit: Unit) -> None:
        for part in self.noise.parts(unit):
            self.noise.add(unit, part, unit.flat[part.span], unit.scratch[part.span])
        unit.swap()

    @position_wise
    def _run_block(self, units: Sequence[Unit], forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        try:
            for unit in units:
                self._swap(unit)
            return forward(*args, **kwargs)
        finally:
            for unit in units:
                unit.restore_if_swapped()

    @position_wise
    def _read_rows(self, table: Unit, forward: Callable[..., Any], row_indices: Tensor, *_: Any) -> Tensor:
        weight, flat_indices = table.weights[0], row_indices.flatten()
        rows = F.embedding(flat_indices, weight)
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        self.noise.add_rows(table, flat_indices, rows)
        if table.marks is not None:
            table.marks.index_fill_(0, flat_indices, 1.0)
        return rows.to(weight.dtype).view(*row_indices.shape, -1)
