"""Learning-rate schedules by step."""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def linear(optimizer: Optimizer, warmup: float, steps: int) -> LambdaLR:
    """Rise from 0 over the first `warmup` share of `steps`, then fall to 0 at the last."""
    rise = round(warmup * steps)

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / (rise + 1)
        return max(0.0, (steps - step) / max(1, steps - rise))

    return LambdaLR(optimizer, factor)
