"""Noise by key: its moments, that the key alone decides it, and that all torch functions read perturbed weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_spu.backbones import load_backbone
from lit_spu.methods.base import Method
from lit_spu.methods.bitfit import BitFit
from lit_spu.methods.ia3 import IA3
from lit_spu.methods.ladder import LadderSideTuning
from lit_spu.methods.lora import LoRA
from lit_spu.optim.perturbation import Gaussian, LowRank, Noise, Perturbed, Rademacher, Table, key_of
from lit_spu.tasks import TASKS
from tests.conftest import FAMILIES, encode

NOISES: dict[str, Callable[[], Noise]] = {
    "gaussian": Gaussian,
    "rademacher": Rademacher,
    "table": Table,
    "low_rank": LowRank,
    "low_rank of 4": lambda: LowRank(4),
}
KURTOSIS = {"gaussian": 3.0, "rademacher": 1.0, "table": 3.0, "low_rank": 9.0, "low_rank of 4": 4.5}

noises = pytest.mark.parametrize("kind", NOISES)


@noises
def test_moments(kind: str) -> None:
    """Mean 0, variance 1 and the kurtosis of the kind, within four standard errors; that of z of rank r is 3 + 6/r."""
    noise, weight = NOISES[kind](), torch.empty(40, 50)
    z = torch.stack([noise.sample(key_of("moments", i), weight) for i in range(500)]).double()
    independent = 500 * 40 if kind.startswith("low_rank") else z.numel()  # a matrix of low rank is that of its rows
    assert abs(float(z.mean())) < 4 / independent**0.5
    assert float(z.square().mean()) == pytest.approx(1.0, abs=4 * (KURTOSIS[kind] / independent) ** 0.5)
    assert float((z**4).mean()) == pytest.approx(KURTOSIS[kind], rel=0.1)


@noises
def test_other_keys_and_other_entries_have_nothing_to_do_with_each_other(kind: str) -> None:
    noise, weight = NOISES[kind](), torch.empty(200, 300)
    a, b = (noise.sample(key_of(name), weight).flatten() for name in ("a", "b"))
    correlations = [torch.corrcoef(torch.stack(pair))[0, 1] for pair in ((a, b), (a[1:], a[:-1]), (a[300:], a[:-300]))]
    entries = 200 if kind.startswith("low_rank") else len(a)
    assert all(abs(float(c)) < 5 / entries**0.5 for c in correlations)


@noises
@pytest.mark.parametrize("shape", [(), (7,), (100, 70), (300, 200), (6, 5, 4)])
def test_a_key_decides_it_whatever_the_weight_is_like(kind: str, shape: tuple[int, ...]) -> None:
    """Bitwise: whichever rows are drawn, before or after which, in whatever dtype and memory layout."""
    noise, other, weight = NOISES[kind](), NOISES[kind](), torch.randn(shape)
    z = noise.sample(5, weight)
    assert z.shape == weight.shape
    assert z.dtype is torch.float32
    other.sample(6, torch.empty(1000))
    for like in (weight.double(), weight.bfloat16(), weight.T.contiguous().T if weight.dim() == 2 else weight):
        assert torch.equal(other.sample(5, like), z)
    if weight.dim() == 2:
        which = torch.tensor([50, 3, 99, 3, 0])
        assert torch.equal(other.rows(5, weight, which), z[which])


@noises
def test_the_generators_of_torch_and_numpy_are_left_alone(kind: str) -> None:
    before = torch.get_rng_state(), np.random.get_state()[1]  # type: ignore[index]
    NOISES[kind]().sample(1, torch.empty(100, 100))
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # type: ignore[index]


@noises
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_looking_and_moving_are_arithmetic_on_the_sample(kind: str, dtype: torch.dtype) -> None:
    noise, weight = NOISES[kind](), torch.randn(300, 200).to(dtype)
    kept, z, exact = weight.clone(), noise.sample(5, weight).double(), weight.clone().double()
    unit = torch.finfo(torch.float32 if dtype is torch.float64 else dtype).eps
    looked = noise.shifted(5, weight, 1e-2)
    assert looked.dtype is dtype
    torch.testing.assert_close(looked.double(), exact + 1e-2 * z, atol=4 * unit, rtol=2 * unit)
    x = torch.randn(8, 3, 200).to(dtype)
    bias = torch.randn(300).to(dtype)
    torch.testing.assert_close(
        noise.linear(5, x, weight, bias, 1e-2).double(),
        F.linear(x.double(), exact + 1e-2 * z, bias.double()),
        atol=300 * unit,
        rtol=300 * unit,
    )
    assert torch.equal(weight, kept)
    rest = torch.zeros_like(weight) if dtype.itemsize == 2 else None
    noise.move(weight, [(5, 1e-3), (6, -2e-3)], 0.1, rest)
    moved = weight.double() + (0 if rest is None else rest.double())
    wanted = 0.9 * exact + 1e-3 * z - 2e-3 * noise.sample(6, weight).double()
    precise = unit**2 if rest is not None else unit
    torch.testing.assert_close(moved, wanted, atol=16 * max(precise, 2e-8), rtol=16 * max(precise, 2e-8))


@noises
def test_a_matrix_of_one_row_is_moved_along_what_was_looked_along(kind: str) -> None:
    """As a regression's head has it."""
    noise, weight, x = NOISES[kind](), torch.zeros(1, 50), torch.randn(4, 50)
    z = noise.sample(5, weight)
    assert torch.equal(noise.shifted(5, weight, 1.0), z)
    assert torch.equal(noise.rows(5, weight, torch.tensor([0])), z)
    torch.testing.assert_close(noise.linear(5, x, weight, None, 1.0), x @ z.T)
    for rest in (None, torch.zeros_like(weight)):
        moved = torch.zeros(1, 50)
        noise.move(moved, [(5, 1.0)], 0.0, rest)
        assert torch.equal(moved, z)


