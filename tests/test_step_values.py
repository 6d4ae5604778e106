"""Values of training steps: the same rows as if every step logged, at the operators of a bare step."""

from __future__ import annotations

import csv
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader

from lit_spu.callbacks.finish_validation import FinishValidation
from lit_spu.callbacks.gradual_freezing import GradualFreezing
from lit_spu.callbacks.latency import Latency
from lit_spu.callbacks.memory import Memory
from lit_spu.callbacks.model_summary import TrainableParameters
from lit_spu.callbacks.policies import Random
from lit_spu.callbacks.progress import MetricProgressBar
from lit_spu.callbacks.selective_update import SelectiveUpdate
from lit_spu.measure import Launches
from lit_spu.methods.finite import FiniteLosses
from tests.conftest import encode
from tests.runs import fit, made

pytestmark = pytest.mark.filterwarnings("ignore")

Tiny = Callable[[str], str]
TIMES = ("latency/", "memory/peak", "memory/mean", "memory/inference")
NAMES = [f"lit_spu.{module}.is_step_logged" for module in ("methods.finite", "callbacks.latency", "callbacks.memory")]


class Stop(Callback):
    """Stops the run after a batch, which Lightning then logs."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        trainer.should_stop |= args[-1] == 1


CASES: dict[str, tuple[str, list[Callback], dict[str, Any]]] = {
    "full": ("full", [], {"max_epochs": 2}),
    "stopped": ("full", [Stop()], {}),
    "max_steps": ("full", [FinishValidation()], {"max_steps": 2}),
    "never": ("full", [], {"log_every_n_steps": 0}),
    "accumulated": ("lora", [], {"max_epochs": 2, "accumulate_grad_batches": 2, "log_every_n_steps": 1}),
    "kladder": ("kladder", [], {"max_epochs": 2}),
    "mezo": ("mezo", [], {"max_epochs": 2}),
    "mezo_lst": ("mezo_lst", [], {"max_epochs": 2}),
    "distillation": ("lr_distillation", [], {"max_epochs": 2, "skip_below": 0.01}),
    "frozen": ("full", [GradualFreezing()], {"max_epochs": 2}),
    "selective": ("full", [SelectiveUpdate(Random(rate=0.5))], {"max_epochs": 2}),
}
FAST = ("stopped", "max_steps")


def read_rows(folder: Path) -> list[dict[str, str | bool]]:
    """Return the rows that a run logs. Of a time only whether it is there."""
    rows = csv.DictReader((folder / "run/0/metrics.csv").read_text().splitlines())
    return [{name: bool(value) if name.startswith(TIMES) else value for name, value in row.items()} for row in rows]


@pytest.mark.parametrize(
    "case", [case if case in FAST else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_rows_are_those_of_logging_every_step(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    config, callbacks, settings = CASES[case]
    skip_below = {"skip_below": settings["skip_below"]} if "skip_below" in settings else {}
    settings = {"log_every_n_steps": 3, **{name: value for name, value in settings.items() if name not in skip_below}}
    rows, values = [], []
    for is_oracle in (False, True):
        if is_oracle:
            for name in NAMES:
                monkeypatch.setattr(name, lambda trainer: True)
        folder = tmp_path / str(is_oracle)
        trainer = fit(
            made(config, tiny("bert"), **skip_below),
            tmp_path,
            *(*callbacks, Memory(live=False), Latency(warmup=1)),  # the figures come too late for a stop after them
            **{"max_epochs": 1, "logger": CSVLogger(folder, name="run", version="0"), **settings},
        )
        rows.append(read_rows(folder))
        values.append({n: float(v) for n, v in trainer.callback_metrics.items() if not n.startswith(TIMES)})
    assert rows[0] == rows[1]
    assert values[0] == values[1]
    assert "lr" in values[0]


def test_a_callback_that_monitors_the_loss_reads_that_of_each_step(tiny: Tiny, tmp_path: Path) -> None:
    losses = list[float]()

    class Best(ModelCheckpoint):
        def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
            losses.append(float(trainer.callback_metrics["train/loss"]))

    best = Best(tmp_path, monitor="train/loss")
    fit(made("head", tiny("bert")), tmp_path, best, max_epochs=1, enable_checkpointing=True, log_every_n_steps=50)
    assert len(set(losses)) == 4


def test_checkpoints_are_named_by_the_values_of_their_steps(tiny: Tiny, tmp_path: Path) -> None:
    losses = list[float]()

    class Record(Callback):
        def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
            losses.append(float(outputs["loss"]))

    named = ModelCheckpoint(
        tmp_path, "{step}-{train/loss:.4f}", every_n_train_steps=3, save_top_k=-1, auto_insert_metric_name=False
    )
    settings: dict[str, Any] = {"max_epochs": 2, "enable_checkpointing": True, "log_every_n_steps": 5}
    fit(made("head", tiny("bert")), tmp_path, Record(), named, **settings)
    assert {path.stem for path in tmp_path.glob("*.ckpt")} == {f"{step}-{losses[step - 1]:.4f}" for step in (3, 6)}


class Bare(LightningModule):
    """A method as a plain module, without its hooks and without values to log."""

    def __init__(self, method: Any) -> None:
        super().__init__()
        self.method = method

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self.method.loss(batch)
        return loss

    def configure_optimizers(self) -> Any:
        self.method.trainer = self.trainer
        return self.method.configure_optimizers()


class Count(Callback):
    """Counts all that runs from the beginning of each training batch to that of the next."""

    def __init__(self) -> None:
        self.counts: list[Launches] = []

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        self.stop()
        self.counts.append(Launches(trainer.optimizers).__enter__())

    def stop(self) -> None:
        if self.counts:
            self.counts[-1].__exit__(None, None, None)

    def on_train_epoch_end(self, *args: Any) -> None:
        self.stop()


@pytest.mark.parametrize("config", ["lora", pytest.param("lst", marks=pytest.mark.slow)])
def test_a_step_between_two_logged_steps_launches_no_more_than_a_bare_one(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, config: str
) -> None:
    monkeypatch.setattr("lit_spu.callbacks.progress.INTERVAL", math.inf)  # drawing reads only what is on the host
    # as on an accelerator; a CPU reads each loss at once
    monkeypatch.setattr(FiniteLosses, "watch_loss", lambda self, loss: self._loss_watch.add(loss, 1, []))
    defaults: list[Callback] = [Memory(), Latency(), TrainableParameters(), MetricProgressBar(), FinishValidation()]
    runs = []
    for is_bare in (False, True):
        method: Any = made(config, tiny("bert"))
        module = Bare(method) if is_bare else method
        count = Count()
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=1,
            log_every_n_steps=4,
            callbacks=[count] if is_bare else [count, *defaults],
            logger=[] if is_bare else CSVLogger(tmp_path),
            enable_progress_bar=not is_bare,
            enable_model_summary=not is_bare,
            enable_checkpointing=False,
        )
        # equal batches, of which Memory counts the first two alone
        trainer.fit(module, DataLoader(cast(Any, [encode(method.backbone)] * 8), batch_size=None))
        runs.append(count.counts)
    ours, bare = runs[0][5], runs[1][5]
    assert ours.by_operator == bare.by_operator
    assert ours.own_waits == 0
    assert ours.waits.total() == bare.waits.total() + 1  # Lightning reads the last logged loss, a tensor on the host
    assert not ours.host_copies
    logged = runs[0][3]
    assert logged.own_waits <= 1
