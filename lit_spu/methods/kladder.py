"""k-ladder LST: ladder side-tuning with rungs that read a window of blocks instead of one.

Rung i reads the blocks i−k … i+k. With k = 0 and the `gated` fusion it is LST. From the project's slides and the k-LST
report.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal

from lit_spu.errors import UserError
from lit_spu.methods.ladder import LadderSideTuning
from lit_spu.nn import fusion as fusions
from lit_spu.nn.ladder import Ladder
from lit_spu.ranges import CountOrZero, ShareBelowOne


class KLadder(LadderSideTuning):
    """Ladder side-tuning with windows of 2k+1 blocks.

    Args:
        k: Radius of the windows; 0 reads one block, as LST does.
        fusion: Function that joins a window with the side state: LST's gate on the window's mean under learned weights;
            a plain sum; a gate computed for each example; attention of each token over its own 2k+1 hidden states; or
            attention over all tokens of these.
        hidden_state_dropout: Probability of dropping a whole hidden state of a window in training, drawn for each
            example.
        share_projections: One down-projection per block for all windows, instead of one per block and rung.
    """

    def __init__(
        self,
        k: CountOrZero = 1,
        fusion: Literal["gated", "additive", "dynamic", "attention", "cross_attention"] = "gated",
        hidden_state_dropout: ShareBelowOne = 0.0,
        share_projections: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        depth = max(stack.depth for stack in self.backbone.stacks)
        if k >= depth:
            raise UserError(
                f"model.k={k}: the backbone has {depth} blocks. Use 0 to {depth - 1}, whose windows hold all blocks."
            )
        fusion_class = getattr(fusions, fusion.title().replace("_", ""))
        make_ladder = partial(
            Ladder, fusion=fusion_class, radius=k, shared=share_projections, dropout=hidden_state_dropout
        )
        self.side.set_ladders(make_ladder)
