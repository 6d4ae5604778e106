"""Adapters: small trained modules on single linear layers of a frozen model, which can be merged into its weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Self

import torch
from torch import Tensor, nn

from lit_spu.backbones.precision import is_quantized
from lit_spu.backbones.target_linears import TargetLinear
from lit_spu.errors import UserError


class Adapter(nn.Module, ABC):
    """Base class of adapters on one linear layer.

    Adapters are attached by hooks or forward overrides; the Hugging Face module tree is unchanged.
    """

    def __init__(self, target: TargetLinear) -> None:
        super().__init__()
        self.target = target
        self._unmerged: tuple[Tensor, Tensor | None] | None = None

    @property
    def is_merged(self) -> bool:
        """True if the linear layer's own weight contains the adapter."""
        return self._unmerged is not None

    @abstractmethod
    def attach(self) -> Self:
        """Attach the adapter to the linear layer, by a hook or a forward override, and return the adapter."""

    @abstractmethod
    def merged_weight(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Return the weight [outputs, inputs] and bias [outputs] of a linear layer that contains the adapter."""

    def check_mergeable(self) -> None:
        """Check that the linear layer's weight can be changed.

        Raises:
            UserError: If it is quantised.
        """
        if is_quantized(self.target.linear.weight):
            raise UserError(f"{self.target.path} is held in int8, which cannot be changed: use fp32 or bf16.")

    @torch.no_grad()
    def merge(self) -> None:
        """Add the adapter to the linear layer's weight: the same outputs at the cost of the layer alone.

        Raises:
            UserError: If the weight is quantised.
        """
        self.check_mergeable()
        if self.is_merged:
            return
        weight, bias = self.target.weight, self.target.bias
        self._unmerged = weight.clone(), None if bias is None else bias.clone()
        for parameter in self.target.linear.parameters(recurse=False):
            parameter.data = parameter.data.clone()  # another method may use the same tensor
        self._copy_to_target(*self.merged_weight(weight, bias))

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restore the linear layer's weight to the bit."""
        if self._unmerged is not None:
            self._copy_to_target(*self._unmerged)
            self._unmerged = None

    def _copy_to_target(self, weight: Tensor, bias: Tensor | None) -> None:
        self.target.weight.copy_(weight)
        if bias is not None and self.target.bias is not None:
            self.target.bias.copy_(bias)


def adapter_dict(adapters: Iterable[Adapter]) -> nn.ModuleDict:
    """Return adapters by the paths of their linear layers. Dots, which module names must not contain, become `/`."""
    return nn.ModuleDict({str(adapter.target).replace(".", "/"): adapter for adapter in adapters})
