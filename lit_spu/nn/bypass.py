"""A block that the backward pass goes around, as though it were not there (DropBP, https://arxiv.org/abs/2402.17812)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from lit_spu.backbones.base import instead, tensor_of


def bypassed(block: nn.Module) -> AbstractContextManager[None]:
    """For a while a block puts out what it does, stores nothing, does not learn, and passes gradients on as they come.

    Exact where a block adds to its input and nothing else; where a norm follows, an approximation.
    """
    return instead(block, _around)


def _around(forward: Callable[..., Any], state: Tensor, *args: Any, **kwargs: Any) -> Any:
    with torch.no_grad():
        out = forward(state, *args, **kwargs)
    new = tensor_of(out)
    if torch.is_grad_enabled() and state.requires_grad:
        new = new + (state - state.detach())  # which is 0
    return (new, *out[1:]) if isinstance(out, tuple) else new
