"""The time that training and inference take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.utils.hooks import RemovableHandle

from lit_spu.callbacks.loggers import log_now
from lit_spu.errors import UserError, did_you_mean
from lit_spu.measure import Clock, Durations
from lit_spu.measure.clocks import Instant


class Latency(Callback):
    """Times steps and forward passes, in milliseconds, each rank its own; an accelerator is synchronised once a batch.

    - `latency/step_ms`: one optimizer step, forward and backward passes of all its batches included; neither the wait
      for data nor validation is.
    - `latency/forward_ms`: one call of the module in training (MeZO makes two a step).
    - `latency/inference_ms`: one call of the module in validation, test and prediction.
    - `latency/forward/<module>_ms`, `latency/inference/<module>_ms`: one call of a module inside it.

    Logged are the times as they come; `summary` has the medians, and with `p95` before the unit the 95th percentiles.
    It also counts the passes of training, `passes/forward` and `passes/backward`, warm-up included.

    Args:
        warmup: The first so many steps and calls of each kind are dropped.
        modules: Names of modules inside the LightningModule to time as well, as in `named_modules()`; `*` and `?` match
            any part (`backbone`, `backbone.*.layer.0`).

    Raises:
        UserError: if a name matches no module.
    """

    def __init__(self, warmup: int = 5, modules: Sequence[str] = ()) -> None:
        self.warmup = warmup
        self.modules = list(modules)
        self._durations: dict[str, Durations] = {}
        self._calls: dict[str, _Calls] = {}
        self._passes = {"passes/forward": 0, "passes/backward": 0}
        self._clock: Clock
        self._start: Instant
        self._global_step = 0
        self._step_seconds = 0.0

    @property
    def summary(self) -> dict[str, float]:
        """Median and 95th percentile of each figure so far, in milliseconds; and the passes of training."""
        found = {name: durations for name, durations in self._durations.items() if durations.seconds}
        passes = self._passes if any(self._passes.values()) else {}
        return passes | {
            key: value
            for name, durations in found.items()
            for key, value in (
                (f"latency/{name}_ms", durations.milliseconds()),
                (f"latency/{name}_p95_ms", durations.milliseconds(0.95)),
            )
        }

    # -- hooks on the modules ---------------------------------------------------------------------------------------

    def _watch(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to time the calls, once the module is whole."""
        if self._calls:
            return
        self._clock = Clock(trainer.strategy.root_device)
        modules = dict(pl_module.named_modules())
        for pattern in self.modules:
            if not any(fnmatchcase(name, pattern) for name in modules if name):
                raise UserError(f"Latency: modules has {pattern!r}, which no module is. {_hint(pattern, modules)}")
        self._calls = {
            name: _Calls(module, self._clock.now)
            for name, module in modules.items()
            if not name or any(fnmatchcase(name, pattern) for pattern in self.modules)
        }

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._watch(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._watch(trainer, pl_module)

    on_test_start = on_predict_start = on_validation_start

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for calls in self._calls.values():
            calls.close()
        self._calls = {}

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "exception")

    # -- training ---------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._global_step, self._step_seconds = trainer.global_step, 0.0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        for calls in self._calls.values():
            calls.take()
        self._start = self._clock.now()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._passes["passes/backward"] += 1

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._step_seconds += self._clock.seconds(self._start, self._clock.now())
        figures = self._collect("forward")
        if trainer.global_step > self._global_step:
            figures |= self._add("step", self._step_seconds)
            self._global_step, self._step_seconds = trainer.global_step, 0.0
        pl_module.log_dict(figures, on_step=True, on_epoch=False)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        log_now(trainer, {name: value for name, value in self.summary.items() if name == "latency/step_p95_ms"})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what could not be measured."""
        if not self._durations.get("step", Durations()).seconds:
            rank_zero_info(f"Latency: no step came after the warm-up of {self.warmup}, so there is no step time.")
        silent = [name for name, calls in self._calls.items() if not calls.seen]
        if silent:
            names = ", ".join(name or type(pl_module).__name__ for name in silent)
            rank_zero_info(f"Latency: never called as a module, so not timed: {names}.")

    # -- inference --------------------------------------------------------------------------------------------------

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._collect("inference")

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        log_now(trainer, {name: value for name, value in self.summary.items() if "/inference" in name})

    on_test_epoch_end = on_predict_epoch_end = on_validation_epoch_end

    # -- figures ----------------------------------------------------------------------------------------------------

    def _collect(self, what: str) -> dict[str, float]:
        """Keep the calls since the last batch; the latest of each, for the log."""
        figures: dict[str, float] = {}
        for name, calls in self._calls.items():
            done = calls.take()
            if what == "forward" and not name:
                self._passes["passes/forward"] += len(done)
            for start, end in done:
                figures |= self._add(f"{what}/{name}" if name else what, self._clock.seconds(start, end))
        return figures

    def _add(self, name: str, seconds: float) -> dict[str, float]:
        durations = self._durations.setdefault(name, Durations(self.warmup))
        durations.add(seconds)
        return {f"latency/{name}_ms": seconds * 1000} if durations.seconds else {}


class _Calls:
    """The start and end of each call of a module. Of calls within one another the innermost counts.

    For a strategy may run a whole training step through the module's own `__call__`, around the call in it.
    """

    def __init__(self, module: nn.Module, now: Callable[[], Instant]) -> None:
        self.seen = False
        self._now = now
        self._open: list[Instant | None] = []
        self._done: list[tuple[Instant, Instant]] = []
        self._handles: list[RemovableHandle] = [
            module.register_forward_pre_hook(self._enter),
            module.register_forward_hook(self._leave),
        ]

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._open = [None] * len(self._open)  # those around it are not the innermost
        self._open.append(self._now())

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        start = self._open.pop() if self._open else None
        if start is not None:
            self._done.append((start, self._now()))
            self.seen = True

    def take(self) -> list[tuple[Instant, Instant]]:
        """The calls that ended since the last time; what a failed call left open is forgotten."""
        done, self._done, self._open = self._done, [], []
        return done

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


def _hint(pattern: str, modules: dict[str, nn.Module]) -> str:
    near = [name for name in modules if name and name.count(".") <= pattern.count(".")]
    return did_you_mean(pattern, near)
