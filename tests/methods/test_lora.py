"""LoRA against the published counts and the peft library."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lit_spu.backbones import Backbone, load_backbone
from lit_spu.errors import UserError
from lit_spu.methods.base import Method
from lit_spu.methods.ia3 import IA3
from lit_spu.methods.ladder import LadderSideTuning
from lit_spu.methods.lora import LoRA
from lit_spu.nn.ia3 import Scale
from lit_spu.nn.lora import LowRank
from lit_spu.study.grid import build
from tests.conftest import FAMILIES, encode, tiny_tokenizer

Tiny = Callable[[str], str]
CONFIGS = Path(__file__).parents[2] / "configs"

# The slides' table: DistilBERT-base, what is trained without the head.
COUNTS = {"lora": 350_208, "lora_kv_ffn": 184_320, "siva": 350_208, "ia3": 27_648, "ia3_out": 13_824, "ff_only": 23_040}


@pytest.fixture(scope="session")
def distilbert(tmp_path_factory: pytest.TempPathFactory) -> str:
    """DistilBERT-base's sizes with random weights, and few words."""
    from transformers import DistilBertConfig, DistilBertForMaskedLM

    folder = tmp_path_factory.mktemp("distilbert-base")
    tiny_tokenizer("distilbert").save_pretrained(folder)
    DistilBertForMaskedLM(DistilBertConfig(vocab_size=64)).save_pretrained(folder)
    return str(folder)


def trained(method: Method) -> int:
    """The trainable parameters without the head's."""
    head = {id(p) for step in method.backbone.head_steps if isinstance(step, nn.Module) for p in step.parameters()}
    return sum(p.numel() for p in method.parameters() if p.requires_grad and id(p) not in head)


@pytest.mark.parametrize("config", COUNTS)
def test_the_slides_table_is_exact(distilbert: str, config: str) -> None:
    assert trained(build(CONFIGS / f"{config}.yaml", backbone=distilbert)) == COUNTS[config]


