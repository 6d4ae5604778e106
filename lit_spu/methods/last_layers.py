"""Train the last blocks and the head. No gradient passes below them: a strong and cheap baseline."""

from __future__ import annotations

from typing import Any

from lit_spu.errors import UserError
from lit_spu.methods.base import Method
from lit_spu.ranges import Count


class LastLayers(Method):
    """Freeze the backbone except for its last blocks, and train these and a classification head.

    Args:
        layers: Number of trained blocks at the end (of an encoder-decoder, the decoder's).
    """

    def __init__(self, layers: Count = 2, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        depth = self.backbone.stacks[-1].depth
        if layers > depth:
            raise UserError(f"model.layers={layers}: the backbone's last stack has {depth} blocks; use 1 to {depth}.")
        self.backbone.freeze()
        for block in self.backbone.blocks[-layers:]:
            block.requires_grad_(True)
