"""Low-rank pairs against their formula."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lit_spu.backbones.hooks import override_forward
from lit_spu.backbones.target_linears import TargetLinear
from lit_spu.measure import Launches
from lit_spu.measure.saved import SavedForBackward
from lit_spu.nn.lora import LowRank


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


class Doubled(nn.Linear):
    """A linear layer that computes more than its product."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class DoubledConv1D(Conv1D):
    """A transposed layer that computes more than its product."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = 2 * super().forward(x)  # type: ignore[no-untyped-call]
        return out


class TanhLayer(nn.Module):
    """A layer of its own class that saves its output, with a weight [inputs, outputs]."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 9))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.weight)


def overridden(linear: nn.Module) -> nn.Module:
    override_forward(linear, lambda forward, x: forward(x))
    return linear


def swapped(linear: nn.Module) -> nn.Module:
    override_forward(linear, lambda forward, x: forward(x.transpose(0, 1)).transpose(0, 1))
    return linear


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: nn.Linear(6, 9),
    "without bias": lambda: nn.Linear(6, 9, bias=False),
    "transposed": lambda: Conv1D(9, 6),
    "of another class": lambda: Doubled(6, 9),
    "transposed, of another class": lambda: DoubledConv1D(9, 6),  # type: ignore[no-untyped-call]
    "no subclass": TanhLayer,
    "overridden": lambda: overridden(nn.Linear(6, 9)),
    "not contiguous": lambda: swapped(nn.Linear(6, 9)),
}


@pytest.mark.parametrize("is_frozen", [True, False])
@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("layer", LAYERS)
def test_gradients_are_those_of_its_formula(layer: str, parts: int, is_frozen: bool) -> None:
    """Also of a layer that runs twice, and with a pair for each part of a fused layer."""
    torch.manual_seed(0)
    linear = LAYERS[layer]().double().requires_grad_(not is_frozen)
    plain = copy.deepcopy(linear)
    pairs = [trained(TargetLinear("linear", linear, "key", part, parts)).attach() for part in range(parts)]
    x = torch.randn(3, 2, 6, dtype=torch.float64, requires_grad=True)

    def formula(x: Tensor) -> Tensor:
        out: Tensor = plain(x) + torch.cat([0.7 * x @ pair.a.T @ pair.b.T for pair in pairs], -1)
        return out

    def run(x: Tensor, *_: Tensor) -> Tensor:
        out: Tensor = linear(x) * linear(x[:1])
        return out

    trained_tensors = [x, *(p for pair in pairs for p in (pair.a, pair.b))]
    weights = [p for p in linear.parameters() if p.requires_grad]
    found = run(x)
    wanted = formula(x) * formula(x[:1])
    torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)
    gradients = torch.autograd.grad(found.sin().sum(), [*trained_tensors, *weights])
    expected = torch.autograd.grad(
        wanted.sin().sum(), [*trained_tensors, *(p for p in plain.parameters() if p.requires_grad)]
    )
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-11, rtol=0)
    # or autograd copies the gradients of A and B
    assert all(gradient.is_contiguous() for gradient in gradients[: len(trained_tensors)])
    assert torch.autograd.gradcheck(run, (*trained_tensors, *weights))


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


def test_one_merged_part_changes_no_gradient_of_the_others() -> None:
    linear = nn.Linear(6, 9).double()
    first, second = (trained(TargetLinear("linear", linear, "key", part, 3)).attach() for part in range(2))
    x = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    before = torch.autograd.grad(linear(x).sin().sum(), (x, second.a, second.b))
    first.merge()
    for found, wanted in zip(torch.autograd.grad(linear(x).sin().sum(), (x, second.a, second.b)), before, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-12, rtol=0)


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


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_one_node_that_saves_its_input_and_the_low_rank_state(kind: str) -> None:
    where = target(kind)
    where.linear.requires_grad_(False)
    pair = trained(where).attach()
    x = torch.randn(4, 5, 6, dtype=torch.float64, requires_grad=True)

    def run() -> SavedForBackward:
        with SavedForBackward([*where.linear.parameters(), *pair.parameters()]) as saved:
            out = where.linear(x)
        assert not out._is_view()  # what follows may change it in place without a copy of its gradient
        out.backward(torch.ones_like(out))
        return saved

    run()
    pair.zero_grad()
    with Launches() as counted:
        saved = run()
    assert saved.nbytes == x.nbytes + 4 * 5 * 2 * 8  # x and A x
    # Wx + b, A x and its product with B; the gradients of A x, A and B, and two for x
    assert counted.by_phase["forward"] - counted.by_operator["forward", "ones_like"] == 3
    # x has a gradient already, to which autograd adds
    assert counted.by_phase["backward"] - counted.by_operator["backward", "add_"] == 5


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


