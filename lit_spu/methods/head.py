"""Probing: train the head on frozen hidden states."""

from __future__ import annotations

from typing import Any

from lit_spu.methods.frozen import FrozenBackbone


class HeadOnly(FrozenBackbone):
    """Freeze the backbone and train its head. A language-model head gets its own weights for the label words."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.backbone.untie_head()
