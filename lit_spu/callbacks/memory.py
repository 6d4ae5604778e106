"""The memory that training takes."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from torch.optim import Optimizer
from torch.utils._pytree import tree_leaves

from lit_spu.callbacks.loggers import log_now
from lit_spu.errors import UserError
from lit_spu.measure import MIB, AcceleratorPeak, Kind, LiveBytes, ResidentPeak

LIVE_STEPS = 2
"""Steps of which live bytes are always counted: the first makes the optimizer's state, the second starts with it."""

LIVE_BATCHES = 32
"""That ends after so many batches, should the steps not come."""


class Memory(Callback):
    """Measures the peak of every training step, in MiB (2**20 bytes), each rank its own.

    - `memory/peak_mib`: on an accelerator what tensors took; on a CPU the resident memory of the process, with the
      interpreter, imports and what malloc keeps: compare differences.
    - `memory/reserved_mib`: on an accelerator, what the allocator took from the device.
    - `memory/mean_mib`: the mean of the steps' peaks so far.
    - `memory/inference_peak_mib`: the peak over a validation, test or predict epoch.

    Live bytes are exact and repeatable on every device: tensors alone, counted at every operator. That slows a step
    down, so they are counted in the first two steps, which `Latency` drops as warm-up, whenever a batch has more
    numbers than all before it, and when other weights learn than in the step before or the optimizer knows of more:
    seldom, but the largest batch of a run is among them. A batch whose step left out most of the gradient is none of
    those before. The kinds are those of the largest moment and add up to it.

    - `memory/live_peak_mib`, `memory/live_mean_mib`: most at once, and the mean over the operators.
    - `memory/weights_mib`, `memory/gradients_mib`, `memory/optimizer_mib`, `memory/activations_mib` (what autograd
      saves for the backward pass), `memory/rest_mib`.

    Args:
        live: Count live bytes too.
        timeline: Write `memory-timeline.csv` and a picture of it, `memory-timeline.svg`, into the run directory: live
            bytes by kind after every operator of the largest step that was counted. The picture needs matplotlib.

    Attributes:
        summary: The largest of each figure so far; the mean of the means.
    """

    def __init__(self, live: bool = True, timeline: bool = False) -> None:
        if timeline and not live:
            raise UserError("Memory: timeline=true shows live bytes, which live=false leaves out.")
        if timeline and find_spec("matplotlib") is None:
            raise UserError("Memory: timeline=true needs matplotlib: pip install 'lit-spu[report]'.")
        self.live = live
        self.timeline = timeline
        self._shown: LiveBytes | None = None
        self.summary: dict[str, float] = {}
        self._gauge: ResidentPeak | AcceleratorPeak | None = None
        self._tracker: LiveBytes | None = None
        self._batches = self._first_step = self._numbers = self._largest = self._learnt = 0
        self._learning = 0, 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose what the device can tell."""
        device = trainer.strategy.root_device
        try:
            self._gauge = ResidentPeak() if device.type == "cpu" else AcceleratorPeak(device)
        except RuntimeError as error:
            rank_zero_info(f"Memory: {error}; only live bytes are measured.")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._batches, self._first_step, self._largest, self._learnt = 0, trainer.global_step, 0, 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._leave()  # a batch that the module skipped has no end
        if self._gauge:
            self._gauge.reset()
        if not self.live:
            return
        self._numbers = sum(leaf.numel() for leaf in tree_leaves(batch) if isinstance(leaf, Tensor))
        first = trainer.global_step - self._first_step < LIVE_STEPS and self._batches < LIVE_BATCHES
        known = sum(len(optimizer.state) for optimizer in trainer.optimizers)
        before, self._learning = self._learning, (sum(p.requires_grad for p in pl_module.parameters()), known)
        if first or self._numbers > self._largest or self._learning != before:
            self._tracker = LiveBytes(pl_module, trainer.optimizers).__enter__()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        figures = self._read()
        if figures:
            mean = self.summary.get("memory/mean_mib", 0.0)
            mean += (figures["memory/peak_mib"] - mean) / (self._batches + 1)
            self._note(figures)
            self.summary["memory/mean_mib"] = figures["memory/mean_mib"] = mean
        self._batches += 1
        if self.live:
            learnt = sum(p.numel() for p in pl_module.parameters() if p.grad is not None)
            self._learnt = max(learnt, self._learnt)
            if learnt >= self._learnt / 2:
                self._largest = max(self._numbers, self._largest)
        if tracker := self._leave():
            live = {
                "memory/live_peak_mib": tracker.peak_bytes / MIB,
                "memory/live_mean_mib": tracker.mean_bytes / MIB,
                **{f"memory/{kind.name.lower()}_mib": tracker.by_kind[kind] / MIB for kind in reversed(Kind)},
            }
            if live["memory/live_peak_mib"] > self.summary.get("memory/live_peak_mib", 0.0):
                self.summary |= live  # the kinds of one moment belong together
                self._shown = tracker if self.timeline else None
            log_now(trainer, live)  # Lightning would log these again at the steps that follow
        pl_module.log_dict(figures, on_step=True, on_epoch=False)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        if self._tracker:
            self._tracker.mark("backward")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self._tracker:
            self._tracker.mark("optimizer")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # asked for on every rank: Lightning broadcasts
        if self._shown and trainer.is_global_zero:
            _write_timeline(self._shown, folder)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self._gauge:
            self._gauge.reset()

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if figures := self._read():
            figures = {"memory/inference_peak_mib": figures["memory/peak_mib"]}
            self._note(figures)
            log_now(trainer, figures)

    on_test_epoch_start = on_predict_epoch_start = on_validation_epoch_start
    on_test_epoch_end = on_predict_epoch_end = on_validation_epoch_end

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._leave()
        if isinstance(self._gauge, ResidentPeak):
            self._gauge.close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "exception")

    def _leave(self) -> LiveBytes | None:
        """End the counting of live bytes, if it is going on."""
        tracker, self._tracker = self._tracker, None
        if tracker:
            tracker.__exit__(None, None, None)
        return tracker

    def _read(self) -> dict[str, float]:
        if isinstance(self._gauge, ResidentPeak):
            return {"memory/peak_mib": self._gauge.peak_bytes() / MIB}
        if isinstance(self._gauge, AcceleratorPeak):
            return {
                "memory/peak_mib": self._gauge.allocated_bytes() / MIB,
                "memory/reserved_mib": self._gauge.reserved_bytes() / MIB,
            }
        return {}

    def _note(self, figures: dict[str, float]) -> None:
        """Keep the largest of each in the summary."""
        self.summary |= {name: max(value, self.summary.get(name, 0.0)) for name, value in figures.items()}


def _write_timeline(live: LiveBytes, folder: Path) -> None:
    """The figures and their picture."""
    import csv

    from matplotlib.figure import Figure

    kinds = sorted(live.timeline, reverse=True)
    with (folder / "memory-timeline.csv").open("w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["operator", "phase", *(f"{kind.name.lower()}_bytes" for kind in kinds)])
        phase = "forward"
        for number, held in enumerate(zip(*(live.timeline[kind] for kind in kinds), strict=True)):
            phase = live.marks.get(number, phase)
            writer.writerow([number, phase, *held])
    figure = Figure(figsize=(9, 4), layout="constrained")
    axis = figure.subplots()
    heights = [[count / MIB for count in live.timeline[kind]] for kind in kinds]
    axis.stackplot(range(len(heights[0])), heights, labels=[kind.name.lower() for kind in kinds], step="post")
    for number, name in live.marks.items():
        axis.axvline(number, color="0.4", lw=0.8)
        axis.annotate(name, (number, 1), xycoords=("data", "axes fraction"), rotation=90, va="top", fontsize=8)
    axis.set_xlabel("operators of a training step")
    axis.set_ylabel("MiB of live tensors")
    axis.margins(x=0)
    axis.legend(loc="lower right", fontsize=8)
    figure.savefig(folder / "memory-timeline.svg")
