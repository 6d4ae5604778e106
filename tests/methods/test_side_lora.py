"""Side LoRA: what it starts as, what it is with all blocks re-entered, and what it never touches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lit_spu.backbones import find_norms, load_backbone
from lit_spu.backbones.hooks import position_wise
from lit_spu.errors import UserError
from lit_spu.measure import LiveBytes
from lit_spu.methods.base import Method
from lit_spu.methods.lora import LoRA
from lit_spu.methods.side_lora import SideLoRA
from tests.conftest import FAMILIES, encode

Tiny = Callable[[str], str]


def disturbed(method: Method) -> Any:
    """The method with all of its pairs away from their start."""
    torch.manual_seed(1)
    with torch.no_grad():
        for adapter in method.adapters:
            for parameter in adapter.parameters():
                parameter.normal_(std=0.2)
    return method


def twin(folder: str, make: Callable[..., Method], **settings: Any) -> Any:
    torch.manual_seed(0)  # for the same new head
    return make(backbone=folder, **settings).eval().double()


@pytest.mark.parametrize("family", FAMILIES)
def test_it_starts_as_the_backbone(tiny: Tiny, family: str) -> None:
    folder = tiny(family)
    side = twin(folder, SideLoRA)
    torch.manual_seed(0)
    plain = load_backbone(folder, side.task).eval().double()
    batch = encode(plain)
    with torch.no_grad():
        torch.testing.assert_close(side(batch), plain(batch), atol=1e-12, rtol=0)


@pytest.mark.parametrize("family", [family for family in FAMILIES if not family.startswith("t5")])
def test_with_every_block_entered_it_is_lora(tiny: Tiny, family: str) -> None:
    folder = tiny(family)
    side, lora = disturbed(twin(folder, SideLoRA, reentry=4)), disturbed(twin(folder, LoRA))
    batch = encode(side.backbone)
    torch.testing.assert_close(side(batch), lora(batch), atol=1e-12, rtol=0)


@pytest.mark.parametrize("reentry", [0, 1, 4])
@pytest.mark.parametrize("family", ["bert", "deberta-v2", "t5", "gpt2"])
def test_it_is_its_formula(tiny: Tiny, family: str, reentry: int) -> None:
    """Each linear of a block that is not re-entered: W x_b + b + s·B(A x_s), from a plain run and a run of the side."""
    side: SideLoRA = disturbed(twin(tiny(family), SideLoRA, reentry=reentry))
    plain = load_backbone(tiny(family), side.task).eval().double()
    plain.load_state_dict(side.backbone.state_dict())
    batch = encode(plain)
    targets = {
        id(target.linear): target.path
        for target in side.backbone.target_linears(*plain.base_model.family.target_linears)
    }
    pairs: dict[str, list[Any]] = {}
    for adapter in side.adapters:
        pairs.setdefault(adapter.target.path, []).append(adapter)
    entered = {id(m) for block in side.backbone.base_model.stacks[-1].blocks[4 - reentry :] for m in block.modules()}
    out_of: dict[str, list[Tensor]] = {path: [] for path in targets.values()}
    for path, linear in ((p, plain.base_model.model.get_submodule(p)) for p in out_of):
        linear.register_forward_hook(lambda _m, _i, out, path=path: out_of[path].append(out.clone()))

    def check(linear: nn.Module, args: tuple[Tensor], out: Tensor) -> None:
        path, x = targets[id(linear)], args[0]
        wanted = linear_of(linear, x) if id(linear) in entered else out_of[path].pop(0)
        for pair in pairs[path]:
            width = wanted.shape[-1] // pair.target.num_parts
            wanted[..., pair.target.part * width :][..., :width] += pair.scale * x @ pair.a.T @ pair.b.T
        torch.testing.assert_close(out, wanted, atol=1e-12, rtol=0)
        seen[path] += 1

    seen: Counter[str] = Counter()
    with torch.no_grad():
        plain(batch)
        for path in out_of:
            linear = side.backbone.base_model.model.get_submodule(path)
            linear.register_forward_hook(lambda m, i, out: check(m, i, out) if is_side(m) else None)

        def is_side(module: nn.Module) -> bool:
            current = side.side._pass
            return id(module) in entered or (current is not None and current.runs_side)

        side(batch)
    assert set(seen) == set(out_of)


@pytest.mark.parametrize("reentry", [0, 1])
@pytest.mark.parametrize("head", ["classifier", "prompt"])
@pytest.mark.parametrize("family", ["bert", "distilbert", "roberta", "electra"])
def test_the_last_block_at_one_position_is_the_whole_one_there(
    tiny: Tiny, family: str, head: Any, reentry: int
) -> None:
    side = disturbed(twin(tiny(family), SideLoRA, reentry=reentry, head=head))
    batch, base_model = encode(side.backbone), side.backbone.base_model
    with side.side.activate():
        whole = side.backbone.apply_head(
            side.backbone.select_answer_state(base_model.forward(side.backbone.model_inputs(batch)), batch)
        )
    widths: list[int] = []
    record = position_wise(lambda _m, _i, out: widths.append(out.shape[1]))
    handle = find_norms(side.backbone.blocks[-1])[-1].register_forward_hook(record)
    found = side(batch)
    handle.remove()
    assert set(widths) == {1}
    torch.testing.assert_close(found, whole, atol=1e-12, rtol=0)
    pairs = [p for adapter in side.adapters for p in adapter.parameters()]
    gradients = [torch.autograd.grad(scores.logsumexp(-1).sum(), pairs, retain_graph=True) for scores in (found, whole)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-12, rtol=1e-9)


@pytest.mark.parametrize("reentry", [0, 2, 4])
def test_the_side_of_a_decoder_attends_to_the_side_of_the_encoder(tiny: Tiny, reentry: int) -> None:
    side = disturbed(twin(tiny("t5"), SideLoRA, reentry=reentry))
    plain = load_backbone(tiny("t5"), side.task).eval().double()
    batch, read, left = encode(plain), [], []
    model = side.backbone.base_model.model
    model.encoder.register_forward_hook(lambda _m, _i, out: left.append(out.last_hidden_state))
    for target in side.backbone.target_linears("key"):
        if "EncDecAttention" in target.path:
            target.linear.register_forward_hook(lambda _m, args, _o: read.append(args[0]))
    with torch.no_grad():
        side(batch)
        inputs = plain.model_inputs(batch)
        expected = plain.base_model.model.encoder(inputs["input_ids"], inputs["attention_mask"]).last_hidden_state
    backbones, sides = left[0].chunk(2)
    torch.testing.assert_close(backbones, expected, atol=1e-12, rtol=0)
    assert not torch.allclose(sides, backbones, atol=1e-3)
    wanted = [backbones, sides] * (4 - reentry) + [sides] * reentry
    assert [torch.equal(x, y) for x, y in zip(read, wanted, strict=True)] == [True] * len(wanted)


class ReadsOf(TorchFunctionMode):
    """Counts the functions that read weights, by whether gradients are enabled."""

    def __init__(self, weights: set[Any]) -> None:
        super().__init__()
        self.weights, self.count = weights, Counter[bool]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        is_computation = getattr(func, "__name__", "") != "__get__"
        if is_computation and any(argument is weight for argument in args for weight in self.weights):
            self.count[torch.is_grad_enabled()] += 1
        return func(*args, **(kwargs or {}))


def linear_of(linear: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = type(linear).forward(linear, x)
    return out.clone()


@pytest.mark.parametrize("family", FAMILIES)
def test_no_gradient_enters_the_backbone(tiny: Tiny, family: str) -> None:
    """Its linear layers run without gradients alone, and all weights of the side get theirs."""
    method = disturbed(SideLoRA(backbone=tiny(family)).train())
    linears = {
        target.linear for target in method.backbone.target_linears(*method.backbone.base_model.family.target_linears)
    }
    with ReadsOf({linear.weight for linear in linears}) as reads:
        method.loss(encode(method.backbone)).backward()
    assert reads.count[True] == 0
    assert reads.count[False] >= len(linears)
    head = {id(p) for p in method.backbone.parameters() if p.requires_grad}
    assert all(p.grad is None for p in method.backbone.parameters() if id(p) not in head)
    assert all(p.grad is not None for p in method.pairs.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_recomputing_changes_memory_alone(tiny: Tiny, family: str) -> None:
    losses, gradients, peaks = [], [], []
    for on in (False, True):
        method = disturbed(twin(tiny(family), SideLoRA, gradient_checkpointing=on)).train()
        batch = encode(method.backbone)
        with LiveBytes(method) as live:
            loss = method.loss(batch)
            loss.backward()
        losses.append(loss.detach())
        gradients.append([p.grad for p in method.pairs.parameters()])
        peaks.append(live.peak_bytes)
    assert torch.equal(*losses)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    assert peaks[1] < peaks[0]


def test_impossible_depths_are_refused(tiny: Tiny) -> None:
    with pytest.raises(UserError, match=r"model.reentry=5.*4 blocks; use 0 to 4"):
        SideLoRA(reentry=5, backbone=tiny("bert"))


def test_it_is_not_merged(tiny: Tiny) -> None:
    with pytest.raises(UserError, match="SideLoRA cannot be merged"):
        SideLoRA(backbone=tiny("bert")).merge()


def test_an_error_in_a_block_leaves_the_model_as_it_was(tiny: Tiny) -> None:
    method = SideLoRA(backbone=tiny("bert"))
    batch = encode(method.backbone)
    scores = method.eval()(batch)

    def fail(*_: Any) -> None:
        raise RuntimeError("interrupted")

    handle = method.backbone.blocks[2].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="interrupted"):
        method(batch)
    handle.remove()
    assert method.side._pass is None
    assert torch.equal(method(batch), scores)
