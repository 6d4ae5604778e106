"""Saved bytes compared with sums by hand."""

from __future__ import annotations

import torch
from torch import nn

from lit_spu.measure import SavedForBackward

FLOAT = 4


def test_a_chain_saves_its_inputs_once() -> None:
    """x → Linear → ReLU → Linear: x for the first weight; relu(x) for the ReLU and for the second weight, once."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    inputs = torch.randn(5, 8)
    with SavedForBackward(exclude=model.parameters()) as saved:
        model(inputs)
    assert saved.nbytes == (5 * 8 + 5 * 16) * FLOAT
    assert len(saved) == 2
    assert inputs in saved


def test_parameters_count_unless_excluded() -> None:
    first, second = nn.Linear(8, 16), nn.Linear(16, 4)
    with SavedForBackward() as saved:
        second(first(torch.randn(5, 8)))
    assert saved.nbytes == (5 * 8 + 5 * 16 + 16 * 4) * FLOAT  # the first weight is not saved: x needs no gradient
    assert second.weight in saved
    assert first.weight not in saved


def test_a_frozen_layer_saves_nothing() -> None:
    frozen, head = nn.Linear(8, 16).requires_grad_(False), nn.Linear(16, 4)
    inputs = torch.randn(5, 8)
    with SavedForBackward(exclude=[*frozen.parameters(), *head.parameters()]) as saved:
        hidden = frozen(inputs)
        head(hidden)
    assert inputs not in saved
    assert hidden in saved
    assert saved.nbytes == 5 * 16 * FLOAT


def test_gradients_are_the_same_as_without_the_counter() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    inputs = torch.randn(3, 4)
    plain = torch.autograd.grad(model(inputs).sum(), list(model.parameters()))
    with SavedForBackward():
        loss = model(inputs).sum()
    counted = torch.autograd.grad(loss, list(model.parameters()))
    assert all(torch.equal(*pair) for pair in zip(plain, counted, strict=True))
