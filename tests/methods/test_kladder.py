"""k-ladder as a method. The fusions' maths and the windows are in tests/nn."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args, get_type_hints

import pytest
import torch
from lightning.pytorch import Trainer

from lit_spu.data.glue import GLUE
from lit_spu.errors import UserError
from lit_spu.methods.kladder import KLadder
from lit_spu.methods.ladder import LadderBase, LadderSideTuning
from lit_spu.methods.readout import LinearReadOut
from lit_spu.nn import fusion as fusions
from tests.conftest import FAMILIES, encode

Tiny = Callable[[str], str]
FUSIONS = get_args(get_type_hints(LadderBase.__init__)["fusion"])


@pytest.mark.parametrize("layers", [0, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_read_out_and_ladder_are_each_trained_as_alone(tiny: Tiny, family: str, layers: int) -> None:
    """Logits and gradients equal those of the read-out and of LST with the same weights, to the bit."""
    both = KLadder(k=1, layers=layers, backbone=tiny(family), reduction=2, dropout=0.0)
    for parameter in [*both.readout.parameters(), *both.pairs.parameters()]:
        torch.nn.init.normal_(parameter, std=0.1)
    readout = LinearReadOut(layers=layers, backbone=tiny(family), dropout=0.0)
    lst = LadderSideTuning(k=1, backbone=tiny(family), reduction=2)
    batch = encode(both.backbone)
    for alone in (readout, lst):
        alone.load_state_dict(both.state_dict(), strict=False)
    states = both.compute_states(both.hidden_states(batch), batch)  # those of tuned blocks come from the k-ladder
    logits = [readout.eval()(batch), lst.eval()(batch, states)]
    assert torch.equal(both.eval()(batch), torch.stack(logits).mean(0))
    both.loss(batch).backward()
    loss = readout.loss(batch) + lst.loss(batch, states if layers else None)
    loss.backward()
    theirs = {name: p.grad for alone in (readout, lst) for name, p in alone.named_parameters() if p.requires_grad}
    for name, parameter in both.named_parameters():
        if parameter.requires_grad and name.startswith(("readout.", "side.")):
            assert torch.equal(parameter.grad, theirs[name]), name  # type: ignore[arg-type]
    joint = KLadder(k=1, joint=True, layers=layers, backbone=tiny(family), reduction=2).eval()
    joint.load_state_dict(both.state_dict())
    torch.testing.assert_close(joint.loss(batch), joint.backbone.loss(both(batch), batch))


@pytest.mark.parametrize("family", ["bert", "t5", "gpt2"])
def test_radius_zero_is_lst_bitwise(tiny: Tiny, family: str) -> None:
    torch.manual_seed(0)
    lst = LadderSideTuning(backbone=tiny(family), reduction=2)
    torch.manual_seed(0)
    ladder = LadderSideTuning(k=0, backbone=tiny(family), reduction=2)
    ladder.load_state_dict(lst.state_dict(), strict=False)
    batch = encode(lst.backbone)
    losses = [method.eval().loss(batch) for method in (lst, ladder)]
    assert torch.equal(*losses)
    for loss in losses:
        loss.backward()
    theirs = dict(ladder.named_parameters())
    for name, parameter in lst.named_parameters():
        assert parameter.grad is None or torch.equal(parameter.grad, theirs[name].grad), name  # type: ignore[arg-type]


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("family", ["bert", "t5", "gpt2"])
@pytest.mark.parametrize("share", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_every_fusion_trains_all_it_has(tiny: Tiny, family: str, fusion: Any, share: bool) -> None:
    torch.manual_seed(0)  # with some seeds, fifty steps are too few
    method = LadderSideTuning(k=1, fusion=fusion, share_projections=share, backbone=tiny(family), reduction=2).train()
    batch = encode(method.backbone)
    optimizer = torch.optim.AdamW(method.side.parameters(), lr=0.003)
    first = method.loss(batch)
    for _ in range(50):
        optimizer.zero_grad()
        loss = method.loss(batch)
        loss.backward()
        optimizer.step()
    assert all(p.grad is not None for p in method.side.parameters())
    assert loss.item() < first.item()


def test_shared_projections_cost_no_more_than_lst_s(tiny: Tiny) -> None:
    def count(method: LadderSideTuning) -> int:
        return sum(p.numel() for p in method.side.parameters())

    lst = count(LadderSideTuning(backbone=tiny("bert"), reduction=2))
    assert count(LadderSideTuning(k=2, backbone=tiny("bert"), reduction=2)) == lst + 4 * 5  # the slots' weights
    each = 32 * 16 + 16
    windows = 3 + 4 + 4 + 3  # of five slots, those inside the backbone
    own = count(LadderSideTuning(k=2, share_projections=False, backbone=tiny("bert"), reduction=2))
    assert own == lst + 4 * 5 + (windows - 4) * each


def test_every_fusion_can_be_chosen() -> None:
    offered = {
        name.lower() for name, cls in vars(fusions).items() if isinstance(cls, type) and issubclass(cls, fusions.Fusion)
    }
    assert offered - {"fusion", "gate"} == {fusion.replace("_", "") for fusion in FUSIONS}


def test_impossible_windows_are_refused(tiny: Tiny) -> None:
    for k in (4, 10**6):
        with pytest.raises(UserError, match=rf"model\.k={k}: the backbone has 4 blocks. Use 0 to 3"):
            LadderSideTuning(k=k, backbone=tiny("bert"), reduction=2)
    LadderSideTuning(k=3, backbone=tiny("bert"), reduction=2)


@pytest.mark.parametrize("family", FAMILIES)
def test_cross_attention_leaves_the_backbone_alone_and_padding_out(tiny: Tiny, family: str) -> None:
    torch.manual_seed(0)
    method = LadderSideTuning(k=2, fusion="cross_attention", backbone=tiny(family), reduction=2).double().eval()
    for parameter in method.side.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    batch = encode(method.backbone)
    torch.testing.assert_close(method(batch), method(encode(method.backbone, pad_to=20)), atol=1e-10, rtol=0)
    method.loss(batch).backward()
    head = {id(p) for p in method.backbone.head_modules.parameters()}
    assert all(p.grad is None for p in method.backbone.parameters() if id(p) not in head)


def test_taps_are_left_out_whole(tiny: Tiny) -> None:
    method = LadderSideTuning(k=1, hidden_state_dropout=0.25, fusion="additive", backbone=tiny("bert"), reduction=2)
    ladder, (taps,) = method.side.ladders[0], method.backbone.hidden_states(encode(method.backbone))
    state = torch.zeros(4, taps.embeddings.shape[1], 16)
    read = [ladder.down[str(j)](taps.blocks[j]) for j in range(4)]  # type: ignore[index,operator]
    kept = torch.zeros(4, 3)
    rounds = 300
    for seed in range(rounds):
        torch.manual_seed(seed)
        out = ladder.train()(taps)(1, state)
        for row in range(4):  # the sum of some of the three taps, each a third larger than it is
            parts = torch.stack([read[j][row] / 0.75 for j in (0, 1, 2)])
            found = torch.linalg.lstsq(parts.flatten(1).T, out[row].flatten().unsqueeze(1)).solution.squeeze()
            torch.testing.assert_close(found, found.round(), atol=1e-3, rtol=0)
            kept[row] += found.round().detach()
    torch.testing.assert_close(kept / rounds, torch.full((4, 3), 0.75), atol=0.1, rtol=0)
    torch.testing.assert_close(ladder.eval()(taps)(1, state), read[0] + read[1] + read[2])


@pytest.mark.parametrize(("fusion", "gates"), [("gated", True), ("cross_attention", False), ("additive", False)])
@pytest.mark.parametrize("backbone", ["mini-bert", "mini-t5"])
def test_what_the_windows_read_is_logged(
    data: Callable[..., GLUE], fit: Callable[..., Trainer], backbone: str, fusion: Any, gates: bool
) -> None:
    method = LadderSideTuning(k=1, fusion=fusion, backbone=backbone, reduction=4)
    logged = fit(method, data(limit_train=16)).callback_metrics
    depths = [stack.depth for stack in method.backbone.stacks]
    of = [""] if len(depths) == 1 else [f"stream {number}/" for number in range(len(depths))]
    for prefix, depth in zip(of, depths, strict=True):
        for i in range(depth):
            assert (f"{prefix}gate/rung {i}" in logged) is gates
            window = [logged.get(f"{prefix}window/rung {i}/block {j}") for j in range(depth)]
            if fusion == "additive":
                assert window == [None] * depth
                continue
            inside = [float(share) for share in window if share is not None]
            assert len(inside) == min(i + 2, depth) - max(i - 1, 0)
            if 0 < i < depth - 1:
                assert sum(inside) == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("family", ["gpt2", "opt", "llama"])
def test_later_tokens_change_no_earlier_state_of_a_causal_model(tiny: Tiny, family: str, fusion: Any) -> None:
    torch.manual_seed(0)
    method: Any = LadderSideTuning(backbone=tiny(family), reduction=2, k=1, fusion=fusion).double().eval()
    with torch.no_grad():
        for parameter in method.side.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    ids = torch.tensor([[5, 23, 24, 25, 26, 27]])
    other = torch.cat([ids[:, :4], ids[:, 4:].flip(1)], 1)
    states = []
    for tokens in (ids, other):
        batch = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        position = torch.tensor([3])
        with torch.no_grad():
            states.append(method.side(method.hidden_states(batch), method.backbone.model_inputs(batch), position))
    torch.testing.assert_close(*states, atol=1e-12, rtol=0)