@pytest.mark.parametrize("start", ["zero", "svd"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_starts_as_the_backbone(tiny: Tiny, family: str, start: Any) -> None:
    folder = tiny(family)
    torch.manual_seed(0)
    method = LoRA(init=start, backbone=folder).eval().double()
    torch.manual_seed(0)  # for the same new head
    plain = load_backbone(folder, method.task).eval().double()
    batch = encode(plain)
    with torch.no_grad():
        # the frozen rest of an SVD is what fp32 holds of it
        torch.testing.assert_close(method(batch), plain(batch), atol=1e-12 if start == "zero" else 1e-5, rtol=0)


def disturb(method: Method) -> Method:
    """Move everything that is trained away from where it starts."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in method.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return method


@pytest.mark.parametrize("make", [LoRA, IA3])
@pytest.mark.parametrize("family", FAMILIES)
def test_merged_it_answers_the_same(tiny: Tiny, family: str, make: Callable[..., Method]) -> None:
    method = disturb(make(backbone=tiny(family)).eval().double())
    batch, weights = encode(method.backbone), {n: p.detach().clone() for n, p in method.backbone.named_parameters()}
    with torch.no_grad():
        scores = method(batch)
        method.merge()
        torch.testing.assert_close(method(batch), scores, atol=1e-12, rtol=1e-12)
        method.unmerge()
        assert torch.equal(method(batch), scores)
    assert all(torch.equal(p, weights[n]) for n, p in method.backbone.named_parameters())


def test_what_stands_beside_the_backbone_is_not_merged(tiny: Tiny) -> None:
    with pytest.raises(UserError, match="LadderSideTuning cannot be merged"):
        LadderSideTuning(backbone=tiny("bert"), reduction=2).merge()


def test_impossible_ranks_are_refused(tiny: Tiny) -> None:
    with pytest.raises(UserError, match=r"model.rank=33: encoder.layer.0.attention.self.query allows 1 to 32"):
        LoRA(rank=33, backbone=tiny("bert"))


def test_a_rank_stabilised_step_is_larger_by_the_root_of_the_rank(tiny: Tiny) -> None:
    plain, stable = (LoRA(rank=4, rank_stabilised=on, backbone=tiny("bert")) for on in (False, True))
    for one, other in zip(plain.pairs.values(), stable.pairs.values(), strict=True):
        assert other.scale == 2 * one.scale  # type: ignore[operator]


# -- the peft library --------------------------------------------------------------------------------------------------

ORACLE = ("bert", "roberta", "distilbert", "t5", "t5-gated", "gpt2", "llama")
"""gpt2 is compared at its unfused linears: peft has one pair for the fused one."""


def peft_twin(method: Method, folder: str) -> tuple[Backbone, list[tuple[nn.Parameter, nn.Parameter]]]:
    """The same backbone with the same head under the peft library, and what both learn, peft's first."""
    peft = pytest.importorskip("peft")
    plain = load_backbone(folder, method.task).eval()
    plain.load_state_dict(method.backbone.state_dict())
    adapters = {plain.full_path(adapter.target): adapter for adapter in method.adapters}
    if isinstance(method, LoRA):
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules=list(adapters))
    else:
        inner = [name for name, adapter in adapters.items() if isinstance(adapter, Scale) and adapter.inputs]
        config = peft.IA3Config(target_modules=list(adapters), feedforward_modules=inner)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft on Conv1D and on its own configs
        twin = peft.get_peft_model(plain.model, config)
    pairs = []
    for name, adapter in adapters.items():
        layer = twin.base_model.model.get_submodule(name)
        if isinstance(adapter, LowRank):
            pairs += [(layer.lora_A["default"].weight, adapter.a), (layer.lora_B["default"].weight, adapter.b)]
        elif isinstance(adapter, Scale):
            pairs.append((layer.ia3_l["default"], adapter.scale))
    with torch.no_grad():
        for theirs, ours in pairs:
            theirs.copy_(ours.view_as(theirs))
    for step in plain.head_steps if plain.has_classifier else ():
        if isinstance(step, nn.Module):
            step.requires_grad_(True)
    return plain, pairs


@pytest.mark.parametrize("make", [LoRA, IA3])
@pytest.mark.parametrize("family", ORACLE)
@pytest.mark.parametrize(
    ("dtype", "optimizer"),
    [
        (torch.float32, partial(torch.optim.SGD, lr=0.01, momentum=0.9)),
        (torch.float64, partial(torch.optim.AdamW, lr=1e-2)),
    ],
    ids=["fp32", "fp64"],
)
def test_it_equals_the_peft_library(
    tiny: Tiny, family: str, make: Callable[..., Method], dtype: torch.dtype, optimizer: Callable[..., Any]
) -> None:
    """Scores, gradients, and ten steps of training; Adam's in double precision, for it divides gradients that rounding
    alone makes by their size.
    """
    own: dict[str, Any] = {"backbone": tiny(family)}
    torch.manual_seed(1)  # whether or not the backbone was made just now
    if family == "gpt2":
        own |= {"roles": ("output", "up", "down")} if make is LoRA else {"outputs": ("output",), "inputs": ("down",)}
    method = make(**own)
    with torch.no_grad():
        for name, parameter in method.named_parameters():
            if name.endswith(".b"):
                parameter.normal_(std=0.1)
    plain, pairs = peft_twin(method, own["backbone"])
    batch = encode(method.backbone)
    method.eval().to(dtype)
    plain.to(dtype)
    optimizers = [optimizer([p for p in m.parameters() if p.requires_grad]) for m in (method, plain)]
    for step in range(10):
        ours, theirs = method.loss(batch), plain.loss(plain(batch), batch)
        # in single precision the sums' order differs between processors, and each step adds to that
        grown = 1e-5 * step if dtype is torch.float32 else 0.0
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=8 * torch.finfo(dtype).eps + grown)
        for loss, its in zip((ours, theirs), optimizers, strict=True):
            its.zero_grad()
            loss.backward()
        if step == 0:
            for their, our in pairs:
                assert their.grad is not None
                assert our.grad is not None
                torch.testing.assert_close(our.grad.view_as(their.grad), their.grad, atol=1e-6, rtol=1e-5)
        for its in optimizers:
            its.step()
    for their, our in pairs:
        torch.testing.assert_close(our.view_as(their), their, atol=1e-6, rtol=0)
