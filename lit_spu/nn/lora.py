"""Low-rank adaptation (LoRA, https://arxiv.org/abs/2106.09685): W stays, and B·A is learned beside it."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_spu.backbones.base import TargetLinear
from lit_spu.errors import UserError
from lit_spu.nn.adapter import Adapter


class LowRank(Adapter):
    """y = Wx + s·B(A x) at a target, with A [rank, inputs] random and B [outputs, rank] zero at the start.

    Args:
        target: Where.
        rank: r, the number of A's rows and of B's columns.
        alpha: α, for a scale s of α/r.
        dropout: Share of the inputs that A does not see in training.
        rank_stabilised: s = α/√r instead (https://arxiv.org/abs/2312.03732).

    Raises:
        UserError: if the rank is more than the linear's own can be, or none.
    """

    def __init__(
        self, target: TargetLinear, rank: int, alpha: float, dropout: float = 0.0, rank_stabilised: bool = False
    ) -> None:
        super().__init__(target)
        outputs, inputs = target.weight.shape
        if not 1 <= rank <= min(outputs, inputs):
            raise UserError(f"model.rank={rank}: {target.path} allows 1 to {min(outputs, inputs)}.")
        self.a = nn.Parameter(torch.empty(rank, inputs))
        self.b = nn.Parameter(torch.zeros(outputs, rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        self.scale = alpha / (math.sqrt(rank) if rank_stabilised else rank)
        self.dropout = nn.Dropout(dropout)
        self.taken: tuple[Tensor, Tensor] | None = None  # the A and B that were taken from W

    def attach(self) -> LowRank:
        """Add it to what the linear puts out, from now on."""
        self.target.linear.register_forward_hook(self._hook)
        return self

    def _hook(self, linear: nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor:
        return out if self.merged else self.add_to(out, args[0])

    def add_to(self, out: Tensor, x: Tensor) -> Tensor:
        """Add s·B(A x) to `out` [..., the linear's outputs] in place, from `x` [..., inputs]; gives `out`."""
        low = F.linear(self.dropout(x), self.a.to(x.dtype))
        part = self.target.outputs(out)
        added: Tensor = AddLowRank.apply(part, low.to(out.dtype), self.b.to(out.dtype), self.scale)  # type: ignore[no-untyped-call]
        return added if part is out else out

    @property
    def product(self) -> Tensor:
        """s·BA, [outputs, inputs]."""
        return self.scale * self.b @ self.a

    def written(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.product.to(weight.dtype), bias

    @torch.no_grad()
    def take_top(self) -> None:
        """Start from the top singular vectors of W, and leave the rest of it frozen: the outputs stay the same.

        With W = UΣVᵀ: B = U_r·√(Σ_r/s), A = √(Σ_r/s)·V_rᵀ, and W becomes W − s·BA.

        Raises:
            UserError: if the weight is quantised.
        """
        self.writable()
        weight, rank = self.target.weight, len(self.a)
        tall = weight.shape[0] > weight.shape[1]
        wide = (weight.T if tall else weight).to(self.a.dtype)
        # the smaller Gram matrix's: a quarter of the time of the whole decomposition
        squares, vectors = torch.linalg.eigh(wide @ wide.T)
        top = vectors[:, -rank:].flip(1)
        size = (squares[-rank:].flip(0).clamp_min(1e-12).sqrt() / self.scale).sqrt()  # √(Σ_r/s)
        left, right = top * size, (top / (size * self.scale)).T @ wide
        if tall:
            left, right = right.T, left.T
        self.a.copy_(right)
        self.b.copy_(left)
        weight.sub_(self.product)
        self.taken = self.a.clone(), self.b.clone()


class AddLowRank(torch.autograd.Function):
    """out += s·low·Bᵀ: no copy of `out` [..., outputs] forward, none of its gradient backward.

    The linear that made `out` does not keep it. autograd's own in-place sum would go through a view of two dimensions,
    and copy the gradient for that.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, low: Tensor, b: Tensor, scale: float) -> Tensor:
        out.flatten(0, -2).addmm_(low.flatten(0, -2), b.T, alpha=scale)
        ctx.mark_dirty(out)
        ctx.save_for_backward(low, b)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = gradients
        low, b = ctx.saved_tensors
        flat = gradient.flatten(0, -2)
        # products of a few rows: with the few as rows, not columns, MKL takes a third to a tenth of the time
        of_low = F.linear(flat, b.T.contiguous()).mul_(ctx.scale).view_as(low)
        of_b = (low.flatten(0, -2).T @ flat).mul_(ctx.scale).T
        return gradient, of_low, of_b, None
