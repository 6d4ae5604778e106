"""Probing: train the head on frozen features. What the backbone knows already."""

from __future__ import annotations

from typing import Any

from lit_spu.methods.base import FrozenBackbone


class HeadOnly(FrozenBackbone):
    """Freeze the backbone and train its head; a language-model head learns its label words' rows."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.backbone.untie_head()
