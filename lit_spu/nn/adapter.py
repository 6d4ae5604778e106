"""What is learned at single linears of a frozen model, and can be written into their weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lit_spu.backbones.base import TargetLinear
from lit_spu.errors import UserError


class Adapter(nn.Module, ABC):
    """Something small that learns at a target. It is put on by a hook, so that the model stays as it is."""

    def __init__(self, target: TargetLinear) -> None:
        super().__init__()
        self.target = target
        self.merged_from: tuple[Tensor, Tensor | None] | None = None

    @property
    def merged(self) -> bool:
        """Whether the linear's own weight holds it."""
        return self.merged_from is not None

    @abstractmethod
    def written(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The weight [outputs, inputs] and bias [outputs] with which the linear alone puts out the same."""

    def writable(self) -> None:
        """Raises UserError if the linear's weight cannot hold anything else."""
        if is_traceable_wrapper_subclass(self.target.linear.weight.data):
            raise UserError(f"{self.target.path} is held in int8, which cannot be changed: use fp32 or bf16.")

    @torch.no_grad()
    def merge(self) -> None:
        """Write it into the linear's weight: the same outputs at the cost of the plain model.

        Raises:
            UserError: if the weight is quantised.
        """
        self.writable()
        if not self.merged:
            weight, bias = self.target.weight, self.target.bias
            self.merged_from = weight.clone(), None if bias is None else bias.clone()
            for parameter in self.target.linear.parameters(recurse=False):
                parameter.data = parameter.data.clone()  # other methods may hold the same weights
            self._put(*self.written(weight, bias))

    @torch.no_grad()
    def unmerge(self) -> None:
        """Take it out again: the linear is what it was, to the bit."""
        if self.merged_from is not None:
            self._put(*self.merged_from)
            self.merged_from = None

    def _put(self, weight: Tensor, bias: Tensor | None) -> None:
        self.target.weight.copy_(weight)
        if bias is not None and self.target.bias is not None:
            self.target.bias.copy_(bias)


def adapter_dict(adapters: Iterable[Adapter]) -> nn.ModuleDict:
    """The adapters by the paths of their targets."""
    # a module's name has no dots in it
    return nn.ModuleDict({str(adapter.target).replace(".", "/"): adapter for adapter in adapters})
