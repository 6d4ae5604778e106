"""Fewer and fewer blocks learn: from the bottom up, so that what is frozen leaves the backward pass.

After AutoFreeze (Liu, Agarwal, Venkataraman 2021, https://arxiv.org/abs/2102.01386), and, the other way round, the
gradual unfreezing of ULMFiT (Howard, Ruder 2018, https://arxiv.org/abs/1801.06146).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from lit_spu.callbacks.loggers import log_now
from lit_spu.errors import UserError


class GradualFreezing(Callback):
    """Freezes the stages of a method, the embeddings and then block by block, while it trains.

    A stage that is frozen has no gradient, so that neither momentum nor weight decay moves it, and below the lowest
    that learns nothing is stored for the backward pass: time and memory fall. `params/trainable` and `freezing/frozen`,
    how many stages are, are logged whenever they change. Behind the run, what learns is again what learnt before it.

    It works on any module whose `parameters_by_depth` lists its parameters at each depth, from the bottom up. The head, which is not
    among them, always learns.

    Args:
        every: Epochs or steps between two freezings.
        unit: Of what `every` counts.
        keep: How many of the last stages always learn.
        thaw: Start with these alone, and let the next stage below learn each time.
        settled: Freeze by gradients instead, at the end of an interval: the lowest stages up to the first whose mean
            gradient norm, relative to that of the interval before, has changed by more than this quantile of the
            changes of all that learn (AutoFreeze takes 0.5).

    Raises:
        UserError: if a number is out of range, or, before training, if there is nothing to freeze, the method does not
            learn by a Trainer's backward passes, or the strategy waits for gradients that will not come.
    """

    def __init__(
        self,
        every: int = 1,
        unit: Literal["epoch", "step"] = "epoch",
        keep: int = 1,
        thaw: bool = False,
        settled: float | None = None,
    ) -> None:
        if every < 1 or keep < 0 or not 0 < (0.5 if settled is None else settled) <= 1:
            raise UserError(
                f"GradualFreezing: every={every} must be at least 1, keep={keep} at least 0, and settled={settled}"
                " above 0 and at most 1."
            )
        if thaw and settled is not None:
            raise UserError("GradualFreezing: settled says what may be frozen, and thaw=true freezes nothing.")
        self.every, self.unit, self.keep, self.thaw, self.settled = every, unit, keep, thaw, settled
        self.frozen = self.intervals = 0
        self._stages: list[list[nn.Parameter]] = []
        self._norms: list[Any] = []  # of every stage's gradient, the sum over the interval's steps
        self._before: list[float] = []  # and over those of the interval before

    @property
    def summary(self) -> dict[str, float]:
        """How many stages are frozen."""
        return {"freezing/frozen": float(self.frozen)}

    # -- what is frozen ---------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse what cannot be."""
        if stage != "fit":
            return
        self.frozen, self.intervals, self._norms, self._before = 0, 0, [], []
        name = type(pl_module).__name__
        if not pl_module.automatic_optimization:
            raise UserError(
                f"GradualFreezing: {name} takes its steps by itself: nothing is saved by freezing its weights."
            )
        learning = self._learning(pl_module)
        if len(learning) <= self.keep:
            raise UserError(
                f"GradualFreezing: {name} trains {len(learning)} of the backbone's embeddings and blocks, and"
                f" keep={self.keep} of them must go on learning: there is nothing to freeze."
            )
        strategy = trainer.strategy
        if isinstance(strategy, DDPStrategy) and not strategy._ddp_kwargs.get("find_unused_parameters"):
            raise UserError(
                "GradualFreezing: ddp waits for the gradients of what is frozen. Use --trainer.strategy"
                " ddp_find_unused_parameters_true."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # behind the wrapping by ddp, which would leave out what is frozen before it
        self._stages = self._learning(pl_module)
        self._norms = self._norms or [0.0] * len(self._stages)
        fresh = self._due() if self.settled is None else 0
        self._freeze(trainer, pl_module, self.frozen if self.intervals else fresh)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        intervals = (trainer.current_epoch if self.unit == "epoch" else trainer.global_step) // self.every
        if intervals == self.intervals:
            return
        self.intervals = intervals
        due = self._due() if self.settled is None else self.frozen + self._have_settled(self.settled)
        if due != self.frozen:
            self._freeze(trainer, pl_module, due)

    def _learning(self, pl_module: LightningModule) -> list[list[nn.Parameter]]:
        """What learns in each stage where something does."""
        stages = ([p for p in stage if p.requires_grad] for stage in getattr(pl_module, "parameters_by_depth", ()))
        return [stage for stage in stages if stage]

    def _due(self) -> int:
        """How many stages are frozen in this interval."""
        most = len(self._stages) - self.keep
        return max(0, most - self.intervals) if self.thaw else min(self.intervals, most)

    def _freeze(self, trainer: Trainer, pl_module: LightningModule, count: int) -> None:
        """Let the lowest `count` stages be frozen, and no other."""
        self.frozen = count
        _freeze(self._stages, count)
        trainable = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        log_now(trainer, {"params/trainable": trainable, "freezing/frozen": count})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _freeze(self._stages, 0)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        _freeze(self._stages, 0)

    # -- whether a gradient has settled -----------------------------------------------------------------------------

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self.settled is None:
            return
        for number, stage in enumerate(self._stages):
            self._norms[number] += get_total_norm([p.grad for p in stage if p.grad is not None])

    def _have_settled(self, share: float) -> int:
        """Of the lowest stages that learn, how many have settled since the interval before; a new one begins."""
        before, self._before, self._norms = self._before, [float(n) for n in self._norms], [0.0] * len(self._norms)
        if not before:
            return 0
        learning = list(zip(before, self._before, strict=True))[self.frozen :]
        change = [abs(b - now) / b if b else 0.0 for b, now in learning]
        limit = float(torch.tensor(change, dtype=torch.float64).quantile(share))
        settled = next((number for number, one in enumerate(change) if one > limit), len(change))
        return min(settled, len(change) - self.keep)

    # -- resuming ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        norms = [float(norm) for norm in self._norms]
        return {"frozen": self.frozen, "intervals": self.intervals, "norms": norms, "before": self._before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.frozen, self.intervals = state_dict["frozen"], state_dict["intervals"]
        self._norms, self._before = state_dict["norms"], state_dict["before"]


def _freeze(stages: Sequence[Sequence[nn.Parameter]], count: int) -> None:
    for number, stage in enumerate(stages):
        for parameter in stage:
            parameter.requires_grad_(number >= count)
            if number < count:
                parameter.grad = None