def test_gradients_with_dropout_are_those_of_its_formula() -> None:
    where = target("linear")
    pair = trained(where, dropout=0.5).attach()
    x = torch.randn(3, 2, 6, dtype=torch.float64, requires_grad=True)
    plain = copy.deepcopy(where.linear)
    vars(plain).pop("forward")

    def run(x: Tensor, *_: Tensor) -> Tensor:
        torch.manual_seed(0)
        out: Tensor = where.linear(x)
        return out

    def formula(x: Tensor) -> Tensor:
        torch.manual_seed(0)
        out: Tensor = plain(x) + 0.7 * pair.dropout(x) @ pair.a.T @ pair.b.T
        return out

    torch.testing.assert_close(run(x), formula(x), atol=1e-12, rtol=0)
    assert torch.autograd.gradcheck(run, (x, pair.a, pair.b, *where.linear.parameters()))


@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_second_derivatives_are_those_of_its_formula(dropout: float) -> None:
    where = target("linear")
    pair = trained(where, dropout=dropout).attach()
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)

    def run(x: Tensor, *_: Tensor) -> Tensor:
        torch.manual_seed(0)
        out: Tensor = where.linear(x)
        return out

    assert torch.autograd.gradgradcheck(run, (x, pair.a, pair.b, *where.linear.parameters()))


def test_a_hook_sees_the_product_whenever_it_was_set() -> None:
    where, seen = target("linear"), list[Tensor]()
    x = torch.randn(4, 6, dtype=torch.float64)
    where.linear.register_forward_hook(lambda _, args, output: seen.append(output))
    pair = trained(where)
    wanted = expected(where, pair, x)
    pair.attach()
    where.linear.register_forward_hook(lambda _, args, output: seen.append(output))
    where.linear(x)
    for output in seen[1:]:  # `expected` has run the layer without its pair
        torch.testing.assert_close(output, wanted, atol=1e-12, rtol=0)
    assert len(seen) == 3


@pytest.mark.parametrize("kind", KINDS)
def test_a_pair_on_meta_tensors_has_shapes_alone(kind: str) -> None:
    where = target(kind)
    pair = trained(where).attach().to("meta", torch.float32)
    where.linear.to("meta", torch.float32)
    out = where.linear(torch.empty(4, 5, 6, device="meta"))
    out.sum().backward()
    assert out.shape == (4, 5, 9)
    assert pair.a.grad is not None


def test_a_layer_in_bf16_has_pairs_in_fp32() -> None:
    linear = nn.Linear(6, 9).bfloat16().requires_grad_(False)
    pair = LowRank(TargetLinear("linear", linear, "up"), 2, 2.0).attach()
    x = torch.randn(4, 6).bfloat16().requires_grad_()
    out = linear(x)
    out.sum().backward()
    assert out.dtype is torch.bfloat16
    assert torch.equal(out, nn.functional.linear(x, linear.weight, linear.bias))  # B is zero
    assert pair.b.grad is not None
    assert pair.b.grad.dtype is torch.float32
    wanted = (x @ pair.a.bfloat16().T).float().sum(0).expand(9, -1)
    torch.testing.assert_close(pair.b.grad, wanted, atol=0.1, rtol=0.02)


def test_under_autocast_it_joins_what_the_linear_puts_out() -> None:
    linear = nn.Linear(6, 9)
    pair = LowRank(TargetLinear("linear", linear, "up"), 2, 2.0)
    nn.init.normal_(pair.b)
    x = torch.randn(4, 6)
    plain = linear(x)
    pair.attach()
    with torch.autocast("cpu", torch.bfloat16), SavedForBackward([*linear.parameters(), *pair.parameters()]) as saved:
        out = linear(x)
    assert out.dtype is torch.bfloat16
    # x, A x, A and B; W is needed for the gradient of x alone
    assert saved.nbytes == 2 * (4 * (6 + 2) + 2 * (6 + 9))
    torch.testing.assert_close(out.float(), plain + x @ pair.a.T @ pair.b.T, atol=0.1, rtol=0.05)
    out.float().sum().backward()
    assert pair.a.grad is not None
    torch.testing.assert_close(pair.a.grad, pair.b.sum(0).outer(x.sum(0)), atol=0.1, rtol=0.05)
