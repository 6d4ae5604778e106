"""Policies of `SelectiveUpdate`: each decides how much of a training step is run.

A decision before the forward pass can skip the whole step. A decision after it saves only the backward pass, and no
peak memory. Every public class in this module is registered as a policy.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from lit_spu.errors import UserError
from lit_spu.methods.teacher import Teacher
from lit_spu.nn import distances
from lit_spu.optim.keyed_random import key_of
from lit_spu.ranges import Checked, Count, Seed, ShareBelowOne, Text
from lit_spu.tasks import Task

Batch = dict[str, Tensor]


class Policy(Checked):
    """Base class of policies. Without overrides every step is a full step: all weights are updated."""

    def setup(self, module: Any, data: Any, device: torch.device) -> None:
        """Prepare for training `module` on the data module `data` on `device`.

        Raises:
            UserError: if the policy does not work with them.
        """

    def before_forward(self, step: int, batch: Batch) -> bool:
        """Return whether this is a full step. Called before the forward pass; `step` counts the batches of the run."""
        return True

    def bypassed_blocks(self, step: int, num_blocks: int) -> frozenset[int]:
        """Return the numbers of the blocks that the backward pass bypasses; 0 is the lowest of `num_blocks`."""
        return frozenset()

    def after_forward(self, logits: Tensor, batch: Batch) -> bool:
        """Return whether to run the backward pass. Called after the forward pass with the logits [batch, labels]."""
        return True

    def after_step(self, grad_norm: float, batch: Batch) -> None:
        """Receive the gradient norm of a step with a backward pass."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state that a resumed run needs."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the state that `state_dict` returned."""


class Always(Policy):
    """Policy with only full steps: plain training, bit for bit."""


class Never(Policy):
    """Policy without full steps."""

    def before_forward(self, step: int, batch: Batch) -> bool:
        return False


class _WithRate(Policy):
    """Base class of policies that skip a given share of the steps, or of the blocks in each step."""

    def __init__(self, rate: ShareBelowOne = 0.5) -> None:
        self.rate = rate


class _ByChance(_WithRate):
    """Base class of policies that skip at random, depending only on the seed and on numbers such as the step."""

    def __init__(self, rate: ShareBelowOne = 0.5, seed: Seed = 0) -> None:
        super().__init__(rate)
        self.seed = seed

    def is_skipped(self, *numbers: int) -> bool:
        """Return whether to skip the step, or the block of a step, that these numbers identify."""
        return key_of(self.seed, *numbers) / 2**63 < self.rate


class Random(_ByChance):
    """Policy that skips steps at random: the control for every other policy at the same rate.

    Args:
        rate: Share of the steps that are not full steps.
        seed: Random seed; a decision depends on it and on the number of the step alone.
    """

    def before_forward(self, step: int, batch: Batch) -> bool:
        return not self.is_skipped(step)


class LayerCyclic(Policy):
    """Policy that trains a few blocks in each step, in turn from the bottom up (LCSB, https://arxiv.org/abs/2602.13073).

    Args:
        blocks: Number of blocks that train in a step.
    """

    def __init__(self, blocks: Count = 2) -> None:
        self.blocks = blocks

    def bypassed_blocks(self, step: int, num_blocks: int) -> frozenset[int]:
        trained = {(step * self.blocks + number) % num_blocks for number in range(min(self.blocks, num_blocks))}
        return frozenset(range(num_blocks)) - trained


class DropBackward(_ByChance):
    """Policy that bypasses random blocks in each backward pass (DropBP, https://arxiv.org/abs/2402.17812).

    Args:
        rate: Share of the blocks that are bypassed.
        seed: Random seed; a decision depends on it and on the numbers of the step and the block alone.
    """

    def bypassed_blocks(self, step: int, num_blocks: int) -> frozenset[int]:
        return frozenset(number for number in range(num_blocks) if self.is_skipped(step, number))


class _SkipLowest(_WithRate):
    """Base class of policies that skip steps whose value is below the quantile `rate` of the last `window` values."""

    def __init__(self, rate: ShareBelowOne = 0.5, window: Count = 100) -> None:
        super().__init__(rate)
        self.recent: deque[float] = deque(maxlen=window)

    def is_low(self, value: float) -> bool:
        """Return whether a value is below the quantile of the recent values, and add it to them."""
        low = bool(self.recent) and value < float(torch.tensor([*self.recent], dtype=torch.float64).quantile(self.rate))
        self.recent.append(value)
        return low

    def state_dict(self) -> dict[str, Any]:
        return {"recent": [*self.recent]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.recent.extend(state["recent"])


class _SkipLowAverages(_SkipLowest):
    """Base class of policies that skip a batch if the moving averages of its examples have a low mean.

    A batch with an example that has no average yet is a full step, so the first epoch consists of full steps.
    """

    def __init__(self, rate: ShareBelowOne = 0.5, window: Count = 100, decay: ShareBelowOne = 0.5) -> None:
        super().__init__(rate, window)
        self.decay = decay
        self.averages: dict[int, float] = {}  # by the number of the example

    def before_forward(self, step: int, batch: Batch) -> bool:
        averages = [self.averages.get(number) for number in batch["index"].tolist()]
        known = [average for average in averages if average is not None]
        return len(known) < len(averages) or not self.is_low(sum(known) / len(known))

    def update_averages(self, batch: Batch, values: list[float]) -> None:
        """Update the moving average of each example in the batch with its new value."""
        for number, value in zip(batch["index"].tolist(), values, strict=True):
            average = self.averages.get(number, value)
            self.averages[number] = self.decay * average + (1 - self.decay) * value

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"averages": dict(self.averages)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.averages = dict(state["averages"])


class LossEMA(_SkipLowAverages):
    """Policy that skips batches whose examples have a low average loss (https://arxiv.org/abs/1910.00762).

    Each example has its own moving average.

    Args:
        rate: Share of the steps that are not full steps, from the second epoch on.
        window: Number of recent steps over which the quantile is computed.
        decay: Weight of an example's earlier losses in its moving average.
    """

    def after_forward(self, logits: Tensor, batch: Batch) -> bool:
        labels = batch["labels"]
        if logits.shape[-1] == 1:
            losses = (logits[:, 0] - labels).square()
        else:
            losses = F.cross_entropy(logits.float(), labels, reduction="none")
        self.update_averages(batch, losses.tolist())
        return True


class GradNorm(_SkipLowAverages):
    """Policy that skips batches whose examples have small gradients.

    Each example has a moving average of the gradient norms of its batches.

    Args:
        rate: Share of the steps that are not full steps, from the second epoch on.
        window: Number of recent steps over which the quantile is computed.
        decay: Weight of an example's earlier gradient norms in its moving average.
    """

    def after_step(self, grad_norm: float, batch: Batch) -> None:
        self.update_averages(batch, [grad_norm] * len(batch["index"]))


class TeacherDistance(_SkipLowest):
    """Policy that skips the backward pass of batches on which the student is close to a teacher.

    Args:
        teacher: A run directory, a checkpoint, an export, or a Hugging Face folder or name.
        rate: Share of the steps that are skipped.
        window: Number of recent steps over which the quantile is computed.
    """

    def __init__(self, teacher: Text, rate: ShareBelowOne = 0.5, window: Count = 100) -> None:
        super().__init__(rate, window)
        self.teacher = teacher
        self.teacher_logits = torch.empty(0)  # [examples, labels]

    def setup(self, module: Any, data: Any, device: torch.device) -> None:
        task: Task = module.task
        if task.regression:
            raise UserError(
                f"TeacherDistance compares distributions over labels, but {task.name} is a regression. Choose another"
                " policy."
            )
        self.teacher_logits = Teacher(self.teacher, task).compute_logits(data, device)

    def after_forward(self, logits: Tensor, batch: Batch) -> bool:
        distance = distances.divergence(logits.float(), self.teacher_logits[batch["index"]], 1.0)
        return not self.is_low(float(distance))
