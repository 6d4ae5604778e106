"""MeZO (https://arxiv.org/abs/2305.17333) over BitFit (https://arxiv.org/abs/2106.10199)."""

from __future__ import annotations

from typing import Any

from lit_spu.methods.bitfit import BitFit
from lit_spu.methods.zeroth_order import ZerothOrder


class MeZOBitFit(ZerothOrder, BitFit):
    """Train the biases of the backbone by MeZO."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
