"""How far a student's states are from a teacher's: 0 where they are equal, and for all about 1 where nothing is alike.

Each takes the student's states [batch, tokens, width], the teacher's, which may be wider for `relation` alone, and the
mask [batch, tokens] of the tokens that are real (or None), and gives a scalar.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def mse(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """The squared error over the teacher's variance: the states of a T5 grow a hundredfold from block to block."""
    variance = _mean((teacher - _mean(teacher.mean(-1), mask)).square().mean(-1), mask)
    return _mean((student - teacher).square().mean(-1), mask) / variance


def cosine(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """One minus the mean cosine of the tokens."""
    return 1 - _mean(F.cosine_similarity(student, teacher, dim=-1), mask)


def relation(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """The divergence of how the tokens attend to each other by their states (MiniLM, eq. 5; arXiv 2002.10957).

    Of the students' own relation to the teacher's, Kullback-Leibler, as a mean over the real tokens; the widths of both
    may differ.
    """
    ours, theirs = (_relations(states, mask) for states in (student, teacher))
    return _mean(F.kl_div(ours, theirs, log_target=True, reduction="none").sum(-1), mask)


def _relations(states: Tensor, mask: Tensor | None) -> Tensor:
    """Log softmax of the scaled products of each token's state with every real token's, [batch, tokens, tokens]."""
    scores: Tensor = states @ states.mT * states.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(mask.unsqueeze(1) == 0, torch.finfo(scores.dtype).min)
    return scores.log_softmax(-1)


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """The mean of a number for each token [batch, tokens] over the real ones."""
    if mask is None:
        return values.mean()
    return (values * mask).sum() / mask.sum()


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T²·KL(teacher ‖ student) of softened scores [batch, labels] (Hinton et al. 2015, arXiv 1503.02531)."""
    ours, theirs = ((scores / temperature).log_softmax(-1) for scores in (student, teacher))
    return temperature**2 * F.kl_div(ours, theirs, log_target=True, reduction="batchmean")
