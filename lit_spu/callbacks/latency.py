"""Latency of training steps, forward passes and inference."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Annotated, Any, TypeAlias

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.utils.hooks import RemovableHandle

from lit_spu.callbacks.output import has_replayed, is_step_logged, log_figures, log_now
from lit_spu.errors import UserError, did_you_mean
from lit_spu.measure import Clock, Durations
from lit_spu.measure.clocks import Instant
from lit_spu.ranges import Checked, CountOrZero, Length, Text

Interval: TypeAlias = tuple[Instant, Instant]

MAX_UNREAD = 1000
"""Number of times after which they are read even if nothing is logged, because each holds two events of the device."""


class Latency(Checked, Callback):
    """Callback that times steps and forward passes in milliseconds, on each rank.

    A CUDA device is not waited for: its times are read when they are logged. Other accelerators are synchronised.

    - `latency/step_ms`: one optimizer step with the forward and backward passes of all its batches, without the time
      for loading data and for validation.
    - `latency/forward_ms`: one call of the module in training (MeZO calls it twice per step).
    - `latency/inference_ms`: one call of the module in validation, test and prediction.
    - `latency/forward/<module>_ms`, `latency/inference/<module>_ms`: one call of a submodule.

    Single times are logged; `summary` has their medians and their 95th percentiles (`latency/step_p95_ms`). It also
    counts the passes of training, `passes/forward` and `passes/backward`, including the warm-up. A step that is
    replayed as a CUDA graph has no time of its forward pass.

    Args:
        warmup: Number of first steps, and of first calls of each kind, that are not counted.
        modules: Names of submodules to time as well, as in `named_modules()`; the wildcards `*` and `?` are allowed
            (`backbone`, `backbone.*.layer.0`).

    Raises:
        UserError: when the run starts, if a name matches no submodule.
    """

    def __init__(self, warmup: CountOrZero = 5, modules: Annotated[Sequence[Text], Length()] = ()) -> None:
        self.warmup = warmup
        self.modules = list(modules)
        self._durations: dict[str, Durations] = {}
        self._timers: dict[str, _CallTimer] = {}
        self._passes = {"passes/forward": 0, "passes/backward": 0}
        self._clock: Clock
        self._batch_start: Instant
        self._batches: list[Interval] = []  # of the present step so far
        self._unread: list[tuple[str, list[Interval]]] = []  # times by name, each the sum of its intervals
        self._latest: dict[str, float] = {}  # milliseconds in training that were read and not logged yet
        self._global_step = 0

    @property
    def summary(self) -> dict[str, float]:
        """Median and 95th percentile of each time so far, in milliseconds, and the number of passes in training."""
        self._read()
        figures: dict[str, float] = dict(self._passes) if any(self._passes.values()) else {}
        for name, durations in self._durations.items():
            if durations.seconds:
                figures[f"latency/{name}_ms"] = durations.milliseconds()
                figures[f"latency/{name}_p95_ms"] = durations.milliseconds(0.95)
        return figures

    # -- hooks on the modules ---------------------------------------------------------------------------------------

    def _register_hooks(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Register the timers on the modules; not in `setup`, where a module may still be incomplete."""
        if self._timers:
            return
        self._clock = Clock(trainer.strategy.root_device)
        modules = dict(pl_module.named_modules())
        for pattern in self.modules:
            if not any(fnmatchcase(name, pattern) for name in modules if name):
                # suggest modules that are nested no deeper than the given name
                names = [name for name in modules if name and name.count(".") <= pattern.count(".")]
                raise UserError(f"Latency: modules: no module is named {pattern!r}. {did_you_mean(pattern, names)}")
        self._timers = {
            name: _CallTimer(module, self._clock)
            for name, module in modules.items()
            if not name or any(fnmatchcase(name, pattern) for pattern in self.modules)
        }

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._register_hooks(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._register_hooks(trainer, pl_module)

    on_test_start = on_predict_start = on_validation_start

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for timer in self._timers.values():
            timer.remove_hooks()
        self._timers = {}

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "exception")

    # -- training ---------------------------------------------------------------------------------------------------

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._global_step, self._batches = trainer.global_step, []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._discard_calls()
        self._batch_start = self._clock.now()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._passes["passes/backward"] += 1

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._batches.append((self._batch_start, self._clock.now()))
        if has_replayed(pl_module):  # calls while a graph was captured took no time on the device
            self._discard_calls()
            self._passes["passes/forward"] += 1
        self._note_calls("forward")
        if trainer.global_step > self._global_step:
            self._unread.append(("step", self._batches))
            self._global_step, self._batches = trainer.global_step, []
        if is_step_logged(trainer):
            self._read()
            log_figures(pl_module, self._latest)
            self._latest = {}
        self._limit_unread()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        log_now(trainer, {name: value for name, value in self.summary.items() if name == "latency/step_p95_ms"})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report what could not be measured."""
        if not self._durations.get("step", Durations()).seconds:
            rank_zero_info(
                f"Latency: no step time, because the run ended within the warm-up of {self.warmup} steps. Train longer,"
                " or lower warmup."
            )
        uncalled = [name for name, timer in self._timers.items() if not timer.was_called]
        if uncalled:
            names = ", ".join(name or type(pl_module).__name__ for name in uncalled)
            rank_zero_info(f"Latency: not timed, because never called as a module: {names}.")

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
        self._note_calls("inference")
        self._limit_unread()

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        log_now(trainer, {name: value for name, value in self.summary.items() if "/inference" in name})

    on_test_epoch_end = on_predict_epoch_end = on_validation_epoch_end

    # -- figures ----------------------------------------------------------------------------------------------------

    def _note_calls(self, kind: str) -> None:
        """Note the calls since the last batch."""
        for name, timer in self._timers.items():
            finished = timer.pop_finished()
            if kind == "forward" and not name:
                self._passes["passes/forward"] += len(finished)
            self._unread += [(f"{kind}/{name}" if name else kind, [interval]) for interval in finished]

    def _discard_calls(self) -> None:
        for timer in self._timers.values():
            timer.pop_finished()

    def _limit_unread(self) -> None:
        if len(self._unread) >= MAX_UNREAD:
            self._read()

    def _read(self) -> None:
        """Read the times that were noted, which waits for the device."""
        unread, self._unread = self._unread, []
        for name, intervals in unread:
            seconds = sum(self._clock.seconds(start, end) for start, end in intervals)
            durations = self._durations.setdefault(name, Durations(self.warmup))
            durations.add(seconds)
            if durations.seconds and not name.startswith("inference"):
                self._latest[f"latency/{name}_ms"] = seconds * 1000


class _CallTimer:
    """Timer of the calls of one module; of nested calls of the same module only the innermost counts.

    A strategy may run a whole training step through the module's `__call__`, around the call inside the step.
    """

    def __init__(self, module: nn.Module, clock: Clock) -> None:
        self.was_called = False
        self._clock = clock
        self._running: list[Instant | None] = []  # start of each nested call; None if it is not timed
        self._finished: list[Interval] = []
        self._handles: list[RemovableHandle] = [
            module.register_forward_pre_hook(self._before_call),
            module.register_forward_hook(self._after_call),
        ]

    def _before_call(self, module: nn.Module, args: Any) -> None:
        self._running = [None] * len(self._running)
        self._running.append(None if self._clock.is_capturing() else self._clock.now())

    def _after_call(self, module: nn.Module, args: Any, output: Any) -> None:
        start = self._running.pop() if self._running else None
        if start is not None:
            self._finished.append((start, self._clock.now()))
            self.was_called = True

    def pop_finished(self) -> list[Interval]:
        """Return the calls that ended since the last `pop_finished`; forget calls that failed before they ended."""
        finished, self._finished, self._running = self._finished, [], []
        return finished

    def remove_hooks(self) -> None:
        for handle in self._handles:
            handle.remove()
