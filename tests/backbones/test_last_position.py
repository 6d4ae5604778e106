"""The last block at one position: equal results, less work, and transformers' own code where anything is attached."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_spu.backbones import Backbone, load_backbone
from lit_spu.backbones.encoder import Encoder
from lit_spu.backbones.hooks import override_forward, position_wise
from lit_spu.backbones.stacks import tensor_of
from lit_spu.methods.ia3 import IA3
from lit_spu.methods.lora import LoRA
from lit_spu.tasks import TASKS
from tests.conftest import FAMILIES, encode

Tiny = Callable[[str], str]


def last_widths(backbone: Backbone, run: Callable[[], Any]) -> list[int]:
    """Return the numbers of positions that the last block computes in `run`."""
    widths: list[int] = []

    @position_wise
    def hook(_block: nn.Module, _args: Any, output: Any) -> None:
        widths.append(tensor_of(output).shape[1])

    handle = backbone.blocks[-1].register_forward_hook(hook)
    try:
        run()
    finally:
        handle.remove()
    return widths


def collect(found: list[Tensor], run: Callable[[], Tensor]) -> None:
    found.append(run())


def load(folder: str, head: Any = "classifier", task: str = "mnli") -> Backbone:
    torch.manual_seed(0)
    return load_backbone(folder, TASKS[task], head).double().eval()


@pytest.mark.parametrize("head", ["classifier", "prompt"])
@pytest.mark.parametrize("family", FAMILIES)
def test_logits_and_gradients_are_those_of_all_positions(tiny: Tiny, family: str, head: Any) -> None:
    teacher = load(tiny(family), head)
    backbone = teacher.make_student(2, [range(4)] * len(teacher.stacks)).double().eval()
    batch = encode(backbone)  # texts of different lengths
    inputs, position = backbone.model_inputs(batch), backbone.answer_position(batch)
    found: list[list[Tensor]] = []
    widths = []
    for run in (
        lambda: backbone.base_model.forward(inputs),
        lambda: backbone.base_model.forward_at(inputs, position),
    ):
        hidden: list[Tensor] = []
        widths += last_widths(backbone, partial(collect, hidden, run))
        logits = backbone.apply_head(backbone.select_answer_state(hidden[0], batch))
        grads = torch.autograd.grad(logits.square().sum(), list(backbone.parameters()), allow_unused=True)
        found.append([logits, *grads])
    assert len(set(position.tolist())) > 1 or head == "classifier" or family.startswith("t5")
    for all_positions, one in zip(*found, strict=True):
        torch.testing.assert_close(one, all_positions, atol=1e-12, rtol=1e-9)
    narrows = backbone.base_model.family.architecture is Encoder and family != "deberta-v2"
    assert widths[1] == (1 if narrows else widths[0])


@pytest.mark.parametrize("make", [LoRA, IA3])
@pytest.mark.parametrize("family", ["bert", "distilbert"])
def test_adapters_apply_at_all_positions(tiny: Tiny, family: str, make: Callable[..., Any]) -> None:
    """Also on the keys' inputs, which a hook scales before the layer runs."""
    torch.manual_seed(0)
    settings: dict[str, Any] = {"outputs": ("query", "value"), "inputs": ("key", "down")} if make is IA3 else {}
    method = make(backbone=tiny(family), **settings).double().eval()
    with torch.no_grad():
        for adapter in method.adapters:
            for parameter in adapter.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
    backbone, batch = method.backbone, encode(method.backbone)
    hidden = backbone.base_model.forward(backbone.model_inputs(batch))
    expected = backbone.apply_head(backbone.select_answer_state(hidden, batch))
    torch.testing.assert_close(method(batch), expected, atol=1e-12, rtol=0)
    assert last_widths(backbone, lambda: method(batch)) == [1]


def hook_values(kind: str, backbone: Backbone) -> Any:
    values = backbone.blocks[-1].get_submodule("attention.self.value")
    return getattr(values, f"register_{kind}_hook")(lambda *_: None)


ATTACHED: dict[str, Callable[[Backbone], Any]] = {
    **{
        f"{kind} hook": partial(hook_values, kind)
        for kind in ("forward", "forward_pre", "full_backward", "full_backward_pre")
    },
    "hook on the block": lambda backbone: backbone.blocks[-1].register_forward_hook(lambda *_: None),
    "global hook": lambda _: torch.nn.modules.module.register_module_forward_hook(lambda *_: None),
    "global backward hook": lambda _: torch.nn.modules.module.register_module_full_backward_hook(lambda *_: None),
    "another forward": lambda backbone: override_forward(
        backbone.blocks[-1].get_submodule("output"), lambda forward, *args: forward(*args)
    ),
    "another forward below a position-wise one": lambda backbone: (
        override_forward(backbone.blocks[-1].get_submodule("output"), lambda forward, *args: forward(*args)),
        override_forward(
            backbone.blocks[-1].get_submodule("output"), position_wise(lambda forward, *args: forward(*args))
        ),
    ),
    "a wrapped layer": lambda backbone: setattr(
        backbone.blocks[-1].get_submodule("attention.self"),
        "key",
        nn.Sequential(backbone.blocks[-1].get_submodule("attention.self.key")),
    ),
}


@pytest.mark.filterwarnings("ignore:For backward hooks to be called")  # of outputs that are no tensors
@pytest.mark.parametrize("attached", ATTACHED)
def test_a_block_with_anything_attached_runs_at_all_positions(tiny: Tiny, attached: str) -> None:
    backbone = load(tiny("bert"))
    batch = encode(backbone)
    expected = backbone(batch)
    handle = ATTACHED[attached](backbone)
    try:
        found: list[Tensor] = []
        widths = last_widths(backbone, partial(collect, found, partial(backbone, batch)))
    finally:
        if hasattr(handle, "remove"):
            handle.remove()
    assert widths == [batch["input_ids"].shape[1]]
    torch.testing.assert_close(found[0], expected, atol=1e-12, rtol=0)


def test_a_bert_that_is_a_decoder_runs_at_all_positions(tiny: Tiny, tmp_path: Path) -> None:
    """Its tokens attend to earlier ones only, so each position has a mask of its own."""
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    folder = tiny("bert")
    model = AutoModelForMaskedLM.from_pretrained(folder)
    model.config.is_decoder = True
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path)
    backbone = load(str(tmp_path), "prompt", "sst2")
    batch = encode(backbone)
    assert last_widths(backbone, lambda: backbone(batch)) == [batch["input_ids"].shape[1]]


def test_hidden_states_are_complete_after_a_forward_pass_at_one_position(tiny: Tiny) -> None:
    backbone = load(tiny("bert"))
    batch = encode(backbone)
    backbone(batch)
    states = backbone.hidden_states(batch)[0]
    assert {state.shape[1] for state in states.blocks} == {batch["input_ids"].shape[1]}
    assert last_widths(backbone, lambda: backbone(batch)) == [1]
    torch.testing.assert_close(
        backbone.logits_from(backbone.hidden_states(batch), batch), backbone(batch), atol=1e-12, rtol=0
    )
