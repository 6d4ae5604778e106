"""Memory use of training."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves  # torch has no public name for it

from lit_spu.callbacks.output import has_replayed, is_step_logged, log_figures, log_now, run_directory
from lit_spu.errors import UserError
from lit_spu.measure import MIB, AcceleratorPeak, Kind, LiveBytes, ResidentPeak
from lit_spu.ranges import Checked

LIVE_STEPS = 2
"""Number of first steps in which live bytes are counted: the first creates the optimizer state, the second has it."""

LIVE_BATCHES = 32
"""Number of batches after which this counting ends, even if there were fewer steps."""


class Memory(Checked, Callback):
    """Callback that measures the peak memory of every training step in MiB (2**20 bytes), on each rank.

    - `memory/peak_mib`: on an accelerator, the memory of all tensors; on a CPU, the resident memory of the process. The
      latter includes the interpreter, imports and freed memory that malloc retains, so compare differences.
    - `memory/reserved_mib`: on an accelerator, the memory that the allocator took from the device.
    - `memory/mean_mib`: the mean of the steps' peaks so far. Steps that are replayed as a CUDA graph have no peak.
    - `memory/inference_peak_mib`: the peak of a validation, test or predict epoch.

    Live bytes are the bytes of tensors alone, counted at every operator, so they are exact and repeatable on every
    device. Counting slows a step down, so only some steps are counted: the first two, which `Latency` drops as warm-up;
    a batch with more elements than all before it; and a step after the set of trainable parameters or the optimizer
    state has changed. The largest batch of a run is therefore always counted. A batch with less than half of the usual
    gradients does not count as the largest. The kinds below are those at the peak, and add up to it.

    - `memory/live_peak_mib`, `memory/live_mean_mib`: the peak, and the mean over the operators.
    - `memory/weights_mib`, `memory/gradients_mib`, `memory/optimizer_mib`, `memory/activations_mib` (what autograd
      saves for the backward pass), `memory/rest_mib`.

    Args:
        live: Also count live bytes.
        timeline: Write `memory-timeline.csv` and its plot `memory-timeline.svg` into the run directory: live bytes by
            kind after every operator of the counted step with the highest peak. The plot needs matplotlib.

    Attributes:
        summary: The largest value of each peak so far, the latest `memory/mean_mib`, and the live bytes of the counted
            step with the highest peak.

    Raises:
        UserError: if `timeline` is set without `live`, or matplotlib is missing.
    """

    def __init__(self, live: bool = True, timeline: bool = False) -> None:
        if timeline and not live:
            raise UserError("Memory: timeline=true plots live bytes, which live=false does not count. Set live=true.")
        if timeline and find_spec("matplotlib") is None:
            raise UserError("Memory: timeline=true needs matplotlib: pip install 'lit-spu[report]'.")
        self.live = live
        self.timeline = timeline
        self.summary: dict[str, float] = {}
        self._peak: ResidentPeak | AcceleratorPeak | None = None
        self._live_bytes: LiveBytes | None = None  # while a step is counted
        self._timeline_source: LiveBytes | None = None  # the counted step with the highest peak
        self._first_step = self._num_batches = self._num_peaks = 0
        self._batch_numel = self._max_batch_numel = self._grad_numel = self._max_grad_numel = 0
        self._parameters: list[nn.Parameter] = []  # listed once: a module has to look for them
        self._num_trainable = self._num_optimizer_states = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose the measurement that the device supports."""
        device = trainer.strategy.root_device
        try:
            self._peak = ResidentPeak() if device.type == "cpu" else AcceleratorPeak(device)
        except RuntimeError as error:
            rank_zero_info(f"Memory: {error}; only live bytes are measured.")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._first_step = trainer.global_step
        self._num_batches = self._num_peaks = self._max_batch_numel = self._max_grad_numel = 0
        self._parameters = [*pl_module.parameters()]

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._stop_counting()  # Lightning calls no on_train_batch_end for a batch that the module skipped
        if self._peak:
            self._peak.reset()
        if self.live and self._must_count(trainer, batch):
            self._grad_numel = 0
            self._live_bytes = LiveBytes(pl_module, trainer.optimizers).__enter__()

    def _must_count(self, trainer: Trainer, batch: Any) -> bool:
        """Record the size of the batch and what trains in it; return whether to count its live bytes."""
        self._batch_numel = sum(leaf.numel() for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))
        num_trainable = sum(parameter.requires_grad for parameter in self._parameters)
        num_optimizer_states = sum(len(optimizer.state) for optimizer in trainer.optimizers)
        has_changed = (num_trainable, num_optimizer_states) != (self._num_trainable, self._num_optimizer_states)
        self._num_trainable, self._num_optimizer_states = num_trainable, num_optimizer_states
        is_first = trainer.global_step - self._first_step < LIVE_STEPS and self._num_batches < LIVE_BATCHES
        return is_first or has_changed or self._batch_numel > self._max_batch_numel

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        figures = self._read_peak()
        if has_replayed(pl_module):  # a replay allocates nothing: its activations lie in the graph's memory
            figures.pop("memory/peak_mib", None)
        self._update_summary(figures)
        if (peak := figures.get("memory/peak_mib")) is not None:
            mean = self.summary.get("memory/mean_mib", 0.0)
            self._num_peaks += 1
            mean += (peak - mean) / self._num_peaks
            self.summary["memory/mean_mib"] = figures["memory/mean_mib"] = mean
        self._num_batches += 1
        if counted := self._stop_counting():
            self._max_grad_numel = max(self._grad_numel, self._max_grad_numel)
            if self._grad_numel >= self._max_grad_numel / 2:
                self._max_batch_numel = max(self._batch_numel, self._max_batch_numel)
            live = {
                "memory/live_peak_mib": counted.peak_bytes / MIB,
                "memory/live_mean_mib": counted.mean_bytes / MIB,
                **{f"memory/{kind.name.lower()}_mib": counted.by_kind[kind] / MIB for kind in reversed(Kind)},
            }
            if live["memory/live_peak_mib"] > self.summary.get("memory/live_peak_mib", 0.0):
                self.summary |= live  # all figures of one step, because the kinds add up to its peak
                self._timeline_source = counted if self.timeline else None
            log_now(trainer, live)  # log_dict would log these again in the following steps
        if figures and is_step_logged(trainer):
            log_figures(pl_module, figures)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self._live_bytes:
            self._live_bytes.mark("backward")

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._live_bytes:  # here, because the optimizer step of a method frees the gradients
            self._grad_numel = sum(p.numel() for p in self._parameters if p.grad is not None)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._live_bytes:
            self._live_bytes.mark("optimizer")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = run_directory(trainer)
        if self._timeline_source and trainer.is_global_zero:
            _write_timeline(self._timeline_source, folder)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._peak:
            self._peak.reset()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if figures := self._read_peak():
            figures = {"memory/inference_peak_mib": figures["memory/peak_mib"]}
            self._update_summary(figures)
            log_now(trainer, figures)

    on_test_epoch_start = on_predict_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_predict_epoch_end = on_validation_epoch_end

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._stop_counting()
        if isinstance(self._peak, ResidentPeak):
            self._peak.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "exception")

    def _stop_counting(self) -> LiveBytes | None:
        """Stop counting live bytes, and return the counts; None if nothing was being counted."""
        counted, self._live_bytes = self._live_bytes, None
        if counted:
            counted.__exit__(None, None, None)
        return counted

    def _read_peak(self) -> dict[str, float]:
        if isinstance(self._peak, ResidentPeak):
            return {"memory/peak_mib": self._peak.peak_bytes() / MIB}
        if isinstance(self._peak, AcceleratorPeak):
            allocated, reserved = self._peak.peak_bytes()
            return {"memory/peak_mib": allocated / MIB, "memory/reserved_mib": reserved / MIB}
        return {}

    def _update_summary(self, figures: dict[str, float]) -> None:
        """Raise the figures in the summary to these, where these are larger."""
        for name, value in figures.items():
            self.summary[name] = max(value, self.summary.get(name, 0.0))


