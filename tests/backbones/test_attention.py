"""Narrow heads' attention against torch's own: results, gradients, masks, dropout, and what it keeps."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lit_spu.backbones import attention, load_backbone
from lit_spu.backbones.attention import attend, attend_keeping
from lit_spu.backbones.base import tensor_of
from lit_spu.backbones.encoder import Encoder
from lit_spu.measure.saved import SavedForBackward
from lit_spu.tasks import TASKS
from tests.conftest import FAMILIES, encode


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks so small that the examples of these tests come in several, the last one short; and no text is short."""
    monkeypatch.setattr(attention, "CHUNK", 2 * 3 * 6 * 7)
    monkeypatch.setattr(attention, "SHORT", 0)


def inputs() -> list[Tensor]:
    """Query, key, value of 5 examples, 3 heads, 6 queries, 7 keys, 4 numbers a head; and a bias."""
    torch.manual_seed(0)
    shapes = ((5, 3, 6, 4), (5, 3, 7, 4), (5, 3, 7, 4), (1, 3, 6, 7))
    return [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]


MASKS = {
    "none": None,
    "padding": (torch.arange(7) < torch.tensor([7, 3, 1, 5, 6])[:, None])[:, None, None],
    "causal": torch.ones(6, 7, dtype=torch.bool).tril()[None, None],
}


BOTH = pytest.mark.parametrize("function", [attend, attend_keeping])


@BOTH
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("biased", [True, False])
def test_it_is_torchs_attention(mask: str, biased: bool, function: Callable[..., Tensor]) -> None:
    query, key, value, bias = inputs()
    learned = [query, key, value, *([bias] if biased else [])]
    ours = function(query, key, value, bias if biased else None, MASKS[mask])
    seen = torch.zeros(1, dtype=torch.float64) if MASKS[mask] is None else MASKS[mask].to(torch.float64).log()  # type: ignore[union-attr]
    plain = F.scaled_dot_product_attention(
        query, key, value, attn_mask=(seen + bias if biased else seen).expand(5, 3, 6, 7), scale=1.0
    )
    torch.testing.assert_close(ours, plain, atol=1e-12, rtol=0)
    weights = torch.randn_like(ours)
    for mine, its in zip(
        torch.autograd.grad(ours, learned, weights), torch.autograd.grad(plain, learned, weights), strict=True
    ):
        torch.testing.assert_close(mine, its, atol=1e-12, rtol=0)


