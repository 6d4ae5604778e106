"""Low-rank pairs against their formula."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lit_spu.backbones.target_linears import TargetLinear
from lit_spu.measure.saved import SavedForBackward
from lit_spu.nn.lora import AddLowRank, LowRank


def target(kind: str) -> TargetLinear:
    """A linear 6 -> 9, a transposed one, or the second third of a fused one."""
    torch.manual_seed(0)
    linear: nn.Module = nn.Linear(6, 9) if kind == "linear" else Conv1D(9, 6)
    return TargetLinear("block.linear", linear.double(), "key", *((1, 3) if kind == "fused" else ()))


KINDS = ("linear", "transposed", "fused")


def trained(where: TargetLinear, **settings: Any) -> LowRank:
    pair = LowRank(where, 2, 1.4, **settings).double()
    nn.init.normal_(pair.b)
    return pair


def expected(where: TargetLinear, pair: LowRank, x: Tensor) -> Tensor:
    """W x + b with s·B(A x) added to the outputs of the target."""
    out: Tensor = where.linear(x).detach()
    width = out.shape[-1] // where.num_parts
    out[..., where.part * width : (where.part + 1) * width] += 0.7 * x @ pair.a.detach().T @ pair.b.detach().T
    return out


@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 5, 6)])
@pytest.mark.parametrize("kind", KINDS)
def test_it_adds_its_product(kind: str, shape: tuple[int, ...]) -> None:
    where = target(kind)
    pair, x = trained(where), torch.randn(4, *shape, dtype=torch.float64)
    wanted = expected(where, pair, x)
    pair.attach()
    torch.testing.assert_close(where.linear(x), wanted, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_its_formula(kind: str) -> None:
    where = target(kind)
    where.linear.requires_grad_(False)
    pair = trained(where).attach()

    def run(x: Tensor, *_: Tensor) -> Tensor:
        out: Tensor = where.linear(x)
        return out

    x = torch.randn(3, 2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(run, (x, pair.a, pair.b))


@pytest.mark.parametrize("kind", KINDS)
def test_merged_it_puts_out_the_same_and_unmerged_it_is_what_it_was(kind: str) -> None:
    where = target(kind)
    pair, x = trained(where).attach(), torch.randn(4, 6, dtype=torch.float64)
    before, weights = where.linear(x), where.linear.weight.clone()
    pair.merge()
    pair.merge()  # once is enough
    assert not torch.equal(where.linear.weight, weights)
    torch.testing.assert_close(where.linear(x), before, atol=1e-12, rtol=0)
    pair.unmerge()
    assert torch.equal(where.linear.weight, weights)
    assert torch.equal(where.linear(x), before)


@pytest.mark.parametrize(("outputs", "inputs"), [(8, 8), (12, 5), (5, 12)])
def test_the_top_singular_vectors_move_into_the_pair(outputs: int, inputs: int) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(inputs, outputs).double()
    where, whole = TargetLinear("linear", linear, "up"), linear.weight.detach().clone()
    pair = LowRank(where, 3, 6.0).double()
    pair.init_from_svd()
    u, s, v = torch.linalg.svd(whole, full_matrices=False)
    torch.testing.assert_close(pair.product.detach(), u[:, :3] * s[:3] @ v[:3], atol=1e-10, rtol=0)
    torch.testing.assert_close(pair.a.norm(dim=1), (s[:3] / 2).sqrt(), atol=1e-10, rtol=0, check_dtype=False)
    torch.testing.assert_close(pair.b.norm(dim=0), (s[:3] / 2).sqrt(), atol=1e-10, rtol=0, check_dtype=False)
    torch.testing.assert_close(linear.weight + pair.product, whole, atol=1e-12, rtol=0)


def test_nothing_of_the_linear_output_is_copied_or_kept() -> None:
    out = torch.randn(4, 5, 6, requires_grad=True) * 1
    place, low, b = out.data_ptr(), torch.randn(4, 5, 2, requires_grad=True), torch.randn(6, 2, requires_grad=True)
    with SavedForBackward([]) as kept:
        added = AddLowRank.apply(out, low, b, 1.0)  # type: ignore[no-untyped-call]
    assert added.data_ptr() == place
    assert kept.nbytes == low.nbytes + b.nbytes
    assert low in kept
    assert b in kept


def test_dropout_is_of_the_inputs_of_a_alone() -> None:
    where = target("linear")
    pair = trained(where, dropout=1.0).attach()
    x = torch.randn(4, 6, dtype=torch.float64)
    plain = nn.functional.linear(x, where.linear.weight, where.linear.bias)
    assert torch.equal(where.linear(x), plain)
    pair.eval()
    torch.testing.assert_close(where.linear(x), expected_without_hooks(where, pair, x))


def expected_without_hooks(where: TargetLinear, pair: LowRank, x: Tensor) -> Tensor:
    out: Tensor = nn.functional.linear(x, where.linear.weight, where.linear.bias)
    return out + 0.7 * x @ pair.a.T @ pair.b.T


def test_under_autocast_it_joins_what_the_linear_puts_out() -> None:
    linear = nn.Linear(6, 9)
    pair = LowRank(TargetLinear("linear", linear, "up"), 2, 2.0)
    nn.init.normal_(pair.b)
    x = torch.randn(4, 6)
    plain = linear(x)
    pair.attach()
    with torch.autocast("cpu", torch.bfloat16):
        out = linear(x)
    assert out.dtype is torch.bfloat16
    torch.testing.assert_close(out.float(), plain + x @ pair.a.T @ pair.b.T, atol=0.1, rtol=0.05)
