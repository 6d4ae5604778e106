"""A trace of a few training steps, to look at in a browser."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.profiler import ProfilerAction, ProfilerActivity, profile, record_function, schedule

VIEWER = "https://ui.perfetto.dev"


class ProfilerTrace(Callback):
    """Writes Chrome traces of training steps, gzipped, one a rank and cycle, into the run directory.

    A trace named `trace-rank0-step00042.json.gz` ends with the 42nd batch. Operators lie below phases: those that the
    method names with `torch.profiler.record_function` (`backbone`, `side`, `rung 3`), `backward`, and the optimizer's
    own. Open a trace at https://ui.perfetto.dev. Steps are batches here.

    Args:
        wait: Steps to leave out at the start of each cycle.
        warmup: Steps to record and drop, because starting the profiler disturbs them.
        active: Steps to keep.
        repeat: Number of cycles; 0 goes on to the end of training.
        skip_first: Steps to leave out before the first cycle.
    """

    def __init__(self, wait: int = 1, warmup: int = 1, active: int = 3, repeat: int = 1, skip_first: int = 5) -> None:
        self._schedule = schedule(wait=wait, warmup=warmup, active=active, repeat=repeat, skip_first=skip_first)
        self._needed = skip_first + wait + warmup + active
        self._profile: profile | None = None
        self._folder = Path()
        self._recorded = 0  # batches since the current recording began
        self._written: list[Path] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._folder = Path(
            trainer.log_dir or trainer.default_root_dir
        )  # asked for on every rank: Lightning broadcasts
        on_cuda = trainer.strategy.root_device.type == "cuda"

        def write(finished: profile) -> None:
            recorded, self._recorded = self._recorded, 0
            if not recorded:  # the run ended just when the recording began
                return
            self._folder.mkdir(parents=True, exist_ok=True)
            steps = trainer.fit_loop.total_batch_idx + 1
            path = self._folder / f"trace-rank{trainer.global_rank}-step{steps:05d}.json.gz"
            finished.export_chrome_trace(str(path))
            self._written.append(path)
            rank_zero_info(f"Trace of {recorded} steps: {path} (open it at {VIEWER})")

        # Each cycle is in a file of its own by the time that the next one clears it.
        warnings.filterwarnings("ignore", message="Warning: Profiler clears events", category=UserWarning)
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
            self._recorded += running.current_action in (ProfilerAction.RECORD, ProfilerAction.RECORD_AND_SAVE)
            running.step()
            self._profile = running  # only now: a profiler whose trace could not be written crashes if it is stopped

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()
        if not self._written:
            rank_zero_warn(
                f"ProfilerTrace: the run ended after {trainer.fit_loop.total_batch_idx + 1} batches, before anything"
                f" was recorded. skip_first + wait + warmup + active need {self._needed}: lower them or train longer."
            )

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._stop()

    def _stop(self) -> None:
        """Stop the profiler; what it is recording is written."""
        running, self._profile = self._profile, None
        if running:
            running.stop()
