"""Train the last blocks and the head. No gradient passes below them: a strong and cheap baseline."""

from __future__ import annotations

from typing import Any

from lit_spu.methods.frozen import CachedBackbone
from lit_spu.ranges import Count


class LastLayers(CachedBackbone):
    """Freeze the backbone except for its last blocks, and train these and a classification head.

    Args:
        layers: Number of trained blocks at the end (of an encoder-decoder, the decoder's).
    """

    def __init__(self, layers: Count = 2, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.backbone.freeze()
        for block in self.backbone.last_blocks(layers, "model.layers"):
            block.requires_grad_(True)
