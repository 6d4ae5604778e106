"""Distributions of the perturbation z that MeZO adds to a weight.

No z is stored. A key determines one z, which is drawn again wherever it is needed.

Every weight is viewed as a matrix [rows, width]; a vector is a single row. The values of a row depend on the key, the
row's index and the matrix's shape. They do not depend on the weight's dtype or memory layout, nor on the other rows
that are drawn. Torch's global generators are not used.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_spu.optim.keyed_random import mix_64


class Noise(ABC):
    """Base class of distributions of z. Each element has mean 0 and variance 1."""

    block_numel = 2**14
    """Number of elements drawn at a time, in whole rows. A block fits the processor's cache."""

    @abstractmethod
    def draw(self, key: int, rows: range, weight: Tensor, buffer: Tensor | None = None) -> Tensor:
        """Return z [len(rows), width] of one block of rows, in fp32 on the weight's device.

        Args:
            key: Key of z.
            rows: Row indices of the block.
            weight: Matrix [rows, width], of which only the shape and the device matter.
            buffer: A tensor of the block's shape that z may be written to if it is fp32. The caller uses it next, so
                it is in the processor's cache then.

        Returns:
            A tensor that the next call may overwrite.
        """

    def sample(self, key: int, like: Tensor) -> Tensor:
        """Return z in fp32, in the shape of a weight."""
        weight = as_matrix(like)
        z = torch.empty_like(weight, dtype=torch.float32, memory_format=torch.contiguous_format)
        for rows, part in self._blocks(z):
            part.copy_(self.draw(key, rows, weight, part))
        return z.view(like.shape)

    def sample_rows(self, key: int, weight: Tensor, row_indices: Tensor) -> Tensor:
        """Return the rows of z [len(row_indices), width] in fp32, for a weight [rows, width]."""
        z = weight.new_empty(len(row_indices), weight.shape[1], dtype=torch.float32)
        block_rows = self._rows_per_block(weight)
        ordered, order = row_indices.sort()
        blocks, counts = (ordered // block_rows).unique_consecutive(return_counts=True)
        begin = 0
        for block, count in zip(blocks.tolist(), counts.tolist(), strict=True):
            rows = range(block * block_rows, min((block + 1) * block_rows, len(weight)))
            part = slice(begin, begin + count)
            z[order[part]] = self.draw(key, rows, weight)[ordered[part] - rows.start]
            begin += count
        return z

    def perturb(self, key: int, weight: Tensor, scale: float) -> Tensor:
        """Return weight + scale·z, a new tensor of the same shape and dtype."""
        out = torch.empty_like(weight, memory_format=torch.contiguous_format)
        source = as_matrix(weight)
        for (rows, part), (_, target) in zip(self._blocks(source), self._blocks(as_matrix(out)), strict=True):
            torch.add(part, self.draw(key, rows, source, target), alpha=scale, out=target)
        return out

    def perturbed_linear(self, key: int, x: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        """Return the output of a linear layer with the weight + scale·z."""
        return F.linear(x, self.perturb(key, weight, scale), bias)

    def update(
        self, weight: Tensor, steps: Sequence[tuple[int, float]], decay: float, rounding_residual: Tensor | None
    ) -> None:
        """Multiply a weight by 1 − decay and add step·z for every key, in place.

        Args:
            weight: Weight of any shape.
            steps: Pairs of a key and a step.
            decay: Weight decay, multiplied by the learning rate.
            rounding_residual: For a weight in half precision, the rounding error of all updates so far, in the weight's
                dtype and shape. It is updated as well.
        """
        matrix = as_matrix(weight)
        residual = None if rounding_residual is None else as_matrix(rounding_residual)
        for rows, part in self._blocks(matrix):
            moves = ((self.draw(key, rows, matrix), step) for key, step in steps)
            _update(part, None if residual is None else residual[rows.start : rows.stop], moves, decay)

    def update_rows(
        self,
        weight: Tensor,
        row_indices: Tensor,
        steps: Sequence[tuple[int, float]],
        decay: float,
        rounding_residual: Tensor | None,
    ) -> None:
        """Update only some rows of a weight [rows, width]. Their result equals that of `update` to the bit."""
        part = weight[row_indices]
        residual = None if rounding_residual is None else rounding_residual[row_indices]
        _update(part, residual, ((self.sample_rows(key, weight, row_indices), step) for key, step in steps), decay)
        weight[row_indices] = part
        if rounding_residual is not None and residual is not None:
            rounding_residual[row_indices] = residual

    def _rows_per_block(self, weight: Tensor) -> int:
        return max(1, self.block_numel // weight.shape[1])

    def _blocks(self, matrix: Tensor) -> Iterator[tuple[range, Tensor]]:
        """Yield the row indices of every block, and a view of these rows."""
        block_rows = self._rows_per_block(matrix)
        if matrix.shape[0] <= block_rows:  # most weights: splitting them would only add calls
            yield range(matrix.shape[0]), matrix
            return
        begin = 0
        for part in matrix.split(block_rows):
            yield range(begin, begin + len(part)), part
            begin += len(part)

    def __repr__(self) -> str:
        return type(self).__name__


class _GeneratorNoise(Noise):
    """Base class of noise from torch's generators, which are seeded again for every block."""

    def __init__(self) -> None:
        self._generators: dict[torch.device, torch.Generator] = {}
        self._buffers: dict[torch.device, Tensor] = {}

    def _rows_per_block(self, weight: Tensor) -> int:
        if weight.device.type == "cpu":
            return super()._rows_per_block(weight)
        return max(1, 2**22 // weight.shape[1])  # 16 MiB: on a GPU, the number of kernel launches counts

    def _seed_generator(self, key: int, rows: range, weight: Tensor) -> torch.Generator:
        """Return a generator on the weight's device, seeded for a block of rows."""
        device = weight.device
        if device not in self._generators:
            self._generators[device] = torch.Generator(device)
        return self._generators[device].manual_seed(mix_64(key + rows.start) >> 1)

    def _get_buffer(self, numel: int, device: torch.device) -> Tensor:
        """Return an fp32 tensor of `numel` elements, in the same memory each time."""
        if device not in self._buffers or self._buffers[device].numel() < numel:
            self._buffers[device] = torch.empty(max(numel, self.block_numel), dtype=torch.float32, device=device)
        return self._buffers[device][:numel]


class GaussianNoise(_GeneratorNoise):
    """Normal noise, as in the MeZO paper.

    It is the same on all CPUs, and on all GPUs of one model.
    """

    def draw(self, key: int, rows: range, weight: Tensor, buffer: Tensor | None = None) -> Tensor:
        shape = len(rows), weight.shape[1]
        if buffer is not None and buffer.dtype is torch.float32 and buffer.is_contiguous():
            out = buffer.view(-1)
        else:
            out = self._get_buffer(shape[0] * shape[1], weight.device)
        return out.normal_(generator=self._seed_generator(key, rows, weight)).view(shape)


class RademacherNoise(_GeneratorNoise):
    """Random signs, 1 or −1."""

    def __init__(self) -> None:
        super().__init__()
        self._signs: dict[torch.device, Tensor] = {}

    def draw(self, key: int, rows: range, weight: Tensor, buffer: Tensor | None = None) -> Tensor:
        shape, device = (len(rows), weight.shape[1]), weight.device
        if device not in self._signs:
            self._signs[device] = _signs_of_bytes(device)
        count = shape[0] * shape[1]
        words = torch.empty(-(-count // 64), dtype=torch.int64, device=device)
        words.random_(-(2**63), None, generator=self._seed_generator(key, rows, weight))
        return F.embedding(words.view(torch.uint8).int(), self._signs[device]).view(-1)[:count].view(shape)


class TableNoise(Noise):
    """Normal noise from a table: a block is a slice of 2²¹ normal quantiles (8 MiB) in random order.

    A slice begins anywhere, so drawing a block costs no more than reading it. In exchange, the entries of z are
    correlated: E zzᵀ = 1 + R, with the same R in every step. |Rg| is about an eighth of |g| in the mean over directions
    g, and reaches 0.52 |g| for the worst g (measured). The table is the same on every machine.
    """

    block_numel = 2**15

    def __init__(self) -> None:
        self._tables: dict[torch.device, Tensor] = {}

    def draw(self, key: int, rows: range, weight: Tensor, buffer: Tensor | None = None) -> Tensor:
        width, device = weight.shape[1], weight.device
        if device not in self._tables:
            self._tables[device] = _shuffled_quantiles(device)
        table = self._tables[device]
        num_places = len(table) - len(rows) * width + 1
        if num_places < 1:
            raise ValueError(
                f"noise=table: a weight has rows of {width:,} elements, more than the table's {len(table):,}. Use"
                " noise=gaussian."
            )
        begin = mix_64(key + rows.start) % num_places
        return table[begin : begin + len(rows) * width].view(len(rows), width)


class LowRankNoise(Noise):
    """Matrices of low rank, z = UVᵀ/√r for a weight [outputs, inputs], with normal U [outputs, r] and V [inputs, r].

    A linear layer adds U(Vᵀx) to its output, so z itself is never computed (https://arxiv.org/abs/2410.07698). Weights
    that are not matrices have normal noise.
    """

    def __init__(self, rank: int = 1) -> None:
        self.rank, self.normal = rank, GaussianNoise()

    def draw(self, key: int, rows: range, weight: Tensor, buffer: Tensor | None = None) -> Tensor:
        if not _has_factors(weight):
            return self.normal.draw(key, rows, weight)
        u, v = self._factors(key, weight)
        return _multiply(u[rows.start : rows.stop], v)

    def sample_rows(self, key: int, weight: Tensor, row_indices: Tensor) -> Tensor:
        if not _has_factors(weight):
            return super().sample_rows(key, weight, row_indices)
        u, v = self._factors(key, weight)
        return _multiply(u[row_indices], v)

    def perturb(self, key: int, weight: Tensor, scale: float) -> Tensor:
        if not _has_factors(weight):
            return super().perturb(key, weight, scale)
        u, v = self._factors(key, weight)
        with torch.autocast(weight.device.type, enabled=False):
            return torch.addmm(weight, u.to(weight.dtype), v.T.to(weight.dtype), alpha=scale)

    def perturbed_linear(self, key: int, x: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        if not _has_factors(weight):
            return super().perturbed_linear(key, x, weight, bias, scale)
        u, v = (factor.to(x.dtype) for factor in self._factors(key, weight))
        out, low_rank = F.linear(x, weight, bias), x @ v
        out.flatten(0, -2).addmm_(low_rank.flatten(0, -2), u.T.to(out.dtype), alpha=scale)  # not autocast, as they are
        return out

    def update(
        self, weight: Tensor, steps: Sequence[tuple[int, float]], decay: float, rounding_residual: Tensor | None
    ) -> None:
        if not _has_factors(weight) or rounding_residual is not None:
            super().update(weight, steps, decay, rounding_residual)
            return
        if decay:
            weight.mul_(1 - decay)
        for key, step in steps:
            u, v = self._factors(key, weight)
            weight.addmm_(u.to(weight.dtype), v.T.to(weight.dtype), alpha=step)

    def _factors(self, key: int, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Return U/√r [rows, r] and V [width, r]."""
        both = torch.empty(sum(weight.shape) * self.rank, dtype=torch.float32, device=weight.device)
        u, v = self.normal.sample(key, both).view(-1, self.rank).split(list(weight.shape))
        return (u, v) if self.rank == 1 else (u * self.rank**-0.5, v)

    def _rows_per_block(self, weight: Tensor) -> int:
        return weight.shape[0]  # one block, so that the factors are drawn once


def as_matrix(weight: Tensor) -> Tensor:
    """Return a view [rows, width] of a weight; a vector is a single row."""
    if weight.dim() == 2:
        return weight
    return weight.flatten(1) if weight.dim() > 2 else weight.reshape(1, -1)


def _update(part: Tensor, residual: Tensor | None, moves: Iterable[tuple[Tensor, float]], decay: float) -> None:
    """Multiply a part of a weight by 1 − decay and add step·z for every move; `residual` takes the rounding error."""
    exact = part if residual is None else part.float() + residual
    if decay:
        exact.mul_(1 - decay)
    for z, step in moves:
        exact.add_(z, alpha=step)
    if residual is not None:
        part.copy_(exact)
        residual.copy_(exact - part)


def _has_factors(weight: Tensor) -> bool:
    """Return whether z of this weight has low rank. That of a vector, or of a matrix of one row, is normal."""
    return weight.dim() == 2 and weight.shape[0] > 1


def _multiply(u: Tensor, v: Tensor) -> Tensor:
    """Return uvᵀ in the precision of u, also under autocast: a replay, which has none, computes the same."""
    with torch.autocast(u.device.type, enabled=False):
        return u @ v.T


def _signs_of_bytes(device: torch.device) -> Tensor:
    """Return the bits of each byte as signs [256, 8]."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)
    return torch.from_numpy(bits).to(device, torch.float32) * 2 - 1


def _shuffled_quantiles(device: torch.device) -> Tensor:
    """Return 2²¹ normal quantiles in random order, the same on every machine."""
    count = 2**21
    order = np.argsort(mix_64(np.arange(count, dtype=np.uint64)), kind="stable")
    return torch.from_numpy(_normal_quantiles(count).numpy()[order]).to(device)


def _normal_quantiles(count: int) -> Tensor:
    """Return normal quantiles, rising, rounded to multiples of 2⁻¹² so that machines agree."""
    exact = torch.arange(count, dtype=torch.float64).add_(0.5).div_(count)
    torch.special.ndtri(exact, out=exact)
    return exact.mul_(2**12).round_().div_(2**12).float()
