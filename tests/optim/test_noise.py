"""Noise by key: its moments, and that the key alone decides it."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from lit_spu.optim.keyed_random import key_of
from lit_spu.optim.noise import GaussianNoise, LowRankNoise, Noise, RademacherNoise, TableNoise

NOISES: dict[str, Callable[[], Noise]] = {
    "gaussian": GaussianNoise,
    "rademacher": RademacherNoise,
    "table": TableNoise,
    "low_rank": LowRankNoise,
    "low_rank of 4": lambda: LowRankNoise(4),
}
KURTOSIS = {"gaussian": 3.0, "rademacher": 1.0, "table": 3.0, "low_rank": 9.0, "low_rank of 4": 4.5}

noises = pytest.mark.parametrize("kind", NOISES)


@noises
def test_noise_has_its_moments(kind: str) -> None:
    """Mean 0, variance 1 and the kurtosis of the kind, within four standard errors; that of z of rank r is 3 + 6/r."""
    noise, weight = NOISES[kind](), torch.empty(40, 50)
    z = torch.stack([noise.sample(key_of("moments", i), weight) for i in range(500)]).double()
    independent = 500 * 40 if kind.startswith("low_rank") else z.numel()  # a matrix of low rank is that of its rows
    assert abs(float(z.mean())) < 4 / independent**0.5
    assert float(z.square().mean()) == pytest.approx(1.0, abs=4 * (KURTOSIS[kind] / independent) ** 0.5)
    assert float((z**4).mean()) == pytest.approx(KURTOSIS[kind], rel=0.1)


@noises
def test_keys_and_entries_are_uncorrelated(kind: str) -> None:
    noise, weight = NOISES[kind](), torch.empty(200, 300)
    a, b = (noise.sample(key_of(name), weight).flatten() for name in ("a", "b"))
    correlations = [torch.corrcoef(torch.stack(pair))[0, 1] for pair in ((a, b), (a[1:], a[:-1]), (a[300:], a[:-300]))]
    entries = 200 if kind.startswith("low_rank") else len(a)
    assert all(abs(float(c)) < 5 / entries**0.5 for c in correlations)


@noises
def test_all_rows_differ(kind: str) -> None:
    """Also rows at the same place of different blocks."""
    noise, weight = NOISES[kind](), torch.empty(400, 200)
    assert noise._rows_per_block(weight) <= 200 or kind.startswith("low_rank")
    assert len(noise.sample(5, weight).unique(dim=0)) == 400


@noises
@pytest.mark.parametrize("shape", [(), (7,), (100, 70), (300, 200), (6, 5, 4)])
def test_noise_depends_on_the_key_and_not_on_dtype_or_layout(kind: str, shape: tuple[int, ...]) -> None:
    """Bitwise: whichever rows are drawn, before or after which, in whatever dtype and memory layout."""
    noise, other, weight = NOISES[kind](), NOISES[kind](), torch.randn(shape)
    z = noise.sample(5, weight)
    assert z.shape == weight.shape
    assert z.dtype is torch.float32
    other.sample(6, torch.empty(1000))
    for like in (weight.double(), weight.bfloat16(), weight.T.contiguous().T if weight.dim() == 2 else weight):
        assert torch.equal(other.sample(5, like), z)
    if weight.dim() == 2:
        row_indices = torch.tensor([50, 3, 99, 3, 0])
        assert torch.equal(other.sample_rows(5, weight, row_indices), z[row_indices])


@noises
def test_global_generators_are_not_used(kind: str) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1]  # type: ignore[index]
    NOISES[kind]().sample(1, torch.empty(100, 100))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # type: ignore[index]


@noises
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_perturbing_and_updating_are_arithmetic_on_the_sample(kind: str, dtype: torch.dtype) -> None:
    noise, weight = NOISES[kind](), torch.randn(300, 200).to(dtype)
    before, z, exact = weight.clone(), noise.sample(5, weight).double(), weight.clone().double()
    unit = torch.finfo(torch.float32 if dtype is torch.float64 else dtype).eps
    perturbed = noise.perturb(5, weight, 1e-2)
    assert perturbed.dtype is dtype
    torch.testing.assert_close(perturbed.double(), exact + 1e-2 * z, atol=4 * unit, rtol=2 * unit)
    x = torch.randn(8, 3, 200).to(dtype)
    bias = torch.randn(300).to(dtype)
    torch.testing.assert_close(
        noise.perturbed_linear(5, x, weight, bias, 1e-2).double(),
        F.linear(x.double(), exact + 1e-2 * z, bias.double()),
        atol=300 * unit,
        rtol=300 * unit,
    )
    assert torch.equal(weight, before)
    residual = torch.zeros_like(weight) if dtype.itemsize == 2 else None
    noise.update(weight, [(5, 1e-3), (6, -2e-3)], 0.1, residual)
    moved = weight.double() + (0 if residual is None else residual.double())
    expected = 0.9 * exact + 1e-3 * z - 2e-3 * noise.sample(6, weight).double()
    precise = unit**2 if residual is not None else unit
    torch.testing.assert_close(moved, expected, atol=16 * max(precise, 2e-8), rtol=16 * max(precise, 2e-8))


@noises
def test_a_matrix_of_one_row_is_perturbed_and_updated_alike(kind: str) -> None:
    """As a regression's head has it."""
    noise, weight, x = NOISES[kind](), torch.zeros(1, 50), torch.randn(4, 50)
    z = noise.sample(5, weight)
    assert torch.equal(noise.perturb(5, weight, 1.0), z)
    assert torch.equal(noise.sample_rows(5, weight, torch.tensor([0])), z)
    torch.testing.assert_close(noise.perturbed_linear(5, x, weight, None, 1.0), x @ z.T)
    for residual in (None, torch.zeros_like(weight)):
        moved = torch.zeros(1, 50)
        noise.update(moved, [(5, 1.0)], 0.0, residual)
        assert torch.equal(moved, z)


def test_a_view_that_is_not_contiguous_is_updated_in_place() -> None:
    for noise in (GaussianNoise(), TableNoise(), LowRankNoise()):
        whole = torch.zeros(50, 60)
        noise.update(whole.T[:, ::2], [(5, 1.0)], 0.0, None)
        assert torch.equal(whole.T[:, ::2], noise.sample(5, torch.empty(60, 25)))
        assert not whole.T[:, 1::2].any()


@noises
def test_noise_is_the_same_in_every_precision_of_the_trainer(kind: str) -> None:
    """A replay has neither autocast nor another default dtype, and takes the same steps."""
    noise, weight = NOISES[kind](), torch.randn(40, 30)
    rows = torch.tensor([3, 1])

    def computed() -> list[torch.Tensor]:
        updated = weight.clone()
        noise.update(updated, [(5, 0.1)], 0.0, None)
        return [noise.sample(5, weight), noise.sample_rows(5, weight, rows), noise.perturb(5, weight, 0.1), updated]

    expected = computed()
    with torch.autocast("cpu", torch.bfloat16):
        found = computed()
        out = noise.perturbed_linear(5, torch.randn(2, 3, 30), weight, torch.zeros(40), 0.1)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    noise = NOISES[kind]()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = computed()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert out.dtype is torch.bfloat16
