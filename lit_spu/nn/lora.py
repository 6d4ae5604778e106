"""Low-rank adapters (LoRA, https://arxiv.org/abs/2106.09685): W is frozen, and a product B·A is trained."""

from __future__ import annotations

import math
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_spu.backbones.hooks import position_wise
from lit_spu.backbones.target_linears import TargetLinear
from lit_spu.errors import UserError
from lit_spu.nn.adapter import Adapter


class LowRank(Adapter):
    """Adapter that computes y = Wx + s·B(A x). Initially A [rank, inputs] is random, and B [outputs, rank] is zero.

    Args:
        target: The linear layer.
        rank: r, the number of A's rows and of B's columns.
        alpha: α, in the scale s = α/r.
        dropout: Share of the inputs of A that is dropped in training.
        rank_stabilised: Use s = α/√r instead (https://arxiv.org/abs/2312.03732).

    Raises:
        UserError: If the rank is greater than the linear layer allows.
    """

    def __init__(
        self, target: TargetLinear, rank: int, alpha: float, dropout: float = 0.0, rank_stabilised: bool = False
    ) -> None:
        super().__init__(target)
        outputs, inputs = target.weight.shape
        if rank > min(outputs, inputs):
            raise UserError(f"model.rank={rank}: {target.path} allows 1 to {min(outputs, inputs)}.")
        self.a = nn.Parameter(torch.empty(rank, inputs))
        self.b = nn.Parameter(torch.zeros(outputs, rank))
        nn.init.kaiming_uniform_(self.a, a=math.sqrt(5))
        self.scale = alpha / (math.sqrt(rank) if rank_stabilised else rank)
        self.dropout = nn.Dropout(dropout)
        self.removed_factors: tuple[Tensor, Tensor] | None = None
        """The initial A and B that `init_from_svd` has subtracted from W."""

    def attach(self) -> Self:
        self.target.linear.register_forward_hook(self._add_to_output)
        return self

    @position_wise
    def _add_to_output(self, linear: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        return output if self.is_merged else self.add_to(output, args[0])

    def add_to(self, output: Tensor, x: Tensor) -> Tensor:
        """Add s·B(A x) to a layer's `output` [..., outputs] in place, from its input x [..., inputs], and return it."""
        low = F.linear(self.dropout(x), self.a.to(x.dtype))
        part = self.target.select_outputs(output)
        added: Tensor = AddLowRank.apply(part, low.to(output.dtype), self.b.to(output.dtype), self.scale)  # type: ignore[no-untyped-call]
        return added if part is output else output

    @property
    def product(self) -> Tensor:
        """The matrix s·BA, [outputs, inputs]."""
        return self.scale * self.b @ self.a

    def merged_weight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return weight + self.product.to(weight.dtype), bias

    @torch.no_grad()
    def init_from_svd(self) -> None:
        """Initialise s·BA with the top singular vectors of W, and subtract it from W.

        With W = UΣVᵀ, B = U_r·√(Σ_r/s), A = √(Σ_r/s)·V_rᵀ, and W becomes W − s·BA (SiVA).

        Raises:
            UserError: If the weight is quantised.
        """
        self.check_mergeable()
        weight, rank = self.target.weight, len(self.a)
        is_tall = weight.shape[0] > weight.shape[1]
        wide = (weight.T if is_tall else weight).to(self.a.dtype)
        # eigenvectors of the smaller Gram matrix: a quarter of the time of a full singular value decomposition
        squares, vectors = torch.linalg.eigh(wide @ wide.T)
        top = vectors[:, -rank:].flip(1)
        size = (squares[-rank:].flip(0).clamp_min(1e-12).sqrt() / self.scale).sqrt()  # √(Σ_r/s)
        left, right = top * size, (top / (size * self.scale)).T @ wide
        if is_tall:
            left, right = right.T, left.T
        self.a.copy_(right)
        self.b.copy_(left)
        weight.sub_(self.product)
        self.removed_factors = self.a.clone(), self.b.clone()


class AddLowRank(torch.autograd.Function):
    """Add s·low·Bᵀ to `output` [..., outputs] in place, where low = A x. It copies neither `output` nor its gradient.

    The change in place is safe: the linear layer that computed `output` does not save it. Autograd's own in-place sum
    would need a view of two dimensions, and copy the gradient for it.
    """

    @staticmethod
    def forward(ctx: Any, output: Tensor, low: Tensor, b: Tensor, scale: float) -> Tensor:
        output.flatten(0, -2).addmm_(low.flatten(0, -2), b.T, alpha=scale)
        ctx.mark_dirty(output)
        ctx.save_for_backward(low, b)
        ctx.scale = scale
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad_output,) = grads
        low, b = ctx.saved_tensors
        flat = grad_output.flatten(0, -2)
        # products with a thin matrix: MKL is 3 to 10 times as fast with its few vectors as contiguous rows
        grad_low = F.linear(flat, b.T.contiguous()).mul_(ctx.scale).view_as(low)
        grad_b = (low.flatten(0, -2).T @ flat).mul_(ctx.scale).T
        return grad_output, grad_low, grad_b, None
