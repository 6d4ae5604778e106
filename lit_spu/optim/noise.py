"""Distributions of the perturbation z that MeZO adds to the weights.

No z is stored. A key determines one z, which is drawn again wherever it is needed. z does not depend on the weights'
dtype. Torch's global generators are not used.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_spu.optim.keyed_random import KeyedGenerators, key_of
from lit_spu.optim.units import MatrixGroup, Unit, is_same_memory, is_same_storage

VERSION = 3
"""Version of the noise, which trajectories and checkpoints record. Version 1 had a key for each weight, and its files
had no entry for the version. Units had other names in version 2."""

PART_NUMEL = 2**23
"""Largest number of elements that are drawn at a time, except for a single row."""

SMALL_PART_NUMEL = 2**13

SMALL_DRAWS = {"cpu"}
"""Device types where a draw costs no more than its elements. There a table's noise has small parts with a key each, and
only the parts with a row that is read are drawn. On other devices each draw is a kernel launch, so there are few,
large parts, and all are drawn: the host would have to wait for the device to know which of them are needed."""


class Part(NamedTuple):
    """Part of a unit's buffer."""

    begin: int
    end: int
    matrices: MatrixGroup | None = None  # of a part whose noise has rank one; None for independent elements

    @property
    def span(self) -> slice:
        return slice(self.begin, self.end)


class Noise(ABC):
    """Base class of distributions of z. Each element has mean 0 and variance 1.

    The methods `add` and `add_rows` add scaled z to weights, for the directions chosen by `begin`. A CUDA graph can
    capture them, unless draws are small: from step to step only tensors change, and the generators that `begin` seeds.

    Args:
        units: All units that have noise.
    """

    def __init__(self, units: Sequence[Unit]) -> None:
        self.units = units
        self._generators = KeyedGenerators()
        self._buffers: dict[torch.device, Tensor] = {}

    @abstractmethod
    def begin(self, keys: Sequence[int], scales: Tensor) -> None:
        """Choose directions.

        Args:
            keys: One key for each direction.
            scales: The factor of z, [groups, directions], or [1, directions] for all groups.
        """

    @abstractmethod
    def parts(self, unit: Unit) -> Sequence[Part]:
        """Return the parts that a unit is drawn in. They cover all of its weights."""

    @abstractmethod
    def add(self, unit: Unit, part: Part, source: Tensor, out: Tensor) -> None:
        """Write source + Σ scale·z for one part to `out`, which may be `source`. Rows without a mark stay."""

    @abstractmethod
    def add_rows(self, table: Unit, row_indices: Tensor, rows: Tensor) -> None:
        """Add Σ scale·z to rows [count, width] of a table in place. `row_indices` [count] are their numbers."""

    def sample(self, unit: Unit, key: int) -> list[Tensor]:
        """Return z in fp32 for each weight of a unit."""
        self.begin([key], torch.ones(1, 1, dtype=torch.float32, device=unit.device))
        z = torch.zeros(unit.numel, dtype=torch.float32, device=unit.device)
        for part in self.parts(unit):
            out = z[part.begin : part.end]
            self.add(unit, part, out, out)
        return unit.views(z)

    @property
    def generators(self) -> Sequence[torch.Generator]:
        """The generators that `add` and `add_rows` have drawn from so far. `begin` seeds them again."""
        return ()

    @property
    def buffer_numel(self) -> int:
        """Number of elements of `buffer` that draws use."""
        return 0

    def buffer(self, numel: int, device: torch.device) -> Tensor:
        """Return an fp32 tensor [numel], in the same memory each time."""
        if device not in self._buffers or self._buffers[device].numel() < numel:
            self._buffers[device] = torch.empty(max(numel, self.buffer_numel), dtype=torch.float32, device=device)
        return self._buffers[device][:numel]

    def release(self) -> None:
        """Drop all memory that depends on the weights' sizes."""
        self._buffers.clear()

    def __repr__(self) -> str:
        return type(self).__name__


