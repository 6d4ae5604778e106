"""AdamW in one kernel per step."""

from __future__ import annotations

from typing import Any

from torch.optim import AdamW


def fused_adamw(params: Any, lr: float, **settings: Any) -> AdamW:
    """Return torch's fused AdamW, whose gradients the Trainer can clip in every precision.

    torch's own would divide the gradients by the loss scale within its step. Lightning therefore refuses to clip them,
    even in bf16-mixed, which has no scale. Here the Trainer divides them before the step, as for any other optimizer.
    """
    optimizer: Any = AdamW(params, lr=lr, fused=True, **settings)
    optimizer._step_supports_amp_scaling = False
    return optimizer  # type: ignore[no-any-return]
