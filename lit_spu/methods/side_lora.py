"""Side LoRA: LoRA's low-rank pairs on a stream beside the backbone, so that no gradient enters the backbone.

From the project's slides: the side borrows the frozen outputs of the backbone's linears, W x_b + b, adds B·A of its own
state to them, and runs attention, norms and non-linearities on the sum. What a linear would give back in the backward
pass is then a low-rank product as well, and never W.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from torch import Tensor
from torch.profiler import record_function

from lit_spu.backbones import Batch, Role
from lit_spu.errors import UserError
from lit_spu.methods.base import FrozenBackbone
from lit_spu.nn.adapter import adapter_dict
from lit_spu.nn.lora import LowRank
from lit_spu.nn.side_lora import SideStream


class SideLoRA(FrozenBackbone):
    """Train y_s = W x_b + b + (α/r)·B(A x_s) on a side state x_s beside the frozen backbone's x_b.

    Args:
        rank: r, the rank of B·A.
        alpha: α, which scales B·A by α/r.
        dropout: Share of the side's inputs that A does not see in training.
        roles: The linears that get a pair, by what they do in a block; the others put out W x_b + b.
        reentry: As many of the last blocks take the side state through their frozen weights, as LoRA does: more
            exact, for the time and memory of their backward pass. With all of them it is LoRA.
        gradient_checkpointing: Recompute in the backward pass what the side's norms and non-linearities put out,
            which costs a few per cent of a step. Off, a step takes up to a half more memory.

    Raises:
        UserError: if a number is out of range, or the backbone has no linear of a role.
    """

    def __init__(
        self,
        rank: int = 4,
        alpha: float = 8.0,
        dropout: float = 0.0,
        roles: Sequence[Role] = get_args(Role),
        reentry: int = 0,
        gradient_checkpointing: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        depth = self.backbone.streams[-1].depth
        if not 0 <= reentry <= depth:
            raise UserError(
                f"model.reentry={reentry}: the backbone's last stack has {depth} blocks; give 0 to {depth}."
            )
        pairs = [LowRank(target, rank, alpha, dropout) for target in self.backbone.target_linears(*roles)]
        self.pairs = adapter_dict(pairs)
        self.stream = SideStream(self.backbone.base_model, pairs, reentry, recompute=gradient_checkpointing)

    def forward(self, batch: Batch) -> Tensor:
        with record_function("backbone"), self.stream.beside():
            hidden = self.backbone.base_model.run_at(self.backbone.inputs(batch), self.backbone.position(batch))
        return self.backbone.head(self.backbone.read(hidden, batch))
