"""Fusions against plain formulas."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lit_spu.backbones import Stack
from lit_spu.nn.fusion import Additive, Attention, CrossAttention, Dynamic, Fusion, Gate, Gated

DEPTH, WIDTH = 3, 4
ONE, THREE = ({i: list(range(slots)) for i in range(DEPTH)} for slots in (1, 3))  # every rung reads all window
STACK = Stack(tuple(nn.Identity() for _ in range(DEPTH)), 8, num_heads=2, is_causal=False)
ZERO = torch.zeros(2, 5, WIDTH, dtype=torch.float64)
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])


def tensors(slots: int, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    draw = torch.Generator().manual_seed(seed)
    state, *window = (torch.randn(2, 5, WIDTH, generator=draw, dtype=torch.float64) for _ in range(slots + 1))
    return state, window


@given(alpha=st.floats(-0.5, 0.5))
@settings(max_examples=20, deadline=None)
def test_the_gate_is_the_published_one(alpha: float) -> None:
    gate = Gate(STACK, ONE, WIDTH).double()
    torch.nn.init.constant_(gate.alpha, alpha)
    state, window = tensors(1)
    g = 1 / (1 + math.exp(-alpha / 0.1))
    torch.testing.assert_close(gate([*window, ZERO], None)(1, state), g * state + (1 - g) * window[0])


def test_the_gate_starts_halfway_with_slope_two_and_a_half() -> None:
    gate = Gate(STACK, ONE, WIDTH).double()
    state, window = torch.ones(1, 1, WIDTH, dtype=torch.float64), [torch.zeros(1, 1, WIDTH, dtype=torch.float64)]
    out = gate([*window, ZERO], None)(0, state)
    assert float(out[0, 0, 0].detach()) == 0.5
    out[0, 0, 0].backward()
    assert gate.alpha.grad is not None
    torch.testing.assert_close(gate.alpha.grad, torch.tensor([2.5, 0, 0], dtype=torch.float64))


def test_gated_with_one_slot_is_the_gate_bitwise() -> None:
    state, window = tensors(1)
    plain, windowed = Gate(STACK, ONE, WIDTH), Gated(STACK, ONE, WIDTH)
    state32, tap32 = state.float(), window[0].float().requires_grad_()
    outs = [fusion([tap32, ZERO], None)(1, state32) for fusion in (plain, windowed)]
    assert torch.equal(*outs)
    grads = [
        torch.autograd.grad(out.square().sum(), [tap32, f.alpha])
        for out, f in zip(outs, (plain, windowed), strict=True)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("slot", range(3))
def test_a_one_hot_slot_reads_that_tap_alone(slot: int) -> None:
    fusion = Gated(STACK, THREE, WIDTH).double()
    torch.nn.init.constant_(fusion.slots, -1e9)
    fusion.slots.data[:, slot] = 0.0
    state, window = tensors(3)
    torch.testing.assert_close(fusion([*window, ZERO], None)(0, state), 0.5 * state + 0.5 * window[slot])


def test_additive_is_the_sum() -> None:
    state, window = tensors(3)
    torch.testing.assert_close(Additive(STACK, THREE, WIDTH)([*window, ZERO], None)(0, state), state + sum(window))


def test_dynamic_gates_each_example_by_its_real_tokens() -> None:
    fusion = Dynamic(STACK, THREE, WIDTH).double()
    state, window = tensors(3)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    out = fusion([*window, ZERO], mask)(0, state)
    torch.testing.assert_close(out, 0.5 * state + 0.5 * sum(window) / 3)  # it starts as `gated`
    torch.nn.init.normal_(fusion.pooled, std=3.0)
    out = fusion([*window, ZERO], mask)(0, state)
    for row, real in enumerate((3, 5)):
        mean = torch.stack([tap[row, :real].mean(0) for tap in window]).mean(0)
        g = torch.sigmoid(mean @ fusion.pooled[0])
        torch.testing.assert_close(out[row], g * state[row] + (1 - g) * sum(tap[row] for tap in window) / 3)


def test_attention_is_a_loop_over_tokens() -> None:
    torch.manual_seed(0)
    fusion = Attention(STACK, THREE, WIDTH).double()
    torch.nn.init.normal_(fusion.origin)
    state, window = tensors(3)
    out = fusion([*window, ZERO], None)(1, state)
    query, key, value, last = (modules["1"] for modules in (fusion.query, fusion.key, fusion.value, fusion.out))
    for row in range(2):
        for token in range(5):
            memory = torch.stack([tap[row, token] + fusion.origin[1, slot] for slot, tap in enumerate(window)])
            shares = (key(memory) @ query(state[row, token]) / WIDTH**0.5).softmax(0)
            expected = state[row, token] + last(shares @ value(memory))
            torch.testing.assert_close(out[row, token], expected)


def looped(fusion: CrossAttention, state: Tensor, window: list[Tensor], mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Cross-attention token by token and head by head; also what each slot got of the real tokens' attention."""
    query, key, value, last = (modules["1"] for modules in (fusion.query, fusion.key, fusion.value, fusion.out))
    out, got = state.clone(), torch.zeros(len(window), dtype=torch.float64)
    for row in range(2):
        for token in range(5):
            sees = [
                (slot, other)
                for slot in range(len(window))
                for other in range(5)
                if (mask is None or mask[row, other]) and (not fusion.is_causal or other <= token)
            ]
            if not sees:
                continue
            memory = torch.stack([window[slot][row, other] + fusion.origin[1, slot] for slot, other in sees])
            heads = []
            for head in range(2):
                part = slice(2 * head, 2 * head + 2)
                shares = (key(memory)[:, part] @ query(state[row, token])[part] / 2**0.5).softmax(0)
                heads.append(shares @ value(memory)[:, part])
                if mask is None or mask[row, token]:
                    for (slot, _), share in zip(sees, shares, strict=True):
                        got[slot] += float(share)
            out[row, token] = state[row, token] + last(torch.cat(heads))
    return out, got / got.sum()


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("mask", [None, MASK])
def test_cross_attention_is_a_loop_over_tokens_and_heads(causal: bool, mask: Tensor | None) -> None:
    torch.manual_seed(0)
    fusion = CrossAttention(replace(STACK, is_causal=causal), THREE, WIDTH).double()
    torch.nn.init.normal_(fusion.origin)
    state, window = tensors(3)
    with torch.no_grad():
        wanted, got = looped(fusion, state, window, mask)
        torch.testing.assert_close(fusion([*window, ZERO], mask)(1, state), wanted, atol=1e-12, rtol=0)
        assert fusion.shares(1) is None  # nothing is counted in training
        torch.testing.assert_close(fusion.eval()([*window, ZERO], mask)(1, state), wanted, atol=1e-12, rtol=0)
    shares = fusion.shares(1)
    assert shares is not None
    torch.testing.assert_close(shares, got, atol=1e-12, rtol=0)
    assert fusion.shares(1) is None  # and each time anew


