"""Learned scales ((IA)³, https://arxiv.org/abs/2205.05638): vectors, initially ones, that multiply hidden states."""

from __future__ import annotations

from typing import Self

import torch
from torch import Tensor, nn

from lit_spu.backbones.hooks import position_wise
from lit_spu.backbones.target_linears import TargetLinear
from lit_spu.errors import UserError
from lit_spu.nn.adapter import Adapter


class Scale(Adapter):
    """Adapter that scales the outputs or the inputs of a linear layer by a learned vector.

    Args:
        target: The linear layer.
        inputs: Scale the layer's inputs instead of its outputs.

    Raises:
        UserError: If the inputs are those of a part of a fused layer, whose parts all read the same.
    """

    def __init__(self, target: TargetLinear, inputs: bool = False) -> None:
        super().__init__(target)
        if inputs and target.num_parts > 1:
            raise UserError(
                f"model.inputs: {target} is a part of a fused layer, and all of its parts have the same input. Put the"
                f" role {target.role} into --model.outputs."
            )
        self.inputs = inputs
        self.scale = nn.Parameter(torch.ones(target.weight.shape[1 if inputs else 0]))

    def attach(self) -> Self:
        if self.inputs:
            self.target.linear.register_forward_pre_hook(self._scale_input)
        else:
            self.target.linear.register_forward_hook(self._scale_output)
        return self

    @position_wise
    def _scale_input(self, linear: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
        return None if self.is_merged else (args[0] * self.scale.to(args[0].dtype),)

    @position_wise
    def _scale_output(self, linear: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        if self.is_merged:
            return output
        scale = self.scale.to(output.dtype)
        if self.target.num_parts == 1:
            return output * scale
        ones, width, part = scale.new_ones(output.shape[-1]), len(scale), self.target.part
        return output * torch.cat([ones[: part * width], scale, ones[(part + 1) * width :]])

    def merged_weight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        if self.inputs:
            return weight * self.scale, bias
        return weight * self.scale.unsqueeze(1), None if bias is None else bias * self.scale
