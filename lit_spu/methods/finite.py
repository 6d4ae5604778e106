"""Detection of training losses, scores and weights that are NaN or infinite."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lit_spu.backbones import Batch
from lit_spu.callbacks.output import is_step_logged, monitored_names, on_host, read_interval
from lit_spu.errors import NonFiniteError


class LossWatch:
    """Watch for the first training loss that is not finite.

    Losses stay on the device, so that no training step waits for it. `read` fetches all of them at once.

    Attributes:
        last: The last loss that is known on the host.
    """

    def __init__(self) -> None:
        self.last = math.nan
        self._unread: list[tuple[int, Tensor]] = []  # steps and losses
        self._rates: dict[int, Sequence[float]] = {}  # learning rates by step, since the last check
        self._first_bad: int | None = None

    def add(self, loss: Tensor, step: int, rates: Sequence[float]) -> None:
        """Note a loss, the number of its step (1 is the first) and the learning rates."""
        # a loss without a graph may be the output of a CUDA graph, which the next replay overwrites
        self._unread.append((step, loss.detach() if loss.requires_grad else loss.clone()))
        self._rates[step] = rates

    def read(self) -> float:
        """Read the losses since the last call, which waits for the device once; return the last loss."""
        unread, self._unread = self._unread, []
        values = torch.stack([loss for _, loss in unread]).tolist() if unread else []
        for (step, _), self.last in zip(unread, values, strict=True):
            if not math.isfinite(self.last):
                self._first_bad = self._first_bad or step
        return self.last

    def check(self, advise: Callable[[int], str], reduce: Callable[[float], float] = lambda first: first) -> None:
        """Read the losses, and check that all since the last check are finite.

        Args:
            advise: Function from the number of completed steps to a sentence about what to change.
            reduce: Function that returns the minimum of a number over all ranks.

        Raises:
            NonFiniteError: If a loss was not finite.
        """
        self.read()
        first = reduce(self._first_bad or math.inf)
        if first == math.inf:
            self._rates.clear()
            return
        rates = " and ".join(dict.fromkeys(f"{rate:.3g}" for rate in self._rates.get(int(first), ()))) or "unknown"
        raise NonFiniteError(
            f"Training stops: the loss is not finite (NaN or infinite) at step {int(first)}, learning rate {rates}."
            f" {advise(int(first) - 1)} Earlier checkpoints are kept."
        )


class FiniteLosses(LightningModule):
    """Base class of modules that stop at the first training loss, or loss of an evaluation, that is not finite."""

    def __init__(self) -> None:
        super().__init__()
        self._loss_watch = LossWatch()
        self._step_values: dict[str, tuple[float | Tensor | None, bool]] = {}
        self._monitored = set[str]()

    def on_fit_start(self) -> None:
        self._loss_watch, self._step_values = LossWatch(), {}

    def on_train_start(self) -> None:
        self._monitored = monitored_names(self.trainer)

    # -- values of training steps -------------------------------------------------------------------------------------

    def log_loss(self, loss: Tensor) -> None:
        """Log a training loss, and watch that it is finite."""
        self.watch_loss(loss)
        self._step_values["train/loss"] = (None, True)  # read from the watch if it is needed: it may be on a device

    def log_step(self, name: str, value: float | Tensor, prog_bar: bool = False) -> None:
        """Log a number of a training step. Unlike `log`, it does nothing in steps whose values are not read."""
        self._step_values[name] = (value.clone() if isinstance(value, Tensor) else value, prog_bar)

    def flush_step(self) -> None:
        """Hand the last values of `log_step` and `log_loss` to Lightning if they are read.

        Called at the end of a step, before callbacks read them. If a callback has stopped the run, `on_train_batch_end`
        hands them over instead: Lightning would keep the values of both hooks.
        """
        is_monitored = not self._monitored.isdisjoint(self._step_values)
        if (is_monitored or is_step_logged(self.trainer)) and not self.trainer.should_stop:
            self._hand_over()

    def _hand_over(self) -> None:
        values, self._step_values = self._step_values, {}
        dtype = torch.float64 if self.dtype is torch.float64 else torch.float32
        for name, (value, prog_bar) in values.items():
            number = self._loss_watch.read() if value is None else value
            self.log(name, on_host(number, dtype), prog_bar=prog_bar)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.flush_step()

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        trainer: Any = self.trainer
        if trainer.should_stop or trainer.global_step == trainer.max_steps:
            self._hand_over()
        if (batch_idx + 1) % read_interval(trainer) == 0:
            self.check_losses()

    # -- checks -------------------------------------------------------------------------------------------------------

    def watch_loss(self, loss: Tensor) -> None:
        """Stop the run if a training loss is not finite.

        On one CPU a loss is checked at once. An accelerator is not waited for: there, and on several devices, losses
        are checked every `log_every_n_steps` batches, before each validation and checkpoint, and at the end of an
        epoch. Checkpoints of weights that are not finite, or after a loss that is not, are never saved.

        Raises:
            NonFiniteError: If the loss is not finite.
        """
        trainer = self.trainer
        is_read_at_once = loss.device.type == "cpu" and trainer.world_size == 1
        if is_read_at_once and math.isfinite(value := loss.item()):
            self._loss_watch.last = value
            return
        step = trainer.global_step + int(self.automatic_optimization)  # a manual step is counted by now
        rates = [group["lr"] for optimizer in trainer.optimizers for group in optimizer.param_groups]
        self._loss_watch.add(loss, step, rates)
        if is_read_at_once:
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

        def reduce(first: float) -> float:
            # on the module's device, because NCCL cannot reduce on a CPU
            return float(strategy.reduce(torch.tensor(first, device=self.device), reduce_op="min"))

        if self.trainer.world_size == 1:
            self.check_local_losses()
        else:
            self._loss_watch.check(self.advise, reduce)

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
    """Check that all weights are finite, which waits for their device once.

    Raises:
        NonFiniteError: If one is not. The message begins with `problem`.
    """
    are_finite = torch.stack([weight.isfinite().all() for weight in weights.values()]).tolist() if weights else []
    if bad := [name for name, is_finite in zip(weights, are_finite, strict=True) if not is_finite]:
        raise NonFiniteError(f"{problem}: {len(bad)} of {len(weights)} weights hold NaN or infinity ({bad[0]}, …).")
