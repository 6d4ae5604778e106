"""Side LoRA: LoRA's low-rank pairs on a side state beside the backbone's, so that no gradient enters the backbone.

From the project's slides: the side state x_s reuses the frozen outputs W x_b + b of the backbone's linear layers, and
adds B·A x_s to them. Attention, norms and non-linearities run on the sum. The gradient with respect to x_s is then a
low-rank product as well, and does not contain W.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, get_args

from torch import Tensor
from torch.profiler import record_function

from lit_spu.backbones import Batch, Role
from lit_spu.methods.frozen import FrozenBackbone
from lit_spu.nn.adapter import adapter_dict
from lit_spu.nn.lora import LowRank
from lit_spu.nn.side_lora import SideStream
from lit_spu.ranges import Count, CountOrZero, Length, Positive, ShareBelowOne


class SideLoRA(FrozenBackbone):
    """Train y_s = W x_b + b + (α/r)·B(A x_s) on a side state x_s beside the frozen backbone's x_b.

    Args:
        rank: r, the rank of B·A.
        alpha: α, which scales B·A by α/r.
        dropout: Share of the inputs of A that is dropped in training.
        roles: Roles of the linear layers that get a low-rank pair (A, B); the others output W x_b + b.
        reentry: Number of the last blocks that run the side state through their frozen weights, as LoRA does. This is
            more exact, and costs the time and memory of their backward pass. With all blocks it is LoRA.
        gradient_checkpointing: Recompute the outputs of the side's norms and non-linearities in the backward pass.
            This costs a few per cent of a step. Without it, a step takes up to 50 % more memory.

    Raises:
        UserError: If a number is out of range, or the backbone has no linear layer of a role.
    """

    def __init__(
        self,
        rank: Count = 4,
        alpha: Positive = 8.0,
        dropout: ShareBelowOne = 0.0,
        roles: Annotated[Sequence[Role], Length(1)] = get_args(Role),
        reentry: CountOrZero = 0,
        gradient_checkpointing: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.backbone.last_blocks(reentry, "model.reentry", smallest=0)  # check the number of blocks
        pairs = [LowRank(target, rank, alpha, dropout) for target in self.backbone.target_linears(*roles)]
        self.pairs = adapter_dict(pairs)
        self.side = SideStream(self.backbone.base_model, pairs, reentry, recompute=gradient_checkpointing)

    def forward(self, batch: Batch) -> Tensor:
        inputs, position = self.backbone.model_inputs(batch), self.backbone.answer_position(batch)
        with record_function("backbone"), self.side.activate():
            hidden = self.backbone.base_model.forward_at(inputs, position)
        return self.backbone.apply_head(self.backbone.select_answer_state(hidden, batch))
