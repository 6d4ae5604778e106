"""Loggers of a user's own: the run directory is whole whatever they are, and they get the same metrics."""

from __future__ import annotations

import csv
from importlib.util import find_spec
from pathlib import Path

import pytest
import yaml
from lightning.pytorch.loggers import TensorBoardLogger

from lit_spu.__main__ import main
from lit_spu.cli.launch import HeldLogger
from tests.test_configs import FOLDER, METHODS

pytestmark = [
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:Before training, accuracy"),
]

LOGGERS = {
    "csv": ["--trainer.logger=CSVLogger", "--trainer.logger.save_dir=mine"],
    "tensorboard": ["--trainer.logger=TensorBoardLogger", "--trainer.logger.save_dir=mine"],
    "two": ["--config=two.yaml"],
    "none": ["--trainer.logger=false"],
}
TWO = [
    {"class_path": "TensorBoardLogger", "init_args": {"save_dir": "mine"}},
    {"class_path": "CSVLogger", "init_args": {"save_dir": "mine", "name": "second"}},
]
FAST = {"head": ["tensorboard", "none"], "kladder": ["two"], "mezo": ["csv"]}
CASES = [
    pytest.param(config, logger, id=f"{config.stem}-{logger}", marks=[] if logger in fast else pytest.mark.slow)
    for config in METHODS
    for fast in [FAST.get(config.stem, [])]
    for logger in LOGGERS
    if logger in fast or (logger == "two" and not fast)
]


@pytest.mark.parametrize(("config", "logger"), CASES)
def test_the_run_directory_is_whole_whatever_the_logger(
    config: Path, logger: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("two.yaml").write_text(yaml.safe_dump({"trainer": {"logger": TWO}}))
    small = ["--data.limit_train=16", "--data.limit_validation=8", "--data.batch_size=8", "--trainer.max_epochs=1"]
    main(["fit", f"--config={config}", *small, "--run_dir=run", *LOGGERS[logger]])
    names = {path.name for path in Path("run").iterdir()}
    assert names >= {"checkpoints", "config.yaml", "launches.jsonl", "summary.json"}
    assert not set(Path("mine").glob("**/*.json")) | set(Path("mine").glob("**/*.mezo"))
    assert {path.name for path in Path("run/checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert {path.name for path in Path.cwd().iterdir()} - {"mine", "two.yaml"} == {"run"}
    tables = sorted(path for path in Path.cwd().glob("**/metrics.csv"))
    assert len(tables) == {"csv": 2, "tensorboard": 1, "two": 2, "none": 0}[logger]
    scores = {_score(file) for file in tables}
    assert len(scores) == (logger != "none")  # each logger has the same
    assert bool(list(Path("mine").glob("**/events.out*"))) is (logger in ("tensorboard", "two"))
    main(["validate", "--ckpt_path=run", "--run_dir=again"])  # the printed directory is a run
    assert not scores or {_score(Path("again/metrics.csv"))} == scores


def _score(file: Path) -> float:
    with file.open() as opened:
        return float(next(row["val/accuracy"] for row in csv.DictReader(opened) if row.get("val/accuracy")))


@pytest.mark.parametrize("logger", ["WandbLogger", "CometLogger", "MLFlowLogger"])
def test_a_logger_without_its_library_is_one_line(
    logger: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    library = {"WandbLogger": "wandb", "CometLogger": "comet-ml", "MLFlowLogger": "mlflow"}[logger]
    monkeypatch.chdir(tmp_path)
    if find_spec(library.replace("-", "_")):
        pytest.skip(f"{library} is installed")
    with pytest.raises(SystemExit) as stop:
        main(["fit", f"--config={FOLDER}/head.yaml", f"--trainer.logger={logger}"])
    assert stop.value.code == 2
    (error,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error"))
    assert logger in error
    assert "pip install" in error
    assert library in error
    assert list(tmp_path.iterdir()) == []


def test_a_held_logger_holds_back_the_calls_of_its_experiment(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, "", "")
    held = HeldLogger(logger)
    held.log_metrics({"a": 1.0}, 0)
    assert not list(tmp_path.iterdir())
    assert held.log_dir == logger.log_dir
    held.experiment.add_text("note", "before the first step")
    held.experiment.file_writer.flush()
    assert not list(tmp_path.iterdir())
    held.release()
    (file,) = tmp_path.iterdir()
    assert b"before the first step" in file.read_bytes()
    with pytest.raises(AttributeError, match="absent"):
        _ = held.absent
