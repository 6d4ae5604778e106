"""Stochastic rounding to half precision."""

from __future__ import annotations

import pytest
import torch

from lit_spu.optim.rounding import round_stochastically

halves = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])


@halves
@pytest.mark.parametrize("size", [1e3, 1.0, 1e-3, 1e-5, 1e-7])  # the last two are subnormal in fp16
def test_numbers_are_rounded_to_a_neighbour_and_keep_their_mean(dtype: torch.dtype, size: float) -> None:
    generator = torch.Generator().manual_seed(0)
    exact = torch.randn(200, generator=generator) * size
    rounded = torch.stack([round_stochastically(exact.clone(), dtype, generator) for _ in range(2000)]).double()
    low, high = rounded.amin(0), rounded.amax(0)
    steps = high - low
    assert ((low <= exact) & (exact <= high) | (steps == 0)).all()
    nearest = exact.to(dtype).double()
    assert ((nearest == low) | (nearest == high)).all()
    error = (rounded.mean(0) - exact.double()).abs()
    assert (error <= 5 * steps / 2 / 2000**0.5 + 1e-4 * size * 2**-8).all()
    assert rounded.unique(dim=0).shape[0] > 1


@halves
def test_finite_numbers_stay_finite(dtype: torch.dtype) -> None:
    """Also those that the nearest half precision number is infinity of."""
    largest = torch.finfo(dtype).max
    exact = torch.tensor([1.0, -1.0]).repeat(500) * largest * (1 + 2**-12)
    rounded = round_stochastically(exact, dtype, torch.Generator())
    assert torch.equal(rounded, exact.sign().to(dtype) * largest)


@halves
def test_exact_numbers_stay(dtype: torch.dtype) -> None:
    exact = torch.tensor([0.0, -0.0, 1.0, -2.5, 6e-8, -6e-5, 1e4, float("inf"), float("nan")]).to(dtype)
    rounded = round_stochastically(exact.float(), dtype, torch.Generator())
    assert torch.equal(rounded.nan_to_num(7.0), exact.nan_to_num(7.0))
