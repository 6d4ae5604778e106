"""Distances between a student and its teacher, scalars: 0 if they are equal.

A distance of hidden states takes the student's states [batch, tokens, width], the teacher's (of the same width, except
for `relation`), and the mask [batch, tokens] of the real tokens (or None). `mse` and `cosine` are about 1 for unrelated
states.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def mse(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean squared error over the teacher's variance, because a T5's states grow from block to block."""
    variance = _mean((teacher - _mean(teacher.mean(-1), mask)).square().mean(-1), mask)
    return _mean((student - teacher).square().mean(-1), mask) / variance


def cosine(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """Return one minus the mean cosine similarity of the tokens."""
    return 1 - _mean(F.cosine_similarity(student, teacher, dim=-1), mask)


def relation(student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
    """Return the divergence between the relations of the tokens (MiniLM, eq. 5, https://arxiv.org/abs/2002.10957).

    A token's relation is the softmax of its state's scaled products with all tokens' states. The distance is
    KL(teacher ‖ student), a mean over the real tokens. The two widths may differ.
    """
    own, target = (_relations(states, mask) for states in (student, teacher))
    return _mean(F.kl_div(own, target, log_target=True, reduction="none").sum(-1), mask)


def _relations(states: Tensor, mask: Tensor | None) -> Tensor:
    """Return the log softmax of the scaled products of each token with every real token, [batch, tokens, tokens]."""
    products: Tensor = states @ states.mT * states.shape[-1] ** -0.5
    if mask is not None:
        products = products.masked_fill(mask.unsqueeze(1) == 0, torch.finfo(products.dtype).min)
    return products.log_softmax(-1)


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return the mean of values [batch, tokens] over the real tokens."""
    if mask is None:
        return values.mean()
    return (values * mask).sum() / mask.sum()


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """Return T²·KL(teacher ‖ student) of softened logits [batch, labels] (Hinton et al. 2015, arXiv 1503.02531)."""
    own, target = ((logits / temperature).log_softmax(-1) for logits in (student, teacher))
    return temperature**2 * F.kl_div(own, target, log_target=True, reduction="batchmean")
