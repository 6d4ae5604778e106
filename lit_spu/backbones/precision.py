"""Number formats of frozen weights."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lit_spu.backbones.hooks import override_forward, position_wise
from lit_spu.errors import UserError

if TYPE_CHECKING:
    from lit_spu.backbones.stacks import TransformerStacks

Precision = Literal["fp32", "bf16", "int8"]


def at_least_fp32(x: Tensor) -> Tensor:
    """Return a tensor in fp32 if it is in half precision, or else itself."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def compute_dtype(x: Tensor) -> torch.dtype:
    """Return the data type in which a linear layer computes on x: its own, or that of autocast."""
    device = x.device.type
    is_autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    if x.dtype is torch.float64 or not is_autocast:  # autocast leaves fp64 alone
        return x.dtype
    return torch.get_autocast_dtype(device)


def is_quantized(weight: Tensor) -> bool:
    """Return whether a weight is held in int8."""
    return is_traceable_wrapper_subclass(weight)  # torchao's tensors have no test of their own


def compute_in_fp32(module: nn.Module) -> None:
    """Let a module compute in fp32 and return its result in the precision of its input."""
    override_forward(module, _in_fp32)


@position_wise
def _in_fp32(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return forward(x.float()).to(x.dtype)


def convert_to_bf16(stacks: TransformerStacks, head: Collection[nn.Module]) -> None:
    """Convert the weights of a base model to bf16, except those of the head, which computes in fp32."""
    in_head = {parameter for module in head for parameter in module.parameters()}
    for parameter in stacks.model.parameters():
        if parameter not in in_head:
            parameter.data = parameter.data.bfloat16()
    for module in stacks.model.modules():  # a BERT's base model itself calls the pooler, on states in bf16
        if module in head:
            compute_in_fp32(module)


def quantize_to_int8(stacks: TransformerStacks) -> None:
    """Quantise the weights of the blocks' linear layers to int8 (torchao).

    Raises:
        UserError: If torchao is missing, or the family's linear layers are of another class.
    """
    try:
        from torchao.quantization import Int8WeightOnlyConfig, quantize_
    except ImportError as error:
        raise UserError("model.backbone_precision=int8 needs torchao: pip install 'lit-spu[int8]'.") from error
    linears = {target.linear for target in stacks.all_target_linears}
    if any(not isinstance(linear, nn.Linear) for linear in linears):
        raise UserError(
            f"model.backbone_precision=int8: torchao quantises nn.Linear only, and the blocks of a"
            f" {stacks.model.config.model_type} have none. Use bf16."
        )
    quantize_(stacks.model, Int8WeightOnlyConfig(), filter_fn=lambda module, _: module in linears)
