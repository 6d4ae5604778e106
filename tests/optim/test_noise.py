"""Noise by key: its moments, and that the key alone decides it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lit_spu.optim import noise as noise_module
from lit_spu.optim.keyed_random import key_of
from lit_spu.optim.mezo import NOISES
from lit_spu.optim.units import Unit

KURTOSIS = {"gaussian": 3.0, "rademacher": 1.0, "low_rank": 9.0}

SHAPES = [(100, 70), (), (7,), (100, 70), (1, 50), (30, 20), (6, 5, 4)]

noises = pytest.mark.parametrize("kind", NOISES)


def make_unit(*shapes: Sequence[int], dtype: torch.dtype = torch.float32, is_table: bool = False) -> Unit:
    """Return a unit of random weights of these shapes."""
    generator = torch.Generator().manual_seed(1)
    weights = [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]
    unit = Unit("unit", 0, weights, is_table=is_table)
    unit.flatten()
    return unit


def sample(kind: str, unit: Unit, key: int) -> list[Tensor]:
    return NOISES[kind]([unit]).sample(unit, key)


def added(noise: Any, unit: Unit, keys: Sequence[int], scales: Tensor) -> list[Tensor]:
    """Return the weights with noise added along several directions."""
    out = unit.flat.float().clone()
    noise.begin(keys, scales)
    for part in noise.parts(unit):
        noise.add(unit, part, out[part.begin : part.end], out[part.begin : part.end])
    return unit.views(out)


def correlation(a: Tensor, b: Tensor) -> float:
    return abs(float(torch.corrcoef(torch.stack([a.flatten(), b.flatten()]))[0, 1]))


@noises
def test_noise_has_its_moments(kind: str) -> None:
    """Mean 0, variance 1 and the kurtosis of the kind, within four standard errors; that of rank one is 9."""
    unit = make_unit((40, 50))
    z = torch.stack([sample(kind, unit, key_of("moments", i))[0] for i in range(500)]).double()
    independent = 500 * 40 if kind == "low_rank" else z.numel()  # a matrix of rank one is that of its rows
    assert abs(float(z.mean())) < 4 / independent**0.5
    assert float(z.square().mean()) == pytest.approx(1.0, abs=4 * (KURTOSIS[kind] / independent) ** 0.5)
    assert float((z**4).mean()) == pytest.approx(KURTOSIS[kind], rel=0.1)


@noises
@pytest.mark.parametrize("is_table", [True, False])
def test_keys_and_entries_are_uncorrelated(kind: str, is_table: bool) -> None:
    """Also those of different parts of a table, and of equal weights of a unit."""
    shapes = [(200, 300)] if is_table else [(200, 150)] * 2
    unit = make_unit(*shapes, is_table=is_table)
    a, b = (torch.cat([z.flatten() for z in sample(kind, unit, key_of(name))]) for name in ("a", "b"))
    shifts = (1, 300, noise_module.SMALL_PART_NUMEL // 300 * 300)
    within = 100 if kind == "low_rank" else len(a) // 2  # entries of a matrix of rank one share their factors
    assert correlation(a, b) < 6 / len(a) ** 0.5
    assert all(correlation(a[i:], a[:-i]) < 5 / within**0.5 for i in shifts)
    half = len(a) // 2
    assert correlation(a[half:], a[:half]) < (5 / within**0.5 if is_table else 6 / half**0.5)


@noises
def test_two_directions_are_not_drawn_into_the_noises_own_buffer(kind: str) -> None:
    """The second would overwrite the first: only noise of rank one needs no buffer."""
    unit = make_unit((8, 8))
    noise = NOISES[kind]([unit])
    noise.begin([1, 2], torch.ones(1, 2))
    out, (part,) = noise.buffer(unit.numel, unit.device), noise.parts(unit)
    with nullcontext() if kind == "low_rank" else pytest.raises(AssertionError, match="one direction alone"):
        noise.add(unit, part, unit.flat, out)


@noises
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_noise_depends_on_the_key_and_not_on_the_dtype(kind: str, dtype: torch.dtype) -> None:
    """Bitwise, after other draws too. Every weight has the z of its shape."""
    unit, other = make_unit(*SHAPES), make_unit(*SHAPES, dtype=dtype)
    found, noise = sample(kind, unit, 5), NOISES[kind]([other])
    noise.sample(other, 6)
    again = noise.sample(other, 5)
    assert [z.shape for z in found] == [weight.shape for weight in unit.weights]
    assert {z.dtype for z in again} == {torch.float32}
    assert all(map(torch.equal, found, again))


@noises
@pytest.mark.parametrize("draws_small", [True, False])
@pytest.mark.parametrize("part_numel", [10 * 50, 2**23])
def test_rows_are_those_of_the_whole_table(
    kind: str, draws_small: bool, part_numel: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever parts are drawn for them."""
    monkeypatch.setattr(noise_module, "SMALL_DRAWS", {"cpu"} if draws_small else ())
    monkeypatch.setattr(noise_module, "PART_NUMEL", part_numel)
    monkeypatch.setattr(noise_module, "SMALL_PART_NUMEL", part_numel)
    table = make_unit((73, 50), is_table=True)
    noise, places = NOISES[kind]([table]), torch.tensor([50, 3, 72, 3, 0, 9, 10])
    (z,) = noise.sample(table, 5)
    noise.begin([5], torch.full((1, 1), 0.5))
    for _ in range(2):  # by two modules
        rows = torch.ones(7, 50)
        noise.add_rows(table, places, rows)
        torch.testing.assert_close(rows, 1 + 0.5 * z[places])
    table.marks = torch.zeros(73).index_fill_(0, places, 1.0)
    (moved,) = added(noise, table, [5], torch.full((1, 1), 0.5))
    weight = table.weights[0].detach()
    torch.testing.assert_close(moved, weight + 0.5 * table.marks[:, None] * z)
    assert torch.equal(moved[20], weight[20])


@noises
def test_directions_and_groups_have_their_scales(kind: str) -> None:
    units = [make_unit(*SHAPES), Unit("second", 1, [nn.Parameter(torch.randn(9, 8)), nn.Parameter(torch.randn(3))])]
    units[1].flatten()
    noise, scales = NOISES[kind](units), torch.tensor([[0.5, 2.0, -1.0], [0.1, 0.0, 3.0]])
    for unit in units:
        z = [noise.sample(unit, key) for key in (5, 6, 7)]
        found = added(noise, unit, [5, 6, 7], scales)
        for number, weight in enumerate(unit.weights):
            expected = weight + sum(scale * of_key[number] for scale, of_key in zip(scales[unit.group], z, strict=True))
            torch.testing.assert_close(found[number], expected.detach(), atol=1e-5, rtol=1e-5)


@noises
def test_noise_is_the_same_in_every_precision_of_the_trainer(kind: str) -> None:
    """A replay has neither autocast nor another default dtype, and takes the same steps. Global generators stay."""
    unit = make_unit(*SHAPES)

    def computed() -> list[Tensor]:
        noise = NOISES[kind]([unit])
        scales = torch.tensor([[0.1, 0.2]], dtype=torch.float32)
        return [*noise.sample(unit, 5), *added(noise, unit, [5, 6], scales), *added(noise, unit, [5], scales[:, :1])]

    states = torch.get_rng_state(), np.random.get_state()[1]  # type: ignore[index]
    expected = computed()
    with torch.autocast("cpu", torch.bfloat16):
        assert all(map(torch.equal, computed(), expected))
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert all(map(torch.equal, computed(), expected))
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert np.array_equal(np.random.get_state()[1], states[1])  # type: ignore[index]
