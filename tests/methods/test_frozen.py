"""A frozen backbone in less precision: half the memory, nearly the same gradients, and everything trained in fp32."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from lit_spu import registry
from lit_spu.backbones import find_norms
from lit_spu.errors import UserError
from lit_spu.methods.frozen import FrozenBackbone
from lit_spu.methods.lora import LoRA
from lit_spu.methods.mezo_lst import MeZOLST
from tests.conftest import FAMILIES, encode

Tiny = Callable[[str], str]
METHODS = [  # MeZOLST moves its backbone
    cls
    for cls in registry.classes("lit_spu.methods")
    if issubclass(cls, FrozenBackbone) and not inspect.isabstract(cls) and cls is not MeZOLST
]


def made(cls: type[FrozenBackbone], folder: str, precision: Any) -> Any:
    own: dict[str, Any] = {"reduction": 2} if "reduction" in registry.settings(cls) else {}
    if "siblings" in registry.settings(cls):
        own = {"siblings": {"one": {}, "other": {}}, "settings": {"reduction": 2}}
    torch.manual_seed(0)
    method = cls(backbone=folder, backbone_precision=precision, **own)
    torch.manual_seed(1)
    with torch.no_grad():
        for adapter in method.adapters:
            for parameter in adapter.parameters():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return method.train()


@pytest.mark.parametrize("cls", METHODS, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("family", FAMILIES)
def test_bf16_learns_what_fp32_does(tiny: Tiny, family: str, cls: type[FrozenBackbone]) -> None:
    gradients = {}
    for precision in ("fp32", "bf16"):
        method = made(cls, tiny(family), precision)
        # with labels of both kinds, the gradients of these random models all but cancel
        method.loss({**encode(method.backbone), "labels": torch.ones(4, dtype=torch.long)}).backward()
        trained = {name: p for name, p in method.named_parameters() if p.requires_grad}
        assert all(p.dtype is torch.float32 for p in trained.values())
        gradients[precision] = torch.cat([p.grad.flatten() for p in trained.values() if p.grad is not None])
    assert F.cosine_similarity(gradients["fp32"], gradients["bf16"], dim=0) > 0.99
    head = {id(p) for p in method.backbone.head_modules.parameters()}  # which a student's teacher does not learn
    frozen = [p for p in method.backbone.base_model.model.parameters() if id(p) not in head]
    assert {p.dtype for p in frozen} == {torch.bfloat16}


@pytest.mark.parametrize("family", ["bert", "t5", "llama", "gpt2"])
def test_norms_that_are_trained_after_all_are_so_in_fp32(tiny: Tiny, family: str) -> None:
    norms, scores = [], []
    for precision in ("fp32", "bf16"):
        torch.manual_seed(0)
        method = LoRA(backbone=tiny(family), norms=True, backbone_precision=precision).eval()
        batch = {**encode(method.backbone), "labels": torch.ones(4, dtype=torch.long)}
        method.loss(batch).backward()
        norms.append([p for block in method.backbone.blocks for norm in find_norms(block) for p in norm.parameters()])
        scores.append(method(batch).detach())
    assert all(p.dtype is torch.float32 for p in norms[1])
    flat = [torch.cat([p.grad.flatten() for p in some if p.grad is not None]) for some in norms]
    assert F.cosine_similarity(flat[0], flat[1], dim=0) > 0.99
    torch.testing.assert_close(scores[1], scores[0], atol=0.05, rtol=0.05)


@pytest.mark.parametrize("cls", METHODS, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("family", ["bert", "deberta-v2", "t5", "llama"])
def test_int8_learns_what_fp32_does(tiny: Tiny, family: str, cls: type[FrozenBackbone]) -> None:
    pytest.importorskip("torchao", reason="torchao is an extra of its own: pip install 'lit-spu[int8]'")
    gradients = []
    for precision in ("fp32", "int8"):
        method = made(cls, tiny(family), precision)
        method.loss({**encode(method.backbone), "labels": torch.ones(4, dtype=torch.long)}).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in method.parameters() if p.grad is not None]))
    assert F.cosine_similarity(gradients[0], gradients[1], dim=0) > 0.97
    if method.adapters and cls.__name__ != "SideLoRA":
        with pytest.raises(UserError, match="is held in int8, which cannot be changed"):
            method.merge()


def test_int8_says_what_it_needs(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(UserError, match=r"pip install 'lit-spu\[int8\]'"):
        LoRA(backbone=tiny("bert"), backbone_precision="int8")
