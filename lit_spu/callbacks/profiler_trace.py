"""Profiler traces of a few training steps, for a viewer in the browser."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.profiler import ProfilerAction, ProfilerActivity, profile, record_function, schedule

from lit_spu.callbacks.output import run_directory
from lit_spu.ranges import Checked, Count, CountOrZero

VIEWER = "https://ui.perfetto.dev"


class ProfilerTrace(Checked, Callback):
    """Callback that writes gzipped Chrome traces of training steps into the run directory.

    There is one trace for each rank and cycle. A trace named `trace-rank0-step00042.json.gz` ends with the 42nd batch.
    Operators are grouped into phases: those that the method names with `torch.profiler.record_function` (`backbone`,
    `side`, `rung 3`), `backward`, and the optimizer step. Open a trace at https://ui.perfetto.dev. Here a step is one
    batch.

    Args:
        wait: Number of steps to skip at the beginning of each cycle.
        warmup: Number of steps to record and discard, because starting the profiler slows them down.
        active: Number of steps in a trace.
        repeat: Number of cycles; 0 means until the end of training.
        skip_first: Number of steps to skip before the first cycle.
    """

    def __init__(
        self,
        wait: CountOrZero = 1,
        warmup: CountOrZero = 1,
        active: Count = 3,
        repeat: CountOrZero = 1,
        skip_first: CountOrZero = 5,
    ) -> None:
        self._schedule = schedule(wait=wait, warmup=warmup, active=active, repeat=repeat, skip_first=skip_first)
        self._min_steps = skip_first + wait + warmup + active
        self._profile: profile | None = None
        self._folder = Path()
        self._num_recorded = 0  # batches in the current recording
        self._traces: list[Path] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._folder = run_directory(trainer)
        on_cuda = trainer.strategy.root_device.type == "cuda"

        def write(finished: profile) -> None:
            num_recorded, self._num_recorded = self._num_recorded, 0
            if not num_recorded:  # the run ended before the first batch of this recording
                return
            self._folder.mkdir(parents=True, exist_ok=True)
            steps = trainer.fit_loop.total_batch_idx + 1
            path = self._folder / f"trace-rank{trainer.global_rank}-step{steps:05d}.json.gz"
            finished.export_chrome_trace(str(path))
            self._traces.append(path)
            rank_zero_info(f"Trace of {num_recorded} steps: {path} (open it at {VIEWER})")

        self._profile = profile(
            activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])],
            schedule=self._schedule,
            on_trace_ready=write,
        )
        self._profile.start()

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        self._backward = record_function("backward")
        self._backward.__enter__()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._backward.__exit__(None, None, None)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        running, self._profile = self._profile, None
        if running:
            self._num_recorded += running.current_action in (ProfilerAction.RECORD, ProfilerAction.RECORD_AND_SAVE)
            running.step()
            self._profile = running  # only now: stopping a profiler that failed to write its trace would crash

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()
        if not self._traces:
            rank_zero_warn(
                f"ProfilerTrace: the run ended after {trainer.fit_loop.total_batch_idx + 1} batches, before anything"
                f" was recorded. skip_first + wait + warmup + active need {self._min_steps}: lower them or train"
                " longer."
            )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        """Stop the profiler; it writes the trace of an unfinished recording."""
        running, self._profile = self._profile, None
        if running:
            running.stop()
