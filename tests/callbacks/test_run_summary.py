"""summary.json, compared with the trainer and the other callbacks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor

from lit_spu.callbacks.latency import Latency
from lit_spu.callbacks.memory import Memory
from lit_spu.callbacks.model_summary import TrainableParameters
from lit_spu.callbacks.run_summary import RunSummary
from tests.callbacks.conftest import QUIET, MakeTrainer, Tiny

pytestmark = QUIET


def read(folder: Path) -> dict[str, Any]:
    record: dict[str, Any] = json.loads((folder / "run/0/summary.json").read_text())
    return record


def test_summary_has_the_results_of_fit(
    make_trainer: MakeTrainer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    memory, latency, parameters = Memory(), Latency(warmup=1), TrainableParameters()
    best = ModelCheckpoint(tmp_path / "checkpoints", monitor="val/accuracy", mode="max")
    trainer = make_trainer(RunSummary(), memory, latency, parameters, best, enable_checkpointing=True, max_epochs=2)
    trainer.fit(Tiny())
    record = read(tmp_path)
    assert record["measured"] == memory.summary | latency.summary | parameters.summary
    assert record["measured"]["params/trainable"] == 8 * 2 + 2
    assert record["metrics"]["val/accuracy"] == trainer.callback_metrics["val/accuracy"].item()
    assert (record["best_checkpoint"], record["monitor"]) == (best.best_model_path, "val/accuracy")
    assert best.best_model_score is not None
    assert record["best_score"] == best.best_model_score.item()
    assert (record["status"], record["command"], record["steps"], record["epochs"]) == ("completed", "fit", 16, 2)
    assert record["wall_seconds"] > 16 * record["measured"]["latency/step_ms"] / 1000
    assert record["versions"]["torch"] == torch.__version__.split("+")[0] or record["versions"]["torch"]
    printed = capsys.readouterr().out
    assert str(tmp_path / "run" / "0") in printed
    for name in ("val/accuracy", "memory/peak_mib", "latency/step_ms"):
        assert name in printed


@pytest.mark.filterwarnings("ignore:Experiment logs directory")
def test_test_adds_its_results_to_those_of_fit(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    module = Tiny()
    make_trainer(RunSummary(), TrainableParameters()).fit(module)
    fit = read(tmp_path)
    make_trainer(RunSummary(), Latency(warmup=0)).test(module, verbose=False)
    both = read(tmp_path)
    assert set(both["metrics"]) == {*fit["metrics"], "test/accuracy"}
    assert set(both["measured"]) == {*fit["measured"], "latency/inference_ms", "latency/inference_p95_ms"}
    assert both | {"metrics": fit["metrics"], "measured": fit["measured"]} == fit


def test_validate_alone_writes_a_summary(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    (metrics,) = make_trainer(RunSummary()).validate(Tiny(), verbose=False)
    record = read(tmp_path)
    assert record["metrics"] == metrics
    assert record["command"] == "validate"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (KeyboardInterrupt(), "interrupted"),
        (SIGTERMException(), "interrupted"),
        (RuntimeError("out of luck"), "failed"),
    ],
    ids=repr,
)
def test_summary_has_the_status_of_an_unfinished_run(
    error: BaseException, status: str, make_trainer: MakeTrainer, tmp_path: Path
) -> None:
    class Failing(Tiny):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            if batch_idx == 5:
                raise error
            return super().training_step(batch, batch_idx)

    latency = Latency(warmup=1)
    with pytest.raises((SystemExit, RuntimeError)):
        make_trainer(RunSummary(), latency).fit(Failing())
    record = read(tmp_path)
    assert (record["status"], record["steps"]) == (status, 5)
    assert record["measured"] == latency.summary
    assert latency.summary["latency/step_ms"] > 0
    assert record.get("error") == ("RuntimeError: out of luck" if status == "failed" else None)


def test_undefined_numbers_are_null(make_trainer: MakeTrainer, tmp_path: Path) -> None:
    class Undefined(Tiny):
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.log("val/accuracy", torch.nan, batch_size=4)

    make_trainer(RunSummary()).fit(Undefined())
    assert read(tmp_path)["metrics"]["val/accuracy"] is None
