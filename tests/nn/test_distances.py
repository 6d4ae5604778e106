"""The distances between a student and its teacher, against loops and closed forms."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lit_spu.nn import distances

MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]])


def states(width: int = 6, seed: int = 0) -> Tensor:
    return torch.randn(2, 4, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("name", ["mse", "cosine", "relation"])
@pytest.mark.parametrize("mask", [MASK, None])
def test_it_is_zero_where_both_are_equal_and_so_is_its_gradient(name: str, mask: Tensor | None) -> None:
    student, teacher = states().requires_grad_(), states()
    distance = getattr(distances, name)(student, teacher, mask)
    (gradient,) = torch.autograd.grad(distance, student)
    torch.testing.assert_close(distance.detach(), torch.zeros((), dtype=torch.float64), atol=1e-12, rtol=0)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-12, rtol=0)
    assert getattr(distances, name)(states(seed=1), teacher, mask) > 0.1


@pytest.mark.parametrize("name", ["mse", "cosine", "relation"])
def test_what_is_padded_does_not_count(name: str) -> None:
    student, teacher = states(), states(seed=1)
    before = getattr(distances, name)(student, teacher, MASK)
    for tensor in (student, teacher):
        tensor[MASK == 0] += 100
    torch.testing.assert_close(getattr(distances, name)(student, teacher, MASK), before, atol=1e-12, rtol=0)


def test_mse_is_in_units_of_the_teachers_variance() -> None:
    student, teacher = states(), states(seed=1)
    rows = [(b, t) for b in range(2) for t in range(4) if MASK[b, t]]
    errors = [float(((student[b, t] - teacher[b, t]) ** 2).sum()) for b, t in rows]
    numbers = torch.cat([teacher[b, t] for b, t in rows])
    wanted = sum(errors) / numbers.numel() / float(((numbers - numbers.mean()) ** 2).mean())
    assert math.isclose(float(distances.mse(student, teacher, MASK)), wanted, rel_tol=1e-12)
    assert math.isclose(float(distances.mse(student * 50, teacher * 50, MASK)), wanted, rel_tol=1e-12)


def test_cosine_does_not_see_the_length() -> None:
    teacher = states()
    assert abs(float(distances.cosine(3 * teacher, teacher, MASK))) < 1e-12
    assert math.isclose(float(distances.cosine(-teacher, teacher, MASK)), 2, rel_tol=1e-12)


def test_relations_are_of_tokens_and_need_no_equal_width() -> None:
    student, teacher = states(3), states(6, seed=1)
    total, count = 0.0, 0
    for b in range(2):
        real = [t for t in range(4) if MASK[b, t]]
        for t in real:
            p, q = (
                torch.softmax(torch.stack([s[b, t] @ s[b, o] / math.sqrt(s.shape[-1]) for o in real]), 0)
                for s in (teacher, student)
            )
            total += float((p * (p / q).log()).sum())
            count += 1
    assert math.isclose(float(distances.relation(student, teacher, MASK)), total / count, rel_tol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_divergence_of_scores(temperature: float) -> None:
    student, teacher = states()[:, 0, :3], states(seed=1)[:, 0, :3]
    p, q = (torch.softmax(scores / temperature, -1) for scores in (teacher, student))
    wanted = temperature**2 * (p * (p / q).log()).sum(-1).mean()
    torch.testing.assert_close(distances.divergence(student, teacher, temperature), wanted, atol=1e-12, rtol=0)
    assert abs(float(distances.divergence(teacher + 5, teacher, temperature))) < 1e-12  # a shift of all changes nothing
