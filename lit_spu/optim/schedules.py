"""Learning-rate schedules by step."""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def linear(optimizer: Optimizer, warmup: float, steps: int) -> LambdaLR:
    """Return a schedule with linear warm-up and linear decay to 0.

    Args:
        optimizer: Optimizer with the peak learning rates.
        warmup: Share of the steps that warm up.
        steps: Number of all steps; at this step the learning rate is 0.
    """
    warmup_steps = round(warmup * steps)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        return max(0.0, (steps - step) / max(1, steps - warmup_steps))

    return LambdaLR(optimizer, factor)
