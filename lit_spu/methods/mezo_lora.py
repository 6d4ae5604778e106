"""MeZO (https://arxiv.org/abs/2305.17333, section 3) over LoRA (https://arxiv.org/abs/2106.09685)."""

from __future__ import annotations

from typing import Any

from lit_spu.methods.lora import LoRA
from lit_spu.methods.zeroth_order import ZerothOrder


class MeZOLoRA(ZerothOrder, LoRA):
    """Train the low-rank pairs of LoRA by MeZO."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
