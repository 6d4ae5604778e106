"""Learned scales ((IA)³, https://arxiv.org/abs/2205.05638): a vector of ones at the start, times what passes."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lit_spu.backbones.base import TargetLinear
from lit_spu.nn.adapter import Adapter


class Scale(Adapter):
    """Multiplies what a linear puts out, or what it reads, by a learned vector.

    Args:
        target: Where.
        inputs: Whether what it reads is scaled. Behind a non-linearity that is not the same as scaling what came
            before: a ReLU lets a negative scale through only here.
    """

    def __init__(self, target: TargetLinear, inputs: bool = False) -> None:
        super().__init__(target)
        self.inputs = inputs
        self.scale = nn.Parameter(torch.ones(target.weight.shape[1 if inputs else 0]))

    def attach(self) -> Scale:
        """Scale from now on."""
        if self.inputs:
            self.target.linear.register_forward_pre_hook(self._before)
        else:
            self.target.linear.register_forward_hook(self._behind)
        return self

    def _before(self, linear: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        return None if self.merged else (args[0] * self.scale.to(args[0].dtype),)

    def _behind(self, linear: nn.Module, args: tuple[Tensor], out: Tensor) -> Tensor:
        if self.merged:
            return out
        scale = self.scale.to(out.dtype)
        if self.target.slots == 1:
            return out * scale
        whole = scale.new_ones(out.shape[-1])  # of a fused linear, the other parts pass as they are
        width = len(scale)
        return out * torch.cat([whole[: self.target.slot * width], scale, whole[(self.target.slot + 1) * width :]])

    def written(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.inputs:
            return weight * self.scale, bias
        return weight * self.scale.unsqueeze(1), None if bias is None else bias * self.scale