class DenseNoise(Noise):
    """Base class of noise whose elements are independent. It is drawn part by part from torch's generators."""

    def __init__(self, units: Sequence[Unit]) -> None:
        super().__init__(units)
        self._keys: Sequence[int] = ()
        self._scales: list[list[Tensor]] = []
        self._passes: Counter[tuple[str, int]] = Counter()  # over each unit and direction, since `begin`
        self._seeded: dict[tuple[str, int, int], torch.Generator] = {}  # by unit, direction and pass
        self._begins: dict[Unit, Tensor] = {}  # of each table: the rows before its parts, [parts, 1]

    @abstractmethod
    def draw(self, out: Tensor, generator: torch.Generator) -> None:
        """Fill a tensor [count] in fp32 with noise."""

    @property
    def generators(self) -> Sequence[torch.Generator]:
        return list(self._seeded.values())

    @property
    def buffer_numel(self) -> int:
        return max(self._part_numel(unit) + 2 * _width(unit) for unit in self.units)

    def begin(self, keys: Sequence[int], scales: Tensor) -> None:
        self._keys, self._scales = keys, [list(row) for row in scales]
        self._passes.clear()
        for (name, number, _), generator in self._seeded.items():
            if number < len(keys):
                generator.manual_seed(key_of(keys[number], name))

    def parts(self, unit: Unit) -> Sequence[Part]:
        numel = self._part_numel(unit)
        begins: Sequence[int] = range(0, unit.numel, numel)
        if unit.marks is not None and _draws_small(unit):
            part_numbers = unit.marks.nonzero().flatten() // (numel // _width(unit))
            begins = [number * numel for number in sorted(set(part_numbers.tolist()))]
        return [Part(begin, min(begin + numel, unit.numel)) for begin in begins]

    def add(self, unit: Unit, part: Part, source: Tensor, out: Tensor) -> None:
        is_free = out.dtype is torch.float32 and not is_same_memory(source, out)
        for number, scale in self._directions(unit):
            memory = out if is_free else self.buffer(len(out), out.device)
            assert memory is out or not is_same_storage(memory, out), "scratch memory holds one direction alone"
            z = self._draw_part(unit, part, number, memory)
            if unit.marks is not None:
                width = _width(unit)
                z.view(-1, width).mul_(unit.marks[part.begin // width : part.end // width, None])
            torch.addcmul(source, z, scale, out=out)
            source, is_free = out, False

    def add_rows(self, table: Unit, row_indices: Tensor, rows: Tensor) -> None:
        find = self._rows_of_few_parts if _draws_small(table) else self._rows_of_all_parts
        for number, scale in self._directions(table):
            for z in find(table, number, row_indices):
                rows.addcmul_(z, scale)

    def _directions(self, unit: Unit) -> Iterator[tuple[int, Tensor]]:
        """Yield the number and the scale of each direction."""
        yield from enumerate(self._scales[unit.group] if len(self._scales) > 1 else self._scales[0])

    def _draw_part(self, unit: Unit, part: Part, number: int, out: Tensor) -> Tensor:
        """Fill `out` with z of a part. If draws are not small, all parts are drawn one after the other."""
        if _draws_small(unit):
            key = key_of(self._keys[number], unit.name) + part.begin
            self.draw(out, self._generators.seed(out.device, key))
            return out
        self._passes[unit.name, number] += part.begin == 0
        drawn = unit.name, number, self._passes[unit.name, number]
        if drawn not in self._seeded or self._seeded[drawn].device != out.device:
            self._seeded[drawn] = torch.Generator(out.device).manual_seed(key_of(self._keys[number], unit.name))
        self.draw(out, self._seeded[drawn])
        return out

    def _rows_of_few_parts(self, table: Unit, number: int, row_indices: Tensor) -> Iterator[Tensor]:
        """Yield z [count, width] of rows. Only the parts that hold one of them are drawn."""
        width, numel = _width(table), self._part_numel(table)
        z = torch.empty(len(row_indices), width, dtype=torch.float32, device=row_indices.device)
        ordered, order = row_indices.sort()
        part_numbers, counts = (ordered // (numel // width)).unique_consecutive(return_counts=True)
        first = 0
        for part_number, count in zip(part_numbers.tolist(), counts.tolist(), strict=True):
            part = Part(part_number * numel, min((part_number + 1) * numel, table.numel))
            drawn = self._draw_part(table, part, number, self.buffer(part.end - part.begin, z.device))
            found = slice(first, first + count)
            z[order[found]] = drawn.view(-1, width)[ordered[found] - part.begin // width]
            first += count
        yield z

    def _rows_of_all_parts(self, table: Unit, number: int, row_indices: Tensor) -> Iterator[Tensor]:
        """Yield for each part z [count, width] of those rows that lie in it, and zeros for the others."""
        width, parts = _width(table), self.parts(table)
        if len(parts) == 1:
            z = self._draw_part(table, parts[0], number, self.buffer(table.numel, row_indices.device))
            yield z.view(-1, width)[row_indices]
            return
        num_rows = self._part_numel(table) // width
        buffer = self.buffer((num_rows + 2) * width, row_indices.device)
        buffer.view(-1, width)[:: num_rows + 1].zero_()  # a row before the part, and one after it
        begins = self._begins.get(table)
        if begins is None or begins.device != row_indices.device:
            rows_before = [[part.begin // width - 1] for part in parts]
            begins = self._begins[table] = torch.tensor(rows_before, device=row_indices.device)
        for part, buffer_rows in zip(parts, (row_indices - begins).clamp_(0, num_rows + 1), strict=True):
            self._draw_part(table, part, number, buffer[width:][: part.end - part.begin])
            yield buffer.view(-1, width)[buffer_rows]

    def _part_numel(self, unit: Unit) -> int:
        """Return the number of elements of a part, in whole rows of a table."""
        numel = SMALL_PART_NUMEL if _draws_small(unit) else PART_NUMEL
        return min(unit.numel, max(1, numel // _width(unit)) * _width(unit))


class GaussianNoise(DenseNoise):
    """Normal noise, as in the MeZO paper. It is the same on CPUs of one instruction set, and on GPUs of one model."""

    def draw(self, out: Tensor, generator: torch.Generator) -> None:
        out.normal_(generator=generator)


class RademacherNoise(DenseNoise):
    """Random signs, 1 or −1."""

    def __init__(self, units: Sequence[Unit]) -> None:
        super().__init__(units)
        self._signs: dict[torch.device, Tensor] = {}

    def draw(self, out: Tensor, generator: torch.Generator) -> None:
        if out.device not in self._signs:
            bits = torch.arange(256, device=out.device)[:, None] >> torch.arange(8, device=out.device) & 1
            self._signs[out.device] = bits.float() * 2 - 1  # of each byte, [256, 8]
        words = torch.empty(-(-len(out) // 64), dtype=torch.int64, device=out.device)
        words.random_(-(2**63), None, generator=generator)
        out.copy_(F.embedding(words.view(torch.uint8).int(), self._signs[out.device]).view(-1)[: len(out)])


class LowRankNoise(Noise):
    """Matrices of rank one (https://arxiv.org/abs/2410.07698).

    z = uvᵀ for a weight [outputs, inputs], with normal u and v. Weights that are not matrices have normal noise.
    The factors of all units are drawn together, by `begin`.
    """

    def __init__(self, units: Sequence[Unit]) -> None:
        super().__init__(sorted(units, key=lambda unit: unit.group))
        self._memory: dict[int, tuple[Tensor, Tensor]] = {}  # by the number of directions
        self._drawn_keys: dict[int, Sequence[int]] = {}  # of the factors in this memory
        self._left = self._right = torch.empty(0)  # of the chosen directions: scaled u and normal noise; v
        self._factor_begins: dict[tuple[str, int], tuple[int, int]] = {}  # in `_left` and `_right`, by unit and part
        self._group_ends: list[int] = []
        left = right = 0
        for unit in self.units:
            self._group_ends += [left] * (unit.group - len(self._group_ends))  # of the groups before
            for part in self.parts(unit):
                self._factor_begins[unit.name, part.begin] = left, right
                if part.matrices:
                    left += part.matrices.num_matrices * part.matrices.rows
                    right += part.matrices.num_matrices * part.matrices.columns
                else:
                    left += part.end - part.begin
        self._group_ends.append(left)
        self._num_left, self._num_factors = left, left + right

    def begin(self, keys: Sequence[int], scales: Tensor) -> None:
        factors, scaled = self._get_memory(len(keys), scales.device)
        if self._drawn_keys.get(len(keys)) != keys:
            for row, key in zip(factors, keys, strict=True):
                row.normal_(generator=self._generators.seed(scales.device, key))
            self._drawn_keys[len(keys)] = keys
        begin = 0
        for scale, end in zip(scales, self._group_ends if len(scales) > 1 else [self._num_left], strict=False):
            torch.mul(factors[:, begin:end], scale[:, None], out=scaled[:, begin:end])
            begin = end
        self._left, self._right = scaled, factors[:, self._num_left :]

    def release(self) -> None:
        super().release()
        self._memory.clear()
        self._left = self._right = torch.empty(0)

    def _get_memory(self, directions: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return memory for the factors, and for those that are scaled, of a number of directions."""
        known = self._memory.get(directions)
        if known is None or known[0].device != device:
            factors = torch.empty(directions, self._num_factors, dtype=torch.float32, device=device)
            known = self._memory[directions] = factors, torch.empty_like(factors[:, : self._num_left])
            self._drawn_keys.pop(directions, None)
        return known

    def parts(self, unit: Unit) -> Sequence[Part]:
        parts = [Part(group.begin, group.end, group) for group in unit.matrix_groups]
        return parts if unit.rest_begin == unit.numel else [*parts, Part(unit.rest_begin, unit.numel)]

    def add(self, unit: Unit, part: Part, source: Tensor, out: Tensor) -> None:
        left, right = self._factor_begins[unit.name, part.begin]
        if part.matrices is None:
            for z in self._left[:, left : left + len(out)]:
                torch.add(source, z, out=out)
                source = out
            return
        factors = self._matrix_factors(part.matrices, left, right)
        source, out = part.matrices.view(source), part.matrices.view(out)
        for u, v in zip(*factors, strict=True):
            # no matrix product, which a replay might compute in another precision
            torch.addcmul(source, (u if unit.marks is None else u * unit.marks)[:, :, None], v[:, None], out=out)
            source = out

    def add_rows(self, table: Unit, row_indices: Tensor, rows: Tensor) -> None:
        (matrices,) = table.matrix_groups
        u, v = self._matrix_factors(matrices, *self._factor_begins[table.name, matrices.begin])
        for left, right in zip(u[:, 0], v[:, 0], strict=True):
            rows.addcmul_(left[row_indices, None], right)

    def _matrix_factors(self, matrices: MatrixGroup, left: int, right: int) -> tuple[Tensor, Tensor]:
        """Return scaled u [directions, matrices, rows] and v [directions, matrices, columns]."""
        count, rows, columns = matrices.num_matrices, matrices.rows, matrices.columns
        u = self._left[:, left : left + count * rows].unflatten(1, (count, rows))
        v = self._right[:, right : right + count * columns].unflatten(1, (count, columns))
        return u, v


def _draws_small(unit: Unit) -> bool:
    return unit.is_table and unit.device.type in SMALL_DRAWS


def _width(unit: Unit) -> int:
    """Return the width of a table's rows, or 1 for other units."""
    return unit.weights[0].shape[1] if unit.is_table else 1
