"""Target linears: the linear layers of a block, selected by role."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from lit_spu.backbones.hooks import is_class_forward
from lit_spu.backbones.precision import is_quantized

Role = Literal["query", "key", "value", "output", "up", "down"]
"""Role of a linear layer: computes queries, keys or values, joins the heads, or widens or narrows a state."""


class TargetLinear(NamedTuple):
    """A linear layer of a block, or one part of a fused layer.

    A fused layer computes `num_parts` equal parts side by side (GPT-2: queries, keys and values). Adapters are attached
    by hooks or forward overrides; the Hugging Face module tree is unchanged.
    """

    path: str  # in the base model
    linear: Any  # nn.Linear, or transformers' Conv1D, which holds its weight transposed
    role: Role
    part: int = 0
    num_parts: int = 1

    @property
    def is_transposed(self) -> bool:
        """True if the layer holds its weight as [inputs, outputs]."""
        return not isinstance(self.linear, nn.Linear)

    @property
    def weight(self) -> Tensor:
        """The weight of this part, a view [outputs, inputs]."""
        return self.select_rows(self.linear.weight)

    @property
    def bias(self) -> Tensor | None:
        """The bias of this part, a view [outputs]."""
        return None if self.linear.bias is None else self.linear.bias.chunk(self.num_parts)[self.part]

    def select_rows(self, weight: Tensor) -> Tensor:
        """Return this part, a view [outputs, inputs], of a tensor with the layout of the whole layer's weight."""
        weight = weight.T if self.is_transposed else weight
        return weight if self.num_parts == 1 else weight.chunk(self.num_parts)[self.part]

    @property
    def columns(self) -> slice:
        """The outputs of this part among those of the whole layer."""
        width = self.linear.weight.shape[1 if self.is_transposed else 0] // self.num_parts
        return slice(self.part * width, (self.part + 1) * width)

    def select_outputs(self, output: Tensor) -> Tensor:
        """Return this part, a view [..., outputs], of the whole layer's output [..., outputs * num_parts]."""
        return output[..., self.columns]

    def is_plain(self, forward: Callable[..., Any]) -> bool:
        """Return whether an inner forward of the layer computes Wx + b from plain tensors."""
        is_product = type(self.linear).forward in (nn.Linear.forward, Conv1D.forward)
        return is_product and is_class_forward(forward) and not is_quantized(self.linear.weight)

    def __str__(self) -> str:
        return self.path if self.num_parts == 1 else f"{self.path}.{self.role}"


def parse_pattern(pattern: str) -> tuple[str, int, int]:
    """Split a pattern such as `c_attn:1/3` into a module name, a part and the number of parts."""
    name, _, fraction = pattern.partition(":")
    part, _, num_parts = fraction.partition("/")
    return name, int(part or 0), int(num_parts or 1)
