"""Learned scales ((IA)³, https://arxiv.org/abs/2205.05638): a vector of ones at the start, times what passes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lit_spu.backbones.base import Site
from lit_spu.nn.adapter import Adapter

SMALLEST = 1e-6


class Scale(Adapter):
    """Multiplies what a linear puts out, or what it reads, by a learned vector.

    Args:
        site: Where.
        inputs: Whether what it reads is scaled. Behind a non-linearity that is not the same as scaling what came
            before: a ReLU lets a negative scale through only here.
    """

    def __init__(self, site: Site, inputs: bool = False) -> None:
        super().__init__(site)
        self.inputs = inputs
        self.scale = nn.Parameter(torch.ones(site.weight.shape[1 if inputs else 0]))

    def attach(self) -> Scale:
        """Scale from now on."""
        if self.inputs:
            self.site.linear.register_forward_pre_hook(self._before)
        else:
            self.site.linear.register_forward_hook(self._behind)
        return self

    def _before(self, linear: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        return None if self.merged else (args[0] * self.scale.to(args[0].dtype),)

    def _behind(self, linear: nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor:
        if self.merged:
            return out
        part = self.site.outputs(out)
        scaled: Tensor = Multiply.apply(part, self.scale.to(out.dtype))  # type: ignore[no-untyped-call]
        return scaled if part is out else out

    def written(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.inputs:
            return weight * self.scale, bias
        return weight * self.scale.unsqueeze(1), None if bias is None else bias * self.scale


class Multiply(torch.autograd.Function):
    """out *= scale, of which the product alone is kept for the backward pass.

    Attention keeps the product of keys and values anyway, where autograd's own would keep `out` [..., outputs] as well.
    It is found again by division, for which a scale of zero counts as a millionth.
    """

    @staticmethod
    def forward(ctx: Any, out: Tensor, scale: Tensor) -> Tensor:
        scale = torch.where(scale.abs() < SMALLEST, SMALLEST, scale)
        out.mul_(scale)
        ctx.mark_dirty(out)
        ctx.save_for_backward(out, scale)
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (gradient,) = gradients
        product, scale = ctx.saved_tensors
        return gradient * scale, (gradient * product).flatten(0, -2).sum(0) / scale