def _write_timeline(live_bytes: LiveBytes, folder: Path) -> None:
    """Write the live bytes after each operator as CSV, and a plot of them."""
    import csv

    from matplotlib.figure import Figure

    kinds = sorted(live_bytes.timeline, reverse=True)
    with (folder / "memory-timeline.csv").open("w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["operator", "phase", *(f"{kind.name.lower()}_bytes" for kind in kinds)])
        phase = "forward"
        for number, sizes in enumerate(zip(*(live_bytes.timeline[kind] for kind in kinds), strict=True)):
            phase = live_bytes.marks.get(number, phase)
            writer.writerow([number, phase, *sizes])
    figure = Figure(figsize=(9, 4), layout="constrained")
    axis = figure.subplots()
    heights = [[nbytes / MIB for nbytes in live_bytes.timeline[kind]] for kind in kinds]
    axis.stackplot(range(len(heights[0])), heights, labels=[kind.name.lower() for kind in kinds], step="post")
    for number, name in live_bytes.marks.items():
        axis.axvline(number, color="0.4", lw=0.8)
        axis.annotate(name, (number, 1), xycoords=("data", "axes fraction"), rotation=90, va="top", fontsize=8)
    axis.set_xlabel("operators of a training step")
    axis.set_ylabel("MiB of live tensors")
    axis.margins(x=0)
    axis.legend(loc="lower right", fontsize=8)
    figure.savefig(folder / "memory-timeline.svg")
