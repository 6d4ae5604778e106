"""Full fine-tuning, the reference of all comparisons."""

from __future__ import annotations

from typing import Any

from lit_spu.methods.base import Method


class FullFineTuning(Method):
    """Train every weight of the backbone and its head."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
