"""Detection of training losses, scores and weights that are NaN or infinite."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lit_spu.backbones import Batch
from lit_spu.errors import NonFiniteError

_NO_STEP = math.inf


class LossWatch:
    """Watch for the first training loss that is not finite.

    The step of that loss is kept on the device, so that no training step waits for it. `check` reads it.
    """

    def __init__(self) -> None:
        self._first_step: Tensor | None = None
        self._rates: dict[int, str] = {}  # learning rates by step, since the last check

    def add(self, loss: Tensor, step: int, rates: str) -> None:
        """Note a loss, the number of its step (1 is the first) and the learning rates as text."""
        step_or_none = torch.where(loss.detach().isfinite(), _NO_STEP, float(step))
        self._first_step = step_or_none if self._first_step is None else self._first_step.minimum(step_or_none)
        self._rates[step] = rates

    def check(self, advise: Callable[[int], str], reduce: Callable[[Tensor], Tensor] = lambda first: first) -> None:
        """Read the first bad step, which waits for the device.

        Args:
            advise: Function from the number of completed steps to a sentence about what to change.
            reduce: Function that returns the minimum of a tensor over all ranks.

        Raises:
            NonFiniteError: If a loss was not finite.
        """
        first = _NO_STEP if self._first_step is None else float(reduce(self._first_step))
        if first == _NO_STEP:
            self._rates.clear()
            return
        rates = self._rates.get(int(first), "unknown")
        raise NonFiniteError(
            f"Training stops: the loss is not finite (NaN or infinite) at step {int(first)}, learning rate {rates}."
            f" {advise(int(first) - 1)} Earlier checkpoints are kept."
        )


class FiniteLosses(LightningModule):
    """Base class of modules that stop at the first training loss, or loss of an evaluation, that is not finite."""

    def __init__(self) -> None:
        super().__init__()
        self._loss_watch = LossWatch()

    def on_fit_start(self) -> None:
        self._loss_watch = LossWatch()

    def log_loss(self, loss: Tensor, batch: Batch) -> None:
        """Log a training loss, and watch that it is finite."""
        self.watch_loss(loss)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch["input_ids"]))

    def watch_loss(self, loss: Tensor) -> None:
        """Stop the run if a training loss is not finite.

        On one CPU a loss is checked at once. An accelerator is not waited for: there, and on several devices, losses
        are checked every `log_every_n_steps` batches, before each validation and checkpoint, and at the end of an
        epoch. Checkpoints of weights that are not finite, or after a loss that is not, are never saved.

        Raises:
            NonFiniteError: If the loss is not finite.
        """
        step = self.trainer.global_step + int(self.automatic_optimization)  # a manual step is counted by now
        groups = [group for optimizer in self.trainer.optimizers for group in optimizer.param_groups]
        rates = " and ".join(dict.fromkeys(f"{group['lr']:.3g}" for group in groups))
        self._loss_watch.add(loss, step, rates)
        if loss.device.type == "cpu" and self.trainer.world_size == 1:
            self.check_local_losses()

    def check_local_losses(self) -> None:
        """Check the training losses of this rank since the last check.

        Raises:
            NonFiniteError: If one was not finite.
        """
        self._loss_watch.check(self.advise)

    def check_losses(self) -> None:
        """Check the training losses of all ranks since the last check.

        Raises:
            NonFiniteError: If one was not finite.
        """
        strategy: Any = self.trainer.strategy
        # MeZO's losses are on the CPU, where NCCL cannot reduce
        self._loss_watch.check(self.advise, lambda first: strategy.reduce(first.to(self.device), reduce_op="min"))

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        trainer: Any = self.trainer
        if (batch_idx + 1) % (trainer.log_every_n_steps or 50) == 0:  # 0 logs nothing; 50 is the Trainer's default
            self.check_losses()

    def on_train_epoch_end(self) -> None:
        self.check_losses()

    def on_validation_start(self) -> None:
        self.check_losses()

    def log_scores(self, scores: Mapping[str, Tensor], prog_bar: bool = False) -> None:
        """Log scores by their names. A correlation may be NaN: undefined.

        Raises:
            NonFiniteError: If a loss among them is not finite. Its logits are no answers, so there is no score.
        """
        for name, value in scores.items():
            if name.split("/")[1].endswith("loss") and not math.isfinite(value):
                advice = self.advise(self.trainer.global_step)
                raise NonFiniteError(f"{name} is not finite, nor are some logits, so there is no score. {advice}")
        self.log_dict(dict(scores), prog_bar=prog_bar, sync_dist=True)

    def advise(self, num_steps: int) -> str:
        """Return what to change after a loss or score that is not finite, by the number of completed steps."""
        trainer: Any = self.trainer
        advice = []
        if trainer.state.fn != "fit":
            advice.append("give another checkpoint")
        elif num_steps:
            advice.append("lower --model.lr")
            if self.automatic_optimization and not trainer.gradient_clip_val:
                advice.append("clip gradients with --trainer.gradient_clip_val=1")
        if "16" in str(trainer.precision):
            advice.append("compute with --trainer.precision=32-true")
        advice = advice or ["choose another backbone: its outputs are not finite before any training"]
        return f"To go on, {', or '.join(advice)}."


def check_weights(weights: Mapping[str, Tensor], problem: str) -> None:
    """Check that all weights are finite.

    Raises:
        NonFiniteError: If one is not. The message begins with `problem`.
    """
    if bad := list(_find_bad(weights)):
        raise NonFiniteError(f"{problem}: {len(bad)} of {len(weights)} weights hold NaN or infinity ({bad[0]}, …).")


def _find_bad(weights: Mapping[str, Tensor]) -> Iterable[str]:
    """Yield the names of weights that are not finite. Waits for each device once."""
    flags: dict[torch.device, dict[str, Tensor]] = {}
    for name, weight in weights.items():
        flags.setdefault(weight.device, {})[name] = weight.isfinite().all()
    for on_device in flags.values():
        are_finite = torch.stack([*on_device.values()]).tolist()
        yield from (name for name, is_finite in zip(on_device, are_finite, strict=True) if not is_finite)
