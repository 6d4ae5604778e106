"""Random directions that are never stored: a key stands for one, which is drawn again wherever it is needed.

A weight is looked at as rows [rows, width]; one of one dimension is a single row. What a key gives for a row does not
depend on which others are drawn, on the weight's dtype or on how it lies in memory, and torch's global generators are
left alone.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.overrides import TorchFunctionMode

_64 = 2**64 - 1


def key_of(*parts: int | str) -> int:
    """A number of 63 bits that stands for these parts, and looks random."""
    return int.from_bytes(blake2b(repr(parts).encode(), digest_size=8).digest(), "little") >> 1


def as_rows(weight: Tensor) -> Tensor:
    """A weight as [rows, width]: a view."""
    if weight.dim() == 2:
        return weight
    return weight.flatten(1) if weight.dim() > 2 else weight.reshape(1, -1)


class Noise(ABC):
    """A distribution of z with mean 0 and variance 1, and what SPSA does with it: look along z, and move along it."""

    block = 2**14
    """Elements that are drawn at a time, in whole rows: few enough for the processor's cache."""

    @abstractmethod
    def draw(self, key: int, rows: range, weight: Tensor, room: Tensor | None = None) -> Tensor:
        """These rows [some, width] of the z of a weight [rows, width], fp32 on its device; a `block` or its last part.

        What it gives may be overwritten by the next. It may be drawn into `room`, if that is of its shape and dtype:
        then it is in the processor's cache where it is wanted.
        """

    def sample(self, key: int, like: Tensor) -> Tensor:
        """The z of a weight, in fp32 and in its shape."""
        weight = as_rows(like)
        found = torch.empty_like(weight, dtype=torch.float32, memory_format=torch.contiguous_format)
        for rows, part in self._blocks(found):
            part.copy_(self.draw(key, rows, weight, part))
        return found.view(like.shape)

    def shifted(self, key: int, weight: Tensor, scale: float) -> Tensor:
        """The weight + scale·z, a new tensor of its shape and dtype."""
        out = torch.empty_like(weight, memory_format=torch.contiguous_format)
        source = as_rows(weight)
        for (rows, part), (_, target) in zip(self._blocks(source), self._blocks(as_rows(out)), strict=True):
            torch.add(part, self.draw(key, rows, source, target), alpha=scale, out=target)
        return out

    def rows(self, key: int, weight: Tensor, which: Tensor) -> Tensor:
        """Some rows [number, width] of the z of a weight [rows, width], in fp32."""
        height = self._height(weight)
        found = weight.new_empty(len(which), weight.shape[1], dtype=torch.float32)
        if isinstance(which, FakeTensor):
            return found
        ordered, order = which.sort()
        blocks, counts = (ordered // height).unique_consecutive(return_counts=True)
        start = 0
        for block, count in zip(blocks.tolist(), counts.tolist(), strict=True):
            drawn = range(block * height, min((block + 1) * height, len(weight)))
            part = slice(start, start + count)
            found[order[part]] = self.draw(key, drawn, weight)[ordered[part] - drawn.start]
            start += count
        return found

    def linear(self, key: int, x: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        """What a linear puts out whose weight is the weight + scale·z."""
        return F.linear(x, self.shifted(key, weight, scale), bias)

    def move(self, weight: Tensor, steps: Sequence[tuple[int, float]], decay: float, rest: Tensor | None) -> None:
        """Decay the weight to (1 − decay) of itself, and add step·z of every key, in place.

        Args:
            weight: Of any shape.
            steps: Keys, and how far along the z of each.
            decay: The share that is lost.
            rest: What a weight in half precision could not hold of what was added so far, in its dtype and shape.
        """
        view, left = as_rows(weight), None if rest is None else as_rows(rest)
        for rows, part in self._blocks(view):
            moves = ((self.draw(key, rows, view), step) for key, step in steps)
            _move(part, None if left is None else left[rows.start : rows.stop], moves, decay)

    def move_rows(
        self,
        weight: Tensor,
        which: Tensor,
        steps: Sequence[tuple[int, float]],
        decay: float,
        rest: Tensor | None,
    ) -> None:
        """The same for some rows of a weight [rows, width], to the bit, that leaves the others as they are."""
        part, left = weight[which], None if rest is None else rest[which]
        _move(part, left, ((self.rows(key, weight, which), step) for key, step in steps), decay)
        weight[which] = part
        if rest is not None and left is not None:
            rest[which] = left

    def _height(self, weight: Tensor) -> int:
        return max(1, self.block // weight.shape[1])

    def _blocks(self, weight: Tensor) -> Iterator[tuple[range, Tensor]]:
        """The rows, block by block: which, and their part of the weight."""
        if weight.shape[0] <= self._height(weight):  # as most weights, where launches count and not bytes
            yield range(weight.shape[0]), weight
            return
        start = 0
        for part in weight.split(self._height(weight)):
            yield range(start, start + len(part)), part
            start += len(part)

    def __repr__(self) -> str:
        return type(self).__name__


class _Drawn(Noise):
    """Noise that torch's generators draw, block by block, each with a seed of its own."""

    def __init__(self) -> None:
        self.generators: dict[torch.device, torch.Generator] = {}
        self.buffers: dict[torch.device, Tensor] = {}

    def _height(self, weight: Tensor) -> int:
        if weight.device.type == "cpu":
            return super()._height(weight)
        return max(1, 2**22 // weight.shape[1])  # 16 MiB: what counts there is how many kernels are launched

    def seeded(self, key: int, rows: range, weight: Tensor) -> torch.Generator:
        """The generator of a block."""
        device = weight.device
        if device not in self.generators:
            self.generators[device] = torch.Generator(device)
        return self.generators[device].manual_seed(_mixed(key + rows.start) >> 1)

    def buffer(self, numel: int, device: torch.device) -> Tensor:
        """Room for so many numbers in fp32, the same each time."""
        if device not in self.buffers or self.buffers[device].numel() < numel:
            self.buffers[device] = torch.empty(max(numel, self.block), device=device)
        return self.buffers[device][:numel]


class Gaussian(_Drawn):
    """The paper's own. It is the same on devices of one type; on GPUs, of one model."""

    def draw(self, key: int, rows: range, weight: Tensor, room: Tensor | None = None) -> Tensor:
        shape = len(rows), weight.shape[1]
        fits = room is not None and room.dtype is torch.float32 and room.is_contiguous()
        buffer = room.view(-1) if room is not None and fits else self.buffer(shape[0] * shape[1], weight.device)
        return buffer.normal_(generator=self.seeded(key, rows, weight)).view(shape)


class Rademacher(_Drawn):
    """1 or −1, as the bits of random numbers have it."""

    def draw(self, key: int, rows: range, weight: Tensor, room: Tensor | None = None) -> Tensor:
        shape, device = (len(rows), weight.shape[1]), weight.device
        count = shape[0] * shape[1]
        words = torch.empty(-(-count // 64), dtype=torch.int64, device=device)
        words.random_(-(2**63), None, generator=self.seeded(key, rows, weight))
        return F.embedding(words.view(torch.uint8).int(), _signs(device)).view(-1)[:count].view(shape)


class Table(Noise):
    """Blocks that start anywhere in one table of normal quantiles, 8 MiB and in a random order.

    To draw a block costs no more than to read it. In exchange its entries are as correlated as those of the table are
    at their distance: E zzᵀ = 1 + R, with |Rg| about an eighth of |g| for any g, and the same R in every step.
    """

    block = 2**15

    def draw(self, key: int, rows: range, weight: Tensor, room: Tensor | None = None) -> Tensor:
        width, table = weight.shape[1], _table(weight.device)
        starts = len(table) - len(rows) * width + 1
        if starts < 1:
            raise ValueError(f"a row of {width:,} is longer than the table of {len(table):,}")
        start = _mixed(key + rows.start) % starts
        return table[start : start + len(rows) * width].view(len(rows), width)


class LowRank(Noise):
    """z = UVᵀ/√r of a matrix [outputs, inputs], with normal U [outputs, r] and V [inputs, r]; of others, normal z.

    A linear adds U(Vᵀx) to what it puts out: z itself is never made (https://arxiv.org/abs/2410.07698).
    """

    def __init__(self, rank: int = 1) -> None:
        self.rank, self.normal = rank, Gaussian()

    def factors(self, key: int, weight: Tensor) -> tuple[Tensor, Tensor]:
        """U [rows, r], with 1/√r, and V [width, r]."""
        both = torch.empty(sum(weight.shape) * self.rank, device=weight.device)
        u, v = self.normal.sample(key, both).view(-1, self.rank).split(list(weight.shape))
        return (u, v) if self.rank == 1 else (u * self.rank**-0.5, v)

    def draw(self, key: int, rows: range, weight: Tensor, room: Tensor | None = None) -> Tensor:
        if not _is_matrix(weight):
            return self.normal.draw(key, rows, weight)
        u, v = self.factors(key, weight)
        return u[rows.start : rows.stop] @ v.T

    def _height(self, weight: Tensor) -> int:
        return weight.shape[0]  # the factors are drawn once

    def shifted(self, key: int, weight: Tensor, scale: float) -> Tensor:
        if not _is_matrix(weight):
            return super().shifted(key, weight, scale)
        u, v = self.factors(key, weight)
        return torch.addmm(weight, u.to(weight.dtype), v.T.to(weight.dtype), alpha=scale)

    def rows(self, key: int, weight: Tensor, which: Tensor) -> Tensor:
        if not _is_matrix(weight):
            return super().rows(key, weight, which)
        u, v = self.factors(key, weight)
        return u[which] @ v.T

    def linear(self, key: int, x: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> Tensor:
        if not _is_matrix(weight):
            return super().linear(key, x, weight, bias, scale)
        u, v = (factor.to(x.dtype) for factor in self.factors(key, weight))
        out, low = F.linear(x, weight, bias), x @ v
        out.flatten(0, -2).addmm_(low.flatten(0, -2), u.T, alpha=scale)
        return out

    def move(self, weight: Tensor, steps: Sequence[tuple[int, float]], decay: float, rest: Tensor | None) -> None:
        if not _is_matrix(weight) or rest is not None:
            super().move(weight, steps, decay, rest)
            return
        if decay:
            weight.mul_(1 - decay)
        for key, step in steps:
            u, v = self.factors(key, weight)
            weight.addmm_(u.to(weight.dtype), v.T.to(weight.dtype), alpha=step)


class Perturbed(TorchFunctionMode):
    """While it is entered, whatever torch function reads one of these weights reads it + scale·z.

    No weight is written, so that there is nothing to restore, also behind an error. Of an embedding, and of a matrix of
    which some rows are picked, only these are made.

    Args:
        weights: Those that are perturbed, each with the key of its z.
        noise: What the keys mean.
        scale: How far along z.
    """

    def __init__(self, weights: Sequence[tuple[Tensor, int]], noise: Noise, scale: float) -> None:
        super().__init__()
        self.keys = {id(weight): key for weight, key in weights}
        self.noise, self.scale = noise, scale
        self.read: dict[int, list[Tensor] | None] = {}
        """By a weight's id, the rows that were read of it; None where all were."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.embedding and id(args[1]) in self.keys:
            return self._rows(args[1], args[0])
        if func is Tensor.__getitem__ and id(args[0]) in self.keys and _picks(*args):
            return self._rows(*args)
        if func is F.linear and id(args[1]) in self.keys:
            x, weight, bias = args if len(args) == 3 else (*args, kwargs.get("bias"))
            self.read[id(weight)] = None
            return self.noise.linear(self.keys[id(weight)], x, weight, self._shifted(bias), self.scale)
        if getattr(func, "__name__", "") == "__get__":  # a property: most are no tensors
            plain = func(*args, **kwargs)
            if not isinstance(plain, Tensor):
                return plain
        args = [type(a)(map(self._shifted, a)) if isinstance(a, list | tuple) else self._shifted(a) for a in args]
        return func(*args, **{name: self._shifted(value) for name, value in kwargs.items()})

    def _shifted(self, value: Any) -> Any:
        if id(value) not in self.keys:
            return value
        self.read[id(value)] = None
        return self.noise.shifted(self.keys[id(value)], value, self.scale)

    def _rows(self, weight: Tensor, which: Tensor) -> Tensor:
        if isinstance(which, FakeTensor):  # how many they are depends on which they are
            rows, places = which.flatten(), torch.zeros_like(which)
        else:
            rows, places = which.unique(return_inverse=True)
        if (read := self.read.setdefault(id(weight), [])) is not None:
            read.append(rows)
        z = self.noise.rows(self.keys[id(weight)], weight, rows).to(torch.promote_types(weight.dtype, torch.float32))
        picked: Tensor = (weight[rows] + self.scale * z).to(weight.dtype)[places]
        return picked


def _move(part: Tensor, left: Tensor | None, moves: Iterable[tuple[Tensor, float]], decay: float) -> None:
    """Decay a part of a weight, and add step·z of every move; `left` holds what half precision does not."""
    exact = part if left is None else part.float() + left
    if decay:
        exact.mul_(1 - decay)
    for z, step in moves:
        exact.add_(z, alpha=step)
    if left is not None:
        part.copy_(exact)
        left.copy_(exact - part)


def _is_matrix(weight: Tensor) -> bool:
    """Whether it has factors: a single row, as which a vector is looked at, has none."""
    return weight.dim() == 2 and weight.shape[0] > 1


def _picks(weight: Tensor, index: Any) -> bool:
    return weight.dim() == 2 and isinstance(index, Tensor) and index.dtype is torch.long


@cache
def _signs(device: torch.device) -> Tensor:
    """[256, 8]: the bits of each byte, as signs."""
    bits = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)
    return torch.from_numpy(bits).to(device, torch.float32) * 2 - 1


@cache
def _table(device: torch.device) -> Tensor:
    """2²¹ normal quantiles, the same on any machine: multiples of 2⁻¹², in the order of a hash of integers."""
    count = 2**21
    order = np.argsort(_mixed(np.arange(count, dtype=np.uint64)), kind="stable")
    exact = torch.arange(count, dtype=torch.float64).add_(0.5).div_(count)
    torch.special.ndtri(exact, out=exact)
    quantiles = exact.mul_(2**12).round_().div_(2**12).float()
    return torch.from_numpy(quantiles.numpy()[order]).to(device)


def _mixed(number: Any) -> Any:
    """64 bits that look random, of an integer or of many in uint64: SplitMix64 of the golden ratio's multiples."""
    x = (number + 1) * 0x9E3779B97F4A7C15 & _64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _64
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _64
    return x ^ x >> 31
