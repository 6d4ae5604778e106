"""RMS norms by torch's own function, which is one operator on a GPU.

transformers' modules compute the same in six operators, and their backward pass takes thirteen.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from lit_spu.backbones.hooks import override_forward, position_wise


def install(model: nn.Module) -> None:
    """Let the RMS norms of a model use torch's function."""
    # `variance_epsilon` is the name in transformers' RMS norms
    found = [module for module in model.modules() if hasattr(module, "variance_epsilon")]
    is_rms_norm = {kind: _computes_rms_norm(module) for kind, module in {type(m): m for m in found}.items()}
    for module in found:
        if is_rms_norm[type(module)]:
            override_forward(module, partial(_rms_norm, module))


# `norm` is bound by `install`; `override_forward` passes `forward` and the call's arguments.
@position_wise
def _rms_norm(norm: Any, forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return x/√(mean(x²) + ε) times the weight. It is computed in fp32 at least, and rounded once."""
    if x.dtype != norm.weight.dtype:  # torch's function has a kernel for equal dtypes alone
        return forward(x)
    return F.rms_norm(x, norm.weight.shape, norm.weight, norm.variance_epsilon)


@torch.no_grad()
def _computes_rms_norm(norm: Any) -> bool:
    """Return whether a module's own forward equals torch's function, on a small input and with another weight."""
    if [name for name, _ in norm.named_parameters()] != ["weight"] or norm.weight.ndim != 1:
        return False
    if is_fake(norm.weight) or norm.weight.is_meta:  # the shapes alone matter
        return True
    norm = copy.deepcopy(norm).float()
    # in the weight's data type, whatever the default is: or else `_rms_norm` would run the module's own forward
    linspace = partial(torch.linspace, dtype=norm.weight.dtype, device=norm.weight.device)
    x = linspace(-1, 2, 2 * len(norm.weight)).view(2, -1)
    norm.weight.copy_(linspace(0.5, 2, len(norm.weight)))
    return torch.allclose(_rms_norm(norm, norm, x), norm(x), atol=1e-6)
