"""Assumed values for fake tensors, so that code which reads values runs on shapes alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.overrides import TorchFunctionMode


class AssumedValues(TorchFunctionMode):
    """Context manager in which operations that need the values of a fake tensor assume some.

    Values are assumed to be 0. The size of a result that depends on values is the one that takes the most memory: a
    batch reads a different embedding row for every token.

    Args:
        num_tokens: Number of tokens in the batch, of all texts together.
    """

    def __init__(self, num_tokens: int) -> None:
        super().__init__()
        self.num_tokens = num_tokens
        self._assumptions: dict[Any, Callable[..., Any]] = {
            Tensor.numpy: _zeros,
            Tensor.item: lambda tensor: _zeros(tensor).item(),  # also of each element in tolist
            Tensor.unique_consecutive: _one_run,
            Tensor.nonzero: self._one_index_per_token,
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in self._assumptions and isinstance(args[0], FakeTensor):
            return self._assumptions[func](*args, **kwargs)
        return func(*args, **kwargs)

    def _one_index_per_token(self, tensor: Tensor) -> Tensor:
        """Return the result of `nonzero` [indices, dimensions] where every token of the batch has its own element."""
        return tensor.new_empty(min(tensor.numel(), self.num_tokens), tensor.dim(), dtype=torch.long)


def _zeros(tensor: Tensor) -> npt.NDArray[Any]:
    """Return an array of zeros in the shape and dtype of a tensor."""
    return np.zeros(tuple(tensor.shape), str(tensor.dtype).removeprefix("torch."))


def _one_run(tensor: Tensor, *, return_counts: bool, **_: Any) -> Any:
    """Return the result of `unique_consecutive` where all elements are equal.

    Code that makes one pass per run then makes a single pass. Further passes would reuse its memory.
    """
    return (tensor[:1], torch.ones_like(tensor[:1])) if return_counts else tensor[:1]
