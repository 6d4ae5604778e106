"""MeZO (https://arxiv.org/abs/2305.17333) over (IA)³ (https://arxiv.org/abs/2205.05638)."""

from __future__ import annotations

from typing import Any

from lit_spu.methods.ia3 import IA3
from lit_spu.methods.zeroth_order import ZerothOrder


class MeZOIA3(ZerothOrder, IA3):
    """Train the scaling vectors of (IA)³ by MeZO."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