def test_a_view_that_is_not_contiguous_is_moved_in_place() -> None:
    for noise in (Gaussian(), Table(), LowRank()):
        whole = torch.zeros(50, 60)
        noise.move(whole.T[:, ::2], [(5, 1.0)], 0.0, None)
        assert torch.equal(whole.T[:, ::2], noise.sample(5, torch.empty(60, 25)))
        assert not whole.T[:, 1::2].any()


def perturbed(method: Any, keys: Sequence[tuple[Tensor, int]], noise: Noise, scale: float) -> Any:
    """The same with the weights written otherwise."""
    copied = copy.deepcopy(method)
    key = {id(parameter): k for parameter, k in keys}
    with torch.no_grad():
        for own, its in zip(method.parameters(), copied.parameters(), strict=True):
            if id(own) in key:
                its.add_(noise.sample(key[id(own)], own), alpha=scale)
    return copied


METHODS: dict[str, Callable[..., Method]] = {
    "lora": lambda **kwargs: LoRA(norms=True, **kwargs),
    "ia3": IA3,
    "bitfit": BitFit,
    "ladder": lambda **kwargs: LadderSideTuning(reduction=2, **kwargs),
}


@pytest.mark.parametrize("kind", ["gaussian", "low_rank"])
@pytest.mark.parametrize("head", ["classifier", "prompt"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_backbone_reads_all_its_weights_perturbed_and_none_is_written(
    tiny: Callable[[str], str], family: str, head: Any, kind: str
) -> None:
    """Every one of a family's weights matters: the scores are those of a model with the perturbed weights written."""
    backbone = load_backbone(tiny(family), TASKS["sst2"], head).double().eval()
    batch, noise = encode(backbone), NOISES[kind]()
    before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
    keys = [(p, key_of(name)) for name, p in backbone.named_parameters()]
    with torch.no_grad():
        plain, wanted = backbone(batch), perturbed(backbone, keys, noise, 1e-2)(batch)
        with Perturbed(keys, noise, 1e-2):
            scores = backbone(batch)
        assert not torch.allclose(plain, wanted, atol=1e-4)
        # of a product, z is not rounded to fp32: x comes between its factors
        rounding = 1e-12 if kind == "gaussian" else 2e-6
        torch.testing.assert_close(scores, wanted, atol=rounding, rtol=rounding)
        assert torch.equal(backbone(batch), plain)
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())


@pytest.mark.parametrize("kind", ["rademacher", "table"])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", ["bert", "t5", "gpt2"])
def test_so_do_methods(tiny: Callable[[str], str], family: str, name: str, kind: str) -> None:
    """Of what they train."""
    torch.manual_seed(0)  # the same weights in any order of tests
    method: Any = METHODS[name](backbone=tiny(family), head="prompt").double().eval()
    for parameter in method.parameters():
        if parameter.requires_grad and not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    batch, noise = encode(method.backbone), NOISES[kind]()
    keys = [(p, key_of(name)) for name, p in method.named_parameters() if p.requires_grad]
    with torch.no_grad():
        wanted = perturbed(method, keys, noise, 1e-2).loss(batch)
        with Perturbed(keys, noise, 1e-2):
            loss = method.loss(batch)
        torch.testing.assert_close(loss, wanted, atol=1e-12, rtol=1e-9)
        assert abs(float(method.loss(batch) - wanted)) > 1e-7


def test_an_error_leaves_all_as_it_was() -> None:
    linear = nn.Linear(4, 4)
    before = [p.clone() for p in linear.parameters()]
    with torch.no_grad(), pytest.raises(RuntimeError, match="shapes"), Perturbed([(linear.weight, 1)], Gaussian(), 1.0):
        linear(linear(torch.ones(4))[:3])
    assert all(map(torch.equal, before, linear.parameters()))
    assert torch.equal(linear(torch.ones(4)), F.linear(torch.ones(4), *before))
