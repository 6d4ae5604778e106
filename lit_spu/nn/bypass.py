"""Blocks that the backward pass bypasses (DropBP, https://arxiv.org/abs/2402.17812)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lit_spu.backbones.hooks import override_forward
from lit_spu.backbones.stacks import tensor_of


@contextmanager
def bypass_backward(block: nn.Module) -> Iterator[None]:
    """Context manager in which a block saves no activations, and its input's gradient is its output's.

    For a block x + f(x), this omits the gradient through f. If a norm follows in the block, the gradient of the norm is
    omitted as well.
    """
    restore = override_forward(block, _forward_without_graph)
    try:
        yield
    finally:
        restore()


def _forward_without_graph(forward: Callable[..., Any], state: Tensor, *args: Any, **kwargs: Any) -> Any:
    with torch.no_grad():
        output = forward(state, *args, **kwargs)
    new = tensor_of(output)
    if torch.is_grad_enabled() and state.requires_grad:
        new = new + (state - state.detach())  # adds 0, which carries the gradient to the input
    return (new, *output[1:]) if isinstance(output, tuple) else new
