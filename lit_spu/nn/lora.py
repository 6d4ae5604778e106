"""Low-rank adapters (LoRA, https://arxiv.org/abs/2106.09685): W is frozen, and a product B·A is trained."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from lit_spu.backbones.hooks import override_forward, position_wise
from lit_spu.backbones.precision import compute_dtype
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
        """Override the linear layer's forward. Forward hooks of the layer receive the sum, whenever they were set."""
        override_forward(self.target.linear, self._forward)
        return self

    @position_wise
    def _forward(self, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        if self.is_merged:
            return forward(x)
        if self.target.is_plain(forward):
            return self._add(x, None)
        output = forward(x)  # of a quantised layer, or of one that computes more than Wx + b
        # an output may be a view, or saved by its layer, unless another pair on a part of a fused layer has made it
        inner = getattr(getattr(forward, "func", None), "__self__", None)
        is_from_pair = isinstance(inner, LowRank) and not inner.is_merged
        return self._add(x, output if is_from_pair else output.clone())

    def add_to(self, output: Tensor, x: Tensor) -> Tensor:
        """Add s·B(A x) to a layer's `output` [..., outputs] in place, from its input x [..., inputs], and return it."""
        return self._add(x, output)

    def _add(self, x: Tensor, output: Tensor | None) -> Tensor:
        """Add s·B(A x) to an output, by default to the linear layer's own."""
        linear, dtype = self.target.linear, compute_dtype(x) if output is None else output.dtype
        weight = bias = None
        if output is None:
            weight = linear.weight.T if self.target.is_transposed else linear.weight
            weight, bias = weight.to(dtype), None if linear.bias is None else linear.bias.to(dtype)
        low_input = self.dropout(x).to(dtype) if self.training and self.dropout.p else None
        factors = self.a.to(dtype), self.b.to(dtype)
        columns = self.target.columns
        result: Tensor = AddLowRank.apply(x.to(dtype), low_input, *factors, output, weight, bias, columns, self.scale)  # type: ignore[no-untyped-call]
        return result

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
    """Compute Wx + b + s·B(A x) as one node of autograd's graph.

    With an `output`, it adds s·B(A x) to this tensor, in place if it is contiguous: Wx + b is known, or another module
    has computed it. The change is safe if this module does not save its output, as linear layers do not.

    Args:
        x: The input of the linear layer, [..., inputs].
        low_input: The input of A if it is not x, such as x after dropout.
        a: A, [rank, inputs].
        b: B, [outputs of the target, rank].
        output: [..., outputs] or None.
        weight: W, [outputs, inputs], if there is no `output`.
        bias: b, [outputs], or None.
        columns: The target's part of the outputs.
        scale: s.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        low_input: Tensor | None,
        a: Tensor,
        b: Tensor,
        output: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        columns: slice,
        scale: float,
    ) -> Tensor:
        flat = x.flatten(0, -2)
        if weight is not None:
            # written into the result's own memory: what a node returns must not be a view if it is to be changed
            output = x.new_empty(*x.shape[:-1], len(weight))
            rows = output.flatten(0, -2)
            torch.mm(flat, weight.T, out=rows) if bias is None else torch.addmm(bias, flat, weight.T, out=rows)
        else:
            assert output is not None
            if output.is_contiguous():
                ctx.mark_dirty(output)
            output = output.contiguous()
            rows = output.flatten(0, -2)
        low = torch.mm(flat if low_input is None else low_input.flatten(0, -2), a.T)
        rows[:, columns].addmm_(low, b.T, alpha=scale)
        needs_x, _, _, _, _, needs_weight, *_ = ctx.needs_input_grad
        saved_x = x if low_input is None or needs_weight else None
        ctx.save_for_backward(saved_x, low_input, low, a, b, weight if needs_x else None)
        ctx.columns, ctx.scale, ctx.input_shape = columns, scale, x.shape
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (grad_output,) = grads
        x, low_input, low, a, b, weight = ctx.saved_tensors
        needs_x, needs_low_input, needs_a, needs_b, needs_output, needs_weight, needs_bias, *_ = ctx.needs_input_grad
        grad = grad_output.flatten(0, -2)
        part = grad[:, ctx.columns]
        if torch.is_grad_enabled():  # for second derivatives, which pass through A x
            low = (x if low_input is None else low_input).flatten(0, -2) @ a.T
        grad_x = grad_low_input = grad_a = grad_b = None
        # Bᵀgᵀ: MKL is 3 to 10 times as fast with the few vectors of a thin matrix as contiguous rows
        grad_low = grad.new_empty(b.shape[1], len(grad)).addmm_(b.T, part.T, beta=0, alpha=ctx.scale)
        if needs_a:
            grad_a = grad_low @ (x if low_input is None else low_input).flatten(0, -2)
        if needs_b:
            grad_b = torch.empty_like(b).addmm_(part.T, low, beta=0, alpha=ctx.scale)
        if needs_low_input:
            grad_low_input = (grad_low.T @ a).view(ctx.input_shape)
        if needs_x and weight is not None:
            grad_x = grad @ weight
        if needs_x and low_input is None:
            grad_x = grad_low.T @ a if grad_x is None else grad_x.addmm_(grad_low.T, a)
        return (
            None if grad_x is None else grad_x.view(ctx.input_shape),
            grad_low_input,
            grad_a,
            grad_b,
            grad_output if needs_output else None,
            grad.T @ x.flatten(0, -2) if needs_weight else None,
            grad.sum(0) if needs_bias else None,
            None,
            None,
        )
