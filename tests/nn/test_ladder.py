"""The ladder's proofs: counts, identity, isolation, extremes, windows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lit_spu.backbones import HiddenStates, load_backbone
from lit_spu.backbones.families import FAMILIES as RECORDS
from lit_spu.backbones.stacks import TransformerStacks
from lit_spu.errors import UserError
from lit_spu.nn.fusion import Gated
from lit_spu.nn.ladder import Ladder, Projection, SideNetwork
from lit_spu.tasks import TASKS
from tests.conftest import FAMILIES, encode

Tiny = Callable[[str], str]


def build(folder: str, reduction: int = 2, drop: Sequence[int] = (), **ladder: Any) -> tuple[Any, Any]:
    torch.manual_seed(2)
    backbone = load_backbone(folder, TASKS["sst2"], "prompt").double().eval()
    backbone.freeze()
    side = SideNetwork(backbone, reduction, drop, partial(Ladder, **ladder))
    side.up = Projection(side.side_model.output_width, backbone.width)
    for parameter in side.parameters():  # larger than at the start, so that every path shows in the scores
        nn.init.normal_(parameter, std=0.3)
    return backbone, side.double().eval()


def scores(
    backbone: Any, side: Any, batch: dict[str, Tensor], hidden_states: Sequence[HiddenStates] | None = None
) -> Tensor:
    with torch.no_grad():
        hidden_states = hidden_states or backbone.hidden_states(batch)
    hidden = side(hidden_states, backbone.model_inputs(batch), backbone.answer_position(batch))
    result: Tensor = backbone.apply_head(side.up(backbone.select_answer_state(hidden, batch)))
    return result


def trained(side: SideNetwork) -> int:
    return sum(parameter.numel() for parameter in side.parameters())


# Trainable parameters of published configurations (reduction, dropped layers), as the paper's own code counts them.
T5_BASE = {"d_model": 768, "d_ff": 3072, "d_kv": 64, "num_layers": 12, "num_heads": 12}
T5_SMALL = {"d_model": 512, "d_ff": 2048, "d_kv": 64, "num_layers": 6, "num_heads": 8}
T5_LARGE = {"d_model": 1024, "d_ff": 4096, "d_kv": 64, "num_layers": 24, "num_heads": 16}


@pytest.mark.parametrize(
    ("config", "reduction", "drop", "expected"),
    [
        (T5_BASE, 8, (0, 4, 8), 3_878_712),
        (T5_BASE, 8, (), 5_097_240),
        (T5_BASE, 8, (0, 2, 4, 6, 8, 10), 2_660_184),
        (T5_BASE, 4, (0, 4, 8), 12_400_728),
        (T5_BASE, 16, (0, 4, 8), 1_359_528),
        (T5_BASE, 32, (0, 4, 8), 535_392),
        (T5_SMALL, 8, (), 1_183_628),
        (T5_LARGE, 8, range(0, 24, 2), 9_057_328),
    ],
)
def test_trainable_counts_are_the_published_ones(
    config: dict[str, Any], reduction: int, drop: Sequence[int], expected: int
) -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    with torch.device("meta"):
        model = T5ForConditionalGeneration(T5Config(**config, vocab_size=32))
        side = SideNetwork(stand_in(model), reduction, list(drop))
        side.up = Projection(side.side_model.output_width, config["d_model"])
    assert trained(side) == expected


def stand_in(model: Any) -> Any:
    """As much of a backbone as a side network reads of it, without weights."""
    record = RECORDS[model.config.model_type]
    architecture: Any = record.architecture
    base_model = architecture.stacks_class(model, record)
    return SimpleNamespace(base_model=base_model, stacks=base_model.stacks, width=base_model.output_width)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_copy_at_full_width_is_the_backbone(tiny: Tiny, family: str) -> None:
    """r = 1, g ≡ 1, an identity at the entrance and at the exit, copied blocks: the scores are the backbone's."""
    backbone, side = build(tiny(family), reduction=1)
    plain = load_backbone(tiny(family), TASKS["sst2"], "prompt").double().eval()
    weights = plain.base_model.model.state_dict()
    with torch.no_grad():
        for name, tensor in side.model.state_dict().items():
            tensor.copy_(weights[name])
        for ladder in side.ladders:
            ladder.fusion.alpha.fill_(1e6)
            ladder.embedding_projection.weight.copy_(torch.eye(ladder.embedding_projection.in_features))
            ladder.embedding_projection.bias.zero_()
        side.up.weight.copy_(torch.eye(side.up.in_features))
        side.up.bias.zero_()
    batch = encode(backbone)
    torch.testing.assert_close(scores(backbone, side, batch), plain(batch), atol=1e-10, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_gate_extremes(tiny: Tiny, family: str) -> None:
    backbone, side = build(tiny(family))
    batch = encode(backbone)
    with torch.no_grad():
        hidden_states = backbone.hidden_states(batch)
        noise = [t._replace(blocks=tuple(torch.randn_like(b) for b in t.blocks)) for t in hidden_states]
        for ladder in side.ladders:
            ladder.fusion.alpha.fill_(1e6)
    assert torch.equal(
        scores(backbone, side, batch, hidden_states), scores(backbone, side, batch, noise)
    )  # the rungs are shut
    with torch.no_grad():
        for ladder in side.ladders:
            ladder.fusion.alpha.fill_(-1e6)
        last = [n._replace(blocks=(*n.blocks[:-1], t.blocks[-1])) for n, t in zip(noise, hidden_states, strict=True)]
        other = [t._replace(embeddings=torch.randn_like(t.embeddings)) for t in last]
    assert torch.equal(scores(backbone, side, batch, hidden_states), scores(backbone, side, batch, other))
    assert not torch.equal(scores(backbone, side, batch, hidden_states), scores(backbone, side, batch, noise))


@pytest.mark.parametrize("family", FAMILIES)
def test_the_backbone_is_read_and_never_touched(tiny: Tiny, family: str) -> None:
    backbone, side = build(tiny(family))
    before = copy.deepcopy(backbone.state_dict())
    batch = encode(backbone)
    plain = backbone(batch)
    with torch.no_grad():
        hidden_states = backbone.hidden_states(batch)
    assert not any(t.requires_grad for tap in hidden_states for t in (tap.embeddings, *tap.blocks))
    optimizer = torch.optim.AdamW(side.parameters(), lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        backbone.loss(scores(backbone, side, batch), batch).backward()
        optimizer.step()
    assert all(parameter.grad is None for parameter in backbone.parameters())
    assert all(parameter.grad is not None for parameter in side.parameters())
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())
    assert torch.equal(backbone(batch), plain)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing(tiny: Tiny, family: str) -> None:
    options: tuple[dict[str, Any], ...] = ({}, {"fusion": Gated, "radius": 1})
    for fusion in options:
        backbone, side = build(tiny(family), **fusion)
        short, long = encode(backbone), encode(backbone, pad_to=20)
        torch.testing.assert_close(scores(backbone, side, short), scores(backbone, side, long), atol=1e-12, rtol=0)


def test_a_dropped_layer_is_not_read(tiny: Tiny) -> None:
    backbone, side = build(tiny("t5"), drop=(0, 2))
    batch = encode(backbone)
    hidden_states = backbone.hidden_states(batch)

    def noised(block: int) -> list[HiddenStates]:
        return [
            t._replace(blocks=tuple(torch.randn_like(b) if i == block else b for i, b in enumerate(t.blocks)))
            for t in hidden_states
        ]

    plain = scores(backbone, side, batch, hidden_states)
    for block in range(4):
        assert torch.equal(scores(backbone, side, batch, noised(block)), plain) == (block in (0, 2))
    biases = [name for name, _ in side.named_parameters() if "relative_attention_bias" in name]
    assert len(biases) == 2  # one a stack, on its first kept block


@pytest.mark.parametrize("family", FAMILIES)
def test_radius_zero_is_lst_bitwise(tiny: Tiny, family: str) -> None:
    backbone, plain = build(tiny(family))
    _, windowed = build(tiny(family), fusion=Gated, radius=0)
    plain, windowed = plain.float(), windowed.float()
    backbone = backbone.float()
    missing, unexpected = windowed.load_state_dict(plain.state_dict(), strict=False)
    assert all(name.endswith("fusion.slots") for name in missing)
    assert not unexpected
    batch = encode(backbone)
    outs = [scores(backbone, side, batch) for side in (plain, windowed)]
    assert torch.equal(*outs)
    for out in outs:
        out.square().sum().backward()
    gradients = dict(windowed.named_parameters())
    assert all(torch.equal(p.grad, gradients[name].grad) for name, p in plain.named_parameters())


@pytest.mark.parametrize("radius", [1, 2, 5])
@pytest.mark.parametrize("shared", [True, False])
def test_windows_equal_a_zero_padded_loop(tiny: Tiny, radius: int, shared: bool) -> None:
    backbone, side = build(tiny("bert"), drop=(1,), fusion=Gated, radius=radius, shared=shared)
    batch = encode(backbone)
    hidden_states = backbone.hidden_states(batch)[0]
    ladder: Any = side.ladders[0]
    enter = ladder(hidden_states)
    state = torch.randn(*hidden_states.embeddings.shape[:2], 16, dtype=torch.float64)
    for n, i in enumerate(ladder.layer_indices):
        mean = torch.zeros_like(state)
        for slot, share in enumerate(ladder.fusion.slots[i].softmax(0)):
            j = i - radius + slot
            if 0 <= j < 4:
                mean += share * ladder.down[str(j) if shared else f"{i}<{j}"](hidden_states.blocks[j])
        start = ladder.embedding_projection(hidden_states.embeddings) if n == 0 else state
        g = torch.sigmoid(ladder.fusion.alpha[i] / 0.1)
        torch.testing.assert_close(enter(n, state), g * start + (1 - g) * mean)


def test_a_one_hot_window_is_lst(tiny: Tiny) -> None:
    backbone, plain = build(tiny("t5"))
    _, windowed = build(tiny("t5"), fusion=Gated, radius=1)
    windowed.load_state_dict(plain.state_dict(), strict=False)
    for ladder in windowed.ladders:
        nn.init.constant_(ladder.fusion.slots, -1e9)
        ladder.fusion.slots.data[:, 1] = 0.0
    batch = encode(backbone)
    torch.testing.assert_close(scores(backbone, windowed, batch), scores(backbone, plain, batch), atol=1e-14, rtol=0)


def test_impossible_side_networks_are_refused(tiny: Tiny) -> None:
    with pytest.raises(UserError, match=r"model.reduction=3 .* Allowed: 1, 2, 4, 8\."):
        build(tiny("bert"), reduction=3)
    with pytest.raises(UserError, match=r"Allowed: 1, 2, 4\."):  # a rotary head is at least a pair wide
        build(tiny("llama"), reduction=8)
    with pytest.raises(UserError, match="each stack must keep one"):
        build(tiny("t5"), drop=(0, 1, 2, 3))
    with pytest.raises(UserError, match="layers are 0 to 3"):
        build(tiny("bert"), drop=(4,))


@pytest.mark.parametrize("wide", [384, 768])
def test_a_projection_keeps_the_scale_of_what_it_reads(wide: int) -> None:
    torch.manual_seed(0)
    out = Projection(wide, 96)(torch.randn(1000, wide))
    assert out.std().item() == pytest.approx(1.0, abs=0.05)


def test_transformer_stacks_are_not_modules() -> None:
    assert not issubclass(
        TransformerStacks, nn.Module
    )  # a side network must not enter the backbone's tree, nor the backbone its own
