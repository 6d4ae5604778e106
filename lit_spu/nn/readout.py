"""Linear read-outs: one linear layer on the hidden states of several blocks.

As in Head2Toe (Evci et al. 2022, https://arxiv.org/abs/2201.03529), without its selection of features.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_spu.backbones.stacks import HiddenStates
from lit_spu.errors import UserError
from lit_spu.ranges import CountOrZero, Length

Blocks = Literal["last", "upper", "all"] | Annotated[Sequence[CountOrZero], Length(1)]
"""Blocks that a read-out reads: the last one, the upper half, all, or a list of numbers; 0 is the lowest."""

Tokens = Literal["answer", "mean", "both"]
"""Tokens that a read-out reads of each block: the answer's position, the mean over all tokens, or both."""

PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5)
"""Strengths of the L2 penalty that a fit tries, the strongest first."""

_HELD_OUT = 5  # a fit chooses its penalty on every fifth example


def select_blocks(blocks: Blocks, depth: int) -> list[int]:
    """Return the numbers of the blocks, in order, in a stack of `depth` blocks.

    Raises:
        UserError: If there is no such block.
    """
    if not isinstance(blocks, str):
        if max(blocks) >= depth:
            raise UserError(f"model.blocks={list(blocks)}: the backbone's last stack has the blocks 0 to {depth - 1}.")
        return sorted(blocks)
    first = {"last": depth - 1, "upper": depth // 2, "all": 0}[blocks]
    return list(range(first, depth))


class ReadOut(nn.Module):
    """A linear layer on hidden states of several blocks, each normalised without parameters. Its logits start at zero.

    Args:
        blocks: Numbers of the blocks.
        width: Width of the hidden states.
        num_logits: Number of logits.
        tokens: Tokens that it reads of each block.
        dropout: Share of the features that is dropped in training.
    """

    def __init__(
        self, blocks: Sequence[int], width: int, num_logits: int, tokens: Tokens, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.blocks, self.width, self.tokens = tuple(blocks), width, tokens
        self.dropout = nn.Dropout(dropout)
        self.linear = nn.Linear(len(blocks) * (1 + (tokens == "both")) * width, num_logits)
        for parameter in self.linear.parameters():
            nn.init.zeros_(parameter)

    def features(self, states: HiddenStates, position: Tensor) -> Tensor:
        """Return what the linear layer reads, [batch, features], at least fp32.

        Args:
            states: Hidden states of the stack.
            position: The answer's position [batch].
        """
        first, selected = states.blocks[self.blocks[0]], []
        rows = torch.arange(len(first), device=first.device)
        dtype = torch.promote_types(first.dtype, torch.float32)
        mask = first.new_ones(first.shape[:2]) if states.mask is None else states.mask
        shares = (mask.to(dtype) / mask.sum(1, keepdim=True)).unsqueeze(1)  # [batch, 1, tokens]
        with torch.autocast(first.device.type, enabled=False):
            for state in (states.blocks[i] for i in self.blocks):
                if self.tokens != "mean":
                    selected.append(state[rows, position].to(dtype))
                if self.tokens != "answer":
                    selected.append((shares @ state.to(dtype)).squeeze(1))
            return F.layer_norm(torch.stack(selected, 1), (self.width,)).flatten(1)

    def forward(self, features: Tensor) -> Tensor:
        """Return the logits [batch, labels] from `features`."""
        logits: Tensor = self.linear(self.dropout(features).to(self.linear.weight.dtype))
        return logits

    def fit(
        self,
        features: Tensor,
        labels: Tensor,
        loss: Callable[[Tensor, Tensor], Tensor],
        score: Callable[[Tensor, Tensor], float],
    ) -> float:
        """Set the linear layer to the minimum of the loss with an L2 penalty, by L-BFGS.

        The penalty is the one with the best score on a fifth of the examples, after a fit to the others. Then all are
        fitted.

        Args:
            features: Features of all training examples, [examples, features].
            labels: Their labels [examples].
            loss: Mean loss of logits [examples, labels] and labels.
            score: A number that is greater for better logits.

        Returns:
            The penalty.
        """
        held_out = torch.arange(len(labels), device=labels.device) % _HELD_OUT == 0
        fitted, tested = (features[~held_out], labels[~held_out]), (features[held_out], labels[held_out])
        num_logits, scores, start = self.linear.out_features, {}, None
        with torch.no_grad(), torch.autocast(features.device.type, enabled=False):
            for penalty in PENALTIES:  # each fit starts at the one before
                start = fit_linear(*fitted, num_logits, loss, penalty, start)
                scores[penalty] = score(F.linear(tested[0], *start), tested[1])
            best = max(PENALTIES, key=scores.__getitem__)  # of equal ones the strongest
            weight, bias = fit_linear(features, labels, num_logits, loss, best)
            self.linear.weight.copy_(weight)
            self.linear.bias.copy_(bias)
        return best


def fit_linear(
    features: Tensor,
    labels: Tensor,
    num_logits: int,
    loss: Callable[[Tensor, Tensor], Tensor],
    penalty: float,
    start: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the weight and bias that minimise the mean loss + penalty · |weight|² / 2, by L-BFGS.

    The penalty refers to features that are centred and of mean squared length 1. So a strength means the same for any
    number of blocks and any width. Cross-entropy gives logistic regression, the squared error ridge regression.

    Args:
        features: [examples, features].
        labels: [examples].
        num_logits: Number of logits.
        loss: Mean loss of logits [examples, labels] and labels.
        penalty: Strength of the L2 penalty.
        start: Weight and bias to start at; zero by default.
    """
    mean = features.mean(0)
    scale = (features - mean).square().sum(1).mean().sqrt().clamp_min(1e-12)
    x = (features - mean) / scale
    weight, bias = start or (x.new_zeros(num_logits, x.shape[1]), x.new_zeros(num_logits))
    bias = (bias + weight @ mean).requires_grad_()
    weight = (weight * scale).requires_grad_()
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(F.linear(x, weight, bias), labels) + penalty / 2 * weight.square().sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimizer.step(closure)
    weight = weight.detach() / scale
    return weight, bias.detach() - weight @ mean
