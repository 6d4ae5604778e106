"""MeZO (Malladi et al. 2023, https://arxiv.org/abs/2305.17333): train every weight by forward passes alone."""

from __future__ import annotations

from typing import Any

from lit_spu.methods.full import FullFineTuning
from lit_spu.methods.zeroth_order import ZerothOrder


class MeZO(ZerothOrder, FullFineTuning):
    """Train every weight by MeZO."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
