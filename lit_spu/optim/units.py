"""Units: weights that are perturbed and updated together, in one buffer.

A unit has one learning rate and one weight decay. Its noise is drawn, added and applied by a few operators, however
many weights it has.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lit_spu.errors import UserError

ALIGNMENT = 64
"""Each weight begins at a multiple of this many elements, where the kernels of matrix products are fast."""


class MatrixGroup(NamedTuple):
    """Matrices of one shape that are adjacent in a unit's buffer."""

    begin: int
    num_matrices: int
    rows: int
    columns: int
    stride: int  # from one matrix to the next

    @property
    def end(self) -> int:
        return self.begin + (self.num_matrices - 1) * self.stride + self.rows * self.columns

    def view(self, part: Tensor) -> Tensor:
        """Return the matrices [matrices, rows, columns] in `part`, the elements from `begin` to `end` of a buffer."""
        size, stride = (self.num_matrices, self.rows, self.columns), (self.stride, self.columns, 1)
        return part.as_strided(size, stride, part.storage_offset())


class Unit:
    """Weights of one parameter group and one dtype. Their data are views of one buffer.

    `flatten` makes the buffer. If a weight's data are replaced afterwards, as by a move to another device, the next
    call of `flatten` makes a new buffer.

    Args:
        name: Name that decides the unit's noise.
        group: Number of the parameter group.
        weights: The weights. Matrices of one shape are put next to each other, before all other weights.
        weight_names: Names of the weights in messages.
        is_table: Whether the unit is one matrix of which evaluations read rows alone.

    Attributes:
        flat: The buffer [numel].
        scratch: Memory for the perturbed weights, [numel] and of the same dtype.
        marks: For each row of a table, 1 if the step's batch reads it, else 0. None if all rows are updated.
    """

    def __init__(
        self,
        name: str,
        group: int,
        weights: Sequence[nn.Parameter],
        weight_names: Mapping[nn.Parameter, str] | None = None,
        is_table: bool = False,
    ) -> None:
        self.name, self.group, self.weight_names, self.is_table = name, group, weight_names or {}, is_table
        self.weights = sorted(weights, key=lambda weight: (not is_matrix(weight), tuple(weight.shape)))
        self.begins, end = [], 0
        for weight in self.weights:
            begin = -(-end // ALIGNMENT) * ALIGNMENT
            self.begins.append(begin)
            end = begin + weight.numel()
        self.numel = end
        matrices = [(b, w) for b, w in zip(self.begins, self.weights, strict=True) if is_matrix(w)]
        self.matrix_groups = []
        for (rows, columns), found in groupby(matrices, key=lambda pair: tuple(pair[1].shape)):
            begins = [begin for begin, _ in found]
            stride = -(-rows * columns // ALIGNMENT) * ALIGNMENT
            self.matrix_groups.append(MatrixGroup(begins[0], len(begins), rows, columns, stride))
        self.rest_begin = self.begins[len(matrices)] if len(matrices) < len(self.weights) else self.numel
        self.flat = self.scratch = torch.empty(0)
        self.marks: Tensor | None = None
        self._own: list[Tensor] = []
        self._perturbed: list[Tensor] = []
        self._is_swapped = False

    @property
    def dtype(self) -> torch.dtype:
        return self.weights[0].dtype

    @property
    def device(self) -> torch.device:
        return self.weights[0].device

    def views(self, buffer: Tensor) -> list[Tensor]:
        """Return the weights' parts of a buffer [numel] in their shapes."""
        return [
            buffer[begin : begin + weight.numel()].view(weight.shape)
            for begin, weight in zip(self.begins, self.weights, strict=True)
        ]

    def flatten(self) -> bool:
        """Move the weights into one buffer. Return False if they are there already.

        Raises:
            UserError: If they have several dtypes or devices.
        """
        self.restore_if_swapped()
        if self._own and all(map(is_same_memory, self.weights, self._own)):
            return False
        self._check_equal()
        first = self.weights[0].data
        if len(self.weights) == 1 and first.is_contiguous():
            self.flat = first.view(-1)
        else:
            self.flat = first.new_zeros(self.numel)
            torch._foreach_copy_(self.views(self.flat), [weight.data for weight in self.weights])
        self._own = self.views(self.flat)
        self.restore()
        return True

    def _check_equal(self) -> None:
        first = self.weights[0]
        for weight in self.weights:
            if (weight.dtype, weight.device) != (first.dtype, first.device):
                name, other = (self.weight_names.get(w, tuple(w.shape)) for w in (weight, first))
                raise UserError(
                    f"{name} is {weight.dtype} on {weight.device}, and {other} {first.dtype} on {first.device}. MeZO"
                    f" updates both together ({self.name}): convert or move both, or make a new optimizer."
                )

    def release(self) -> None:
        """Give each weight memory of its own, and drop the buffer and the scratch memory."""
        self.restore_if_swapped()
        if len(self.weights) > 1:
            for weight, own in zip(self.weights, self._own, strict=False):
                if is_same_memory(weight, own):
                    weight.data = own.clone()
        self.flat = self.scratch = torch.empty(0)
        self._own, self._perturbed = [], []

    def set_scratch(self, scratch: Tensor) -> None:
        self.scratch, self._perturbed = scratch, self.views(scratch)

    def swap(self) -> None:
        """Point the weights at the scratch memory, until `restore`."""
        self._is_swapped = True
        _set_data(self.weights, self._perturbed)

    def restore(self) -> None:
        """Point the weights at the buffer."""
        _set_data(self.weights, self._own)
        self._is_swapped = False

    def restore_if_swapped(self) -> None:
        if self._is_swapped:
            self.restore()


class Layout(NamedTuple):
    """All units of an optimizer."""

    blocks: list[tuple[nn.Module, list[Unit]]]  # units of the weights inside one block
    tables: list[Unit]  # each has one matrix, of which evaluations read rows alone
    others: list[Unit]

    @property
    def units(self) -> list[Unit]:
        return [*(unit for _, units in self.blocks for unit in units), *self.tables, *self.others]


def make_layout(
    weights: Iterable[tuple[int, str, nn.Parameter]],
    blocks: Sequence[nn.Module],
    tables: Iterable[nn.Parameter],
    one_by_one: bool,
) -> Layout:
    """Divide weights into units.

    Args:
        weights: Weights with the numbers of their groups and their names.
        blocks: Modules that run one after the other. A weight inside one of them is used by no other module.
        tables: Matrices that are read by their rows alone.
        one_by_one: Make a unit of each weight that is not inside a block.
    """
    block_of = {parameter: number for number, block in enumerate(blocks) for parameter in block.parameters()}
    num_uses = Counter(parameter for block in blocks for parameter in block.parameters())
    table_set = set(tables)
    members: dict[tuple[str, int, torch.dtype], list[nn.Parameter]] = {}
    names: dict[nn.Parameter, str] = {}
    for group, name, weight in weights:
        names[weight] = name
        if num_uses[weight] == 1:
            owner = f"block {block_of[weight]}"
        elif weight in table_set:
            owner = f"table {name}"
        else:
            owner = f"weight {name}" if one_by_one else "others"
        members.setdefault((owner, group, weight.dtype), []).append(weight)
    layout = Layout([(block, []) for block in blocks], [], [])
    num_dtypes: Counter[tuple[str, int]] = Counter()
    for (owner, group, _), found in members.items():
        name = f"{owner}, group {group}, part {num_dtypes[owner, group]}"  # the noise is the same in every dtype
        num_dtypes[owner, group] += 1
        if num_uses[found[0]] == 1:
            layout.blocks[block_of[found[0]]][1].append(Unit(name, group, found, names))
        elif found[0] in table_set:
            layout.tables.append(Unit(name, group, found, names, is_table=True))
        else:
            layout.others.append(Unit(name, group, found, names))
    assert len({unit.name for unit in layout.units}) == len(members), "units of one name would have the same noise"
    return layout


def is_matrix(weight: Tensor) -> bool:
    """Return whether a weight is a matrix of at least two rows."""
    return weight.dim() == 2 and weight.shape[0] > 1


def _set_data(weights: Sequence[nn.Parameter], values: Sequence[Tensor]) -> None:
    for weight, value in zip(weights, values, strict=True):
        weight.data = value


def is_same_storage(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors are views of the same memory."""
    return bool(a.untyped_storage()._cdata == b.untyped_storage()._cdata)


def is_same_memory(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors begin at the same address."""
    return is_same_storage(a, b) and a.storage_offset() == b.storage_offset()