def test_the_shares_of_attention_are_the_means_over_real_tokens() -> None:
    torch.manual_seed(0)
    fusion = Attention(STACK, THREE, WIDTH).double().eval()
    torch.nn.init.normal_(fusion.origin)
    batches = [tensors(3, seed) for seed in range(2)]
    got = torch.zeros(3, dtype=torch.float64)
    for state, window in batches:
        fusion([*window, ZERO], MASK)(1, state)
        for row, token in MASK.nonzero().tolist():
            memory = torch.stack([tap[row, token] + fusion.origin[1, slot] for slot, tap in enumerate(window)])
            got += (fusion.key["1"](memory) @ fusion.query["1"](state[row, token]) / WIDTH**0.5).softmax(0).detach()
    shares = fusion.shares(1)
    assert shares is not None
    torch.testing.assert_close(shares, got / 16, atol=1e-12, rtol=0)


def test_a_learned_window_tells_its_gate_and_its_shares() -> None:
    fusion = Gated(STACK, THREE, WIDTH)
    torch.nn.init.normal_(fusion.slots)
    torch.nn.init.constant_(fusion.alpha, 0.1)
    assert torch.equal(fusion.shares(2), fusion.slots[2].softmax(0))
    assert float(fusion.gate(2).detach()) == pytest.approx(1 / (1 + math.exp(-1)))  # type: ignore[union-attr]
    assert Dynamic(STACK, THREE, WIDTH).gate(0) is None  # type: ignore[func-returns-value]
    assert Additive(STACK, THREE, WIDTH).shares(0) is None


@pytest.mark.parametrize("kind", [Gate, Gated, Additive, Dynamic, Attention, CrossAttention])
def test_gradients_are_right(kind: type[Fusion]) -> None:
    torch.manual_seed(0)
    fusion = kind(STACK, ONE if kind is Gate else THREE, WIDTH).double()
    for parameter in fusion.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    state, window = tensors(1 if kind is Gate else 3)
    inputs = [tensor.requires_grad_() for tensor in (state, *window)]
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    assert torch.autograd.gradcheck(lambda s, *t: fusion([*t, ZERO], mask)(2, s), inputs)
