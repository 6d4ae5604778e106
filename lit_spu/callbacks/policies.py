"""Policies of `SelectiveUpdate`: how much of a step is taken. A class here is a policy, by being here.

Decided before the forward pass, a step that is left out costs nothing; behind it, no more than the backward pass is
saved, and no peak memory.
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
from lit_spu.tasks import Task

Batch = dict[str, Tensor]


class Policy:
    """Every step is whole, unless one of these says otherwise."""

    def begin(self, module: Any, data: Any, device: torch.device) -> None:
        """A run of a module on these data begins.

        Raises:
            UserError: if it cannot be had with these data.
        """

    def chooses(self, step: int, batch: Batch) -> bool:
        """Before the forward pass: whether the step is whole."""
        return True

    def passes(self, step: int, depth: int) -> frozenset[int]:
        """Of so many blocks, those that the backward pass goes around."""
        return frozenset()

    def agrees(self, scores: Tensor, batch: Batch) -> bool:
        """Behind the forward pass, from the scores [batch, labels]: whether there is a backward pass."""
        return True

    def learnt(self, norm: float, batch: Batch) -> None:
        """A step was taken, whose gradient had this norm."""

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""


class Always(Policy):
    """Plain training, to the bit."""


class Never(Policy):
    """No step is whole."""

    def chooses(self, step: int, batch: Batch) -> bool:
        return False


class _AtRate(Policy):
    """Some share of the steps, or of the blocks in each, is left out."""

    def __init__(self, rate: float = 0.5) -> None:
        if not 0 <= rate < 1:
            raise UserError(f"{type(self).__name__}: rate={rate} is the share that is left out: from 0 to less than 1.")
        self.rate = rate


class _ByChance(_AtRate):
    """What is left out hangs on the seed and on numbers alone, of the step for one."""

    def __init__(self, rate: float = 0.5, seed: int = 0) -> None:
        super().__init__(rate)
        self.seed = seed

    def leaves_out(self, *numbers: int) -> bool:
        """Whether what has these numbers is left out."""
        return key_of(self.seed, *numbers) / 2**63 < self.rate


class Random(_ByChance):
    """Chance decides: the control of every other policy at its rate.

    Args:
        rate: The share of the steps that are not whole.
        seed: Of the draws, which depend on it and the step alone.
    """

    def chooses(self, step: int, batch: Batch) -> bool:
        return not self.leaves_out(step)


class LayerCyclic(Policy):
    """A few blocks learn in each step, from the bottom up and round again (LCSB, https://arxiv.org/abs/2602.13073).

    Args:
        blocks: How many.
    """

    def __init__(self, blocks: int = 2) -> None:
        if blocks < 1:
            raise UserError(f"LayerCyclic: blocks={blocks}: one must learn at least.")
        self.blocks = blocks

    def passes(self, step: int, depth: int) -> frozenset[int]:
        learn = {(step * self.blocks + number) % depth for number in range(self.blocks)}
        return frozenset(range(depth)) - learn


class DropBackward(_ByChance):
    """The backward pass goes around blocks that are drawn for each step (DropBP, https://arxiv.org/abs/2402.17812).

    Args:
        rate: The share of the blocks.
        seed: Of the draws, which depend on it and the step alone.
    """

    def passes(self, step: int, depth: int) -> frozenset[int]:
        return frozenset(number for number in range(depth) if self.leaves_out(step, number))


class _Lowest(_AtRate):
    """What is lowest is left out: below the quantile `rate` of the last `window` values."""

    def __init__(self, rate: float = 0.5, window: int = 100) -> None:
        super().__init__(rate)
        self.recent: deque[float] = deque(maxlen=window)

    def is_low(self, value: float) -> bool:
        """Whether a value is among the lowest of the last ones, of which it is one from now on."""
        low = bool(self.recent) and value < float(torch.tensor([*self.recent], dtype=torch.float64).quantile(self.rate))
        self.recent.append(value)
        return low

    def state_dict(self) -> dict[str, Any]:
        return {"recent": [*self.recent]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.recent.extend(state["recent"])


class _Expected(_Lowest):
    """A batch is left out of which little is expected: the mean of what its examples have shown before.

    In the first epoch nothing is known of any, and every step is whole.
    """

    def __init__(self, rate: float = 0.5, window: int = 100, decay: float = 0.5) -> None:
        super().__init__(rate, window)
        if not 0 <= decay < 1:
            raise UserError(f"{type(self).__name__}: decay={decay} must be from 0 to less than 1.")
        self.decay = decay
        self.shown: dict[int, float] = {}

    def chooses(self, step: int, batch: Batch) -> bool:
        known = [self.shown.get(number) for number in batch["index"].tolist()]
        values = [value for value in known if value is not None]
        return len(values) < len(known) or not self.is_low(sum(values) / len(values))

    def show(self, batch: Batch, values: list[float]) -> None:
        """Each example of a batch has shown a value."""
        for number, value in zip(batch["index"].tolist(), values, strict=True):
            before = self.shown.get(number, value)
            self.shown[number] = self.decay * before + (1 - self.decay) * value

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"shown": dict(self.shown)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.shown = dict(state["shown"])


class LossEMA(_Expected):
    """Batches whose examples had a low loss are left out, by its moving average (https://arxiv.org/abs/1910.00762).

    Args:
        rate: The share of the steps, from the second epoch on, that are not whole.
        window: Of how many steps the quantile is taken.
        decay: How much of an example's average stays.
    """

    def agrees(self, scores: Tensor, batch: Batch) -> bool:
        labels = batch["labels"]
        if scores.shape[-1] == 1:
            losses = (scores[:, 0] - labels).square()
        else:
            losses = F.cross_entropy(scores.float(), labels, reduction="none")
        self.show(batch, losses.tolist())
        return True


class GradNorm(_Expected):
    """Batches whose examples came with small gradients are left out.

    Args:
        rate: The share of the steps, from the second epoch on, that are not whole.
        window: Of how many steps the quantile is taken.
        decay: How much of an example's average stays.
    """

    def learnt(self, norm: float, batch: Batch) -> None:
        self.show(batch, [norm] * len(batch["index"]))


class TeacherDistance(_Lowest):
    """Batches on which the student agrees with a teacher have no backward pass.

    Args:
        teacher: A run directory, a checkpoint, an export, or a Hugging Face folder or name.
        rate: The share of the steps.
        window: Of how many steps the quantile is taken.
    """

    def __init__(self, teacher: str, rate: float = 0.5, window: int = 100) -> None:
        super().__init__(rate, window)
        self.teacher = teacher
        self.answers = torch.empty(0)

    def begin(self, module: Any, data: Any, device: torch.device) -> None:
        task: Task = module.task
        if task.regression:
            raise UserError(f"TeacherDistance: {task.name} has one score, and no distribution to be far from.")
        self.answers = Teacher(self.teacher, task).answers(data, device)

    def agrees(self, scores: Tensor, batch: Batch) -> bool:
        return not self.is_low(float(distances.divergence(scores.float(), self.answers[batch["index"]], 1.0)))