@BOTH
def test_dropout_drops_a_share_and_the_backward_pass_drops_the_same(function: Callable[..., Tensor]) -> None:
    query, key, value, bias = inputs()

    def dropped(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
        torch.manual_seed(1)
        return function(query, key, value, bias, dropout=0.25)

    assert torch.equal(dropped(query, key, value, bias), dropped(query, key, value, bias))
    assert torch.autograd.gradcheck(dropped, (query, key, value, bias))
    many = torch.zeros(200, 3, 6, 4)
    kept = function(many, torch.zeros(200, 3, 7, 4), torch.ones(200, 3, 7, 4), dropout=0.25)
    assert kept.mean().item() == pytest.approx(1.0, abs=0.01)  # what is left is scaled up
    shares = (kept * 0.75 * 7).unique()
    torch.testing.assert_close(shares, shares.round(), atol=1e-4, rtol=0)  # whole weights are dropped


def test_it_keeps_what_it_is_given_and_no_map() -> None:
    query, key, value, bias = inputs()
    with SavedForBackward((query, key, value, bias)) as saved:
        attend(query, key, value, bias)
    assert saved.nbytes == 8  # the seed
    with SavedForBackward((query, key, value, bias)) as saved:
        attend_keeping(query, key, value, bias)
    assert saved.nbytes == 8 * 5 * 3 * 6 * 7


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_maps_that_are_kept_are_those_that_are_made_again_to_the_bit(
    mask: str, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "SHORT", 7)
    query, key, value, bias = learned = [
        # as linears leave them
        tensor.detach().float().transpose(1, 2).contiguous().transpose(1, 2).requires_grad_()
        for tensor in inputs()
    ]
    found = []
    for function in (attend, attend_keeping):
        torch.manual_seed(1)
        out = function(query, key, value, bias, MASKS[mask], dropout)
        gradients = torch.autograd.grad(out.transpose(1, 2).flatten(2).square().sum(), learned)
        found.append([out, *gradients, torch.rand(1)])  # both leave torch's own generator where the other does
    for again, kept in zip(*found, strict=True):
        assert torch.equal(again, kept)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_torch_knows_the_operator(biased: bool, dropout: float) -> None:
    query, key, value, bias = inputs()
    given = (query, key, value, bias if biased else None, MASKS["padding"], dropout)
    tests = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(attention._attend, given, test_utils=tests)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_side_network_of_any_family_answers_as_with_torchs_attention(
    tiny: Callable[[str], str], family: str, keep: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With padding and without, in training and in evaluation."""
    if keep:
        monkeypatch.setattr(attention, "SHORT", 32)
    backbone = load_backbone(tiny(family), TASKS["sst2"], "prompt").double()
    torch.manual_seed(0)
    trunk: Any = backbone.base_model.shrunk(2, [list(range(stream.depth)) for stream in backbone.streams])
    trunk.model.double()
    if keep:
        trunk.keep_maps()
    sentences: tuple[tuple[str, ...], ...] = (("the film was great .",) * 2, ("the film was great .", "dull"))
    for batch in (backbone.inputs(encode(backbone, texts)) for texts in sentences):
        given = {
            name: torch.randn_like(t) if name.endswith("embeds") else t for name, t in trunk.inputs_like(batch).items()
        }
        used = trunk.model.config._attn_implementation
        found = []
        for implementation in (used, "sdpa"):
            if used != "eager":  # DeBERTa knows its own attention alone
                trunk.model.set_attn_implementation(implementation)
            hidden = trunk.run(given)
            mask = given["attention_mask"].bool() if hidden.shape[1] == given["attention_mask"].shape[1] else ...
            grads = torch.autograd.grad(hidden[mask].square().sum(), list(trunk.model.parameters()), allow_unused=True)
            found.append((hidden[mask], *grads))
        if used != "eager":
            trunk.model.set_attn_implementation(used)
        for ours, plain in zip(*found, strict=True):
            assert (ours is None) == (plain is None)
            if ours is not None:
                torch.testing.assert_close(ours, plain, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("head", ["classifier", "prompt"])
@pytest.mark.parametrize("family", FAMILIES)
def test_one_position_alone_is_that_of_all(tiny: Callable[[str], str], family: str, head: Any) -> None:
    """Scores and gradients are equal; encoders with torch's own attention leave the last block's other tokens out."""
    torch.manual_seed(0)
    teacher = load_backbone(tiny(family), TASKS["mnli"], head)
    backbone = teacher.student(2, [range(4)] * len(teacher.streams)).double().eval()
    batch = encode(backbone)  # of texts of several lengths
    widths: list[int] = []
    blocks = backbone.base_model.stacks[-1]
    hook = blocks[-1].register_forward_hook(lambda _block, _args, out: widths.append(tensor_of(out).shape[1]))
    inputs, position = backbone.inputs(batch), backbone.position(batch)
    found = []
    for hidden in (backbone.base_model.run(inputs), backbone.base_model.run_at(inputs, position)):
        scores = backbone.head(backbone.read(hidden, batch))
        gradients = torch.autograd.grad(scores.square().sum(), list(backbone.parameters()), allow_unused=True)
        found.append([scores, *gradients])
    hook.remove()
    assert len(set(position.tolist())) > 1 or head == "classifier" or family.startswith("t5")
    for one, whole in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(one, whole, atol=1e-12, rtol=1e-9)
    alone = backbone.base_model.family.shape is Encoder and family != "deberta-v2"
    assert widths[1] == (1 if alone else widths[0])
    assert not any(module._forward_pre_hooks for module in blocks[-1].modules())
