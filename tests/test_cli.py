"""The command line, in-process: settings, errors, the run directory, checkpoints and predictions."""

from __future__ import annotations

import csv
import io
import json
import logging
import shlex
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EarlyStopping

import lit_spu
from lit_spu.__main__ import main
from lit_spu.callbacks.finish_validation import FinishValidation
from lit_spu.callbacks.predictions import Predictions
from lit_spu.checkpoints import run_dir
from lit_spu.cli.fit import _without_repeats
from lit_spu.data.glue import GLUE
from lit_spu.errors import UserError
from lit_spu.tasks import TASKS
from tests.runs import refusal

CHECKOUT = Path(__file__).parents[1]
CONFIGS = CHECKOUT / "configs"

pytestmark = [
    # the tiny runs of these tests are shorter than any sensible logging interval
    pytest.mark.filterwarnings("ignore:The number of training batches"),
]


class Interrupt(Callback):
    """Ctrl-C after a number of steps: after the last, within the next, or in the second batch of validation."""

    def __init__(self, steps: int, where: Literal["after", "within", "validation"] = "after") -> None:
        self.steps = steps
        self.where = where

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Any) -> None:
        self._stop(trainer, self.where == "within")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._stop(trainer, self.where == "after")

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._stop(trainer, self.where == "validation" and batch_idx == 1)

    def _stop(self, trainer: Trainer, here: bool) -> None:
        if here and trainer.global_step == self.steps and Interrupt.armed:
            Interrupt.armed = False  # the resumed run has this callback too
            raise KeyboardInterrupt

    armed = False


class Peak(Callback):
    """Makes the second of three epochs the best: it predicts the majority label, the others the minority label."""

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        backbone: Any = pl_module.backbone
        labels = [row["label"] for row in data.examples("validation")]
        majority = max(set(labels), key=labels.count)
        answer = majority if trainer.current_epoch == 1 else 1 - majority
        backbone.predict = lambda scores: (torch.full((len(scores),), answer), scores)


@pytest.fixture(scope="module")
def small(tiny: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of a short run: 96 examples, a tiny random backbone."""
    return [
        f"--model.backbone={tiny('bert')}",
        f"--data.cache={tmp_path_factory.mktemp('cache')}",
        "--data.batch_size=16",
        "--data.limit_train=96",
        "--data.limit_validation=40",
        "--data.limit_test=30",
    ]


@pytest.fixture(scope="module")
def run(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished run of two epochs. Its parent was the working directory."""
    folder = tmp_path_factory.mktemp("work")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        main(
            [
                "fit",
                "--model=LadderSideTuning",
                "--model.reduction=2",
                "--model.lr=0.02",
                "--trainer.max_epochs=2",
                "--seed_everything=7",
                "--run_dir={task}-{method}-{seed}",
                *small,
            ]
        )
    return folder / "sst2-LadderSideTuning-7"


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def printed_config(args: list[str], capsys: pytest.CaptureFixture[str]) -> Any:
    """Return the settings that `--print_config` prints."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main([*args, "--print_config"])
    assert exit_.value.code == 0
    return yaml.safe_load(capsys.readouterr().out)


def metrics(run: Path, name: str, file_name: str = "metrics.csv") -> list[float]:
    with (run / file_name).open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


def load(file: Path) -> Any:
    return torch.load(file, weights_only=True)


# -- settings ----------------------------------------------------------------------------------------------------------


def test_later_configs_win_and_flags_win_over_them(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "mine.yaml").write_text("model: {init_args: {lr: 0.5, k: 2}}\ntrainer: {max_epochs: 9}\n")
    given = ["fit", f"--config={CONFIGS}/kladder.yaml", "--config=mine.yaml", "--trainer.max_epochs=4"]
    config = printed_config(given, capsys)
    assert config["model"]["init_args"]["k"] == 2
    assert config["model"]["init_args"]["lr"] == 0.5
    assert config["trainer"]["max_epochs"] == 4
    assert config["seed_everything"] == 42
    assert config["data"]["source"] == "sample"
    flags_first = ["fit", "--trainer.max_epochs=4", "-c", f"{CONFIGS}/kladder.yaml", "--config=mine.yaml"]
    assert printed_config(flags_first, capsys) == config
    (work / "part.yaml").write_text("model: {init_args: {rank: 2}}\n")
    for given in (["--model=LoRA"], ["--model.class_path", "LoRA"]):
        assert printed_config(["fit", *given, "-cpart.yaml"], capsys)["model"]["init_args"]["rank"] == 2


@pytest.mark.slow
def test_glue_yaml_sets_real_data_for_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    for file in sorted(CONFIGS.glob("*.yaml")):
        method = yaml.safe_load(file.read_text())["model"].get("class_path")
        if method is None:
            continue
        config = printed_config(["fit", f"--config={file}", f"--config={CONFIGS}/glue.yaml"], capsys)
        assert config["model"]["class_path"].rpartition(".")[2] == method.rpartition(".")[2]
        assert config["model"]["init_args"]["backbone"] == "distilbert-base-uncased"
        assert config["data"]["source"] == "hub"


def test_a_methods_help_shows_its_own_settings_and_those_of_all(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["fit", "--model.help", "LadderSideTuning"])
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    assert "--model.reduction REDUCTION" in text
    assert "--model.backbone BACKBONE" in text
    assert "side network" in text  # from the docstring


def test_the_model_gets_the_task_of_the_data(run: Path) -> None:
    hyper_parameters = load(run / "checkpoints" / "best.ckpt")["hyper_parameters"]
    assert hyper_parameters["task"] == "sst2"
    assert hyper_parameters["reduction"] == 2


@pytest.mark.parametrize(
    "given",
    [
        ["--model.task=rte"],
        ["--model.init_args.task", "rte"],
        ["--model.task=sst2", "--data.task=rte"],
        ["--config=conflict.yaml"],
        ["--config=default.yaml", "--data.task=rte"],
    ],
)
def test_a_second_task_is_refused(given: list[str], work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (work / "conflict.yaml").write_text("model: {init_args: {task: rte}}\n")
    (work / "default.yaml").write_text("model: {init_args: {task: sst2}}\n")
    message = refusal(["fit", "--model=FullFineTuning", *given], capsys)
    assert "--model.task" in message
    assert "--data.task" in message
    assert set(work.iterdir()) == {work / "conflict.yaml", work / "default.yaml"}


def test_the_same_task_given_twice_is_accepted(capsys: pytest.CaptureFixture[str]) -> None:
    given = ["fit", "--model=FullFineTuning", "--model.task=rte", "--data.task=rte"]
    assert printed_config(given, capsys)["data"]["task"] == "rte"


# -- errors ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        ("ft", ["'ft'", "Did you mean fit?", "predict"]),
        ("fit", ["--model", "KLadder", "HeadOnly"]),
        ("fit --model Kladdr", ["--model", "'Kladdr'", "Did you mean KLadder?", "HeadOnly"]),
        ("fit --model lit_spu.methods.lader.KLadder", ["--model", "lader", "Did you mean KLadder?"]),
        ("fit --config method.yaml", ["model", "method.yaml", "'Kladdr'", "Did you mean KLadder?"]),
        ("fit --config setting.yaml", ["redution", "setting.yaml", "Did you mean reduction?"]),
        ("fit --config trainer.yaml", ["trainer.max_epoch", "trainer.yaml", "--trainer.max_epochs"]),
        ("fit --config broken.yaml", ["broken.yaml", "line 2"]),
        ("fit --config absent.yaml", ["--config", "absent.yaml", "does not exist"]),
        ("fit --model.k 2 --model KLadder", ["--model: its .k is set before", "first"]),
        (
            "fit --model KLadder --trainer.callbacks+=Latency --trainer.callbacks.live=false",
            ["not a setting", "of Memory"],
        ),
        ("fit --model KLadder --model.kk 2", ["--model.kk", "Did you mean k?"]),
        ("fit --model KLadder --model.k two", ["--model.k", "a whole number", "'two'"]),
        ("fit --model KLadder --model.head clasifier", ["--model.head", "'clasifier'", "classifier", "prompt"]),
        ("fit --modl KLadder", ["--modl", "Did you mean --model?"]),
        ("fit --model KLadder --modell.reduction 3", ["--modell.reduction", "Did you mean --model.reduction?"]),
        ("fit --model KLadder --model.lr=-1", ["--model.lr: -1.0", "Give a number from"]),
        ("fit --model KLadder --data.num_workers=-1", ["--data.num_workers: -1", "from 0 to"]),
        ("fit --model KLadder --trainer.callbacks+=Memry", ["--trainer.callbacks:", "Did you mean Memory?"]),
        ("fit --model KLadder --trainer.max_epoch 3", ["--trainer.max_epoch ", "Did you mean --trainer.max_epochs?"]),
        ("fit --model KLadder --trainer.max_epochs many", ["--trainer.max_epochs", "int", "'many'"]),
        ("fit --model KLadder --trainer.callbacks Memry", ["--trainer.callbacks", "'Memry'", "Did you mean Memory?"]),
        ("fit --model KLadder --trainer.precision 17", ["--trainer.precision", "'17'", "bf16-mixed"]),
        ("fit --model KLadder --data.task sst", ["data.task", "'sst'", "Did you mean sst5?", "rte"]),
        ("fit --model KLadder --model.backbone mini-brt", ["mini-brt"]),
        ("fit --model KLadder surplus", ["'surplus'"]),
        ("fit --model.help Kladdr", ["--model.help", "Did you mean KLadder?"]),
        ("fit --config empty.yaml", ["--config: empty.yaml", "no settings", "nothing"]),
        ("fit --config latin.yaml", ["latin.yaml", "UTF-8", "byte 8"]),
        ("fit --config list.yaml", ["--config: list.yaml", "no settings", "- a"]),
        ("fit --model KLadder --config number.yaml", ["data (in number.yaml): 5", "a mapping"]),
        ("fit --model KLadder --config null.yaml", ["data (in null.yaml): null", "a mapping"]),
        ("fit --model KLadder --config sections.yaml --trainer.max_steps=1", ["trainer (in sections.yaml): [1]"]),
        ("fit --model KLadder --trainer.logger CSVLogger", ["--trainer.logger.save_dir", "CSVLogger"]),
        ("fit --model KLadder --trainer.callbacks+=EarlyStopping", ["--trainer.callbacks.monitor", "EarlyStopping"]),
        (
            "fit --model KLadder --trainer.callbacks+=EarlyStopping --trainer.callbacks.monitor=lr"
            " --trainer.callbacks.mode=up",
            ["--trainer: EarlyStopping", "min, max, got up"],
        ),
        ("test --ckpt_path absent", ["--ckpt_path", "absent"]),
        ("test --ckpt_path broken.yaml", ["--ckpt_path", "broken.yaml"]),
    ],
)
def test_errors_are_explained_in_two_lines(
    args: str, parts: list[str], work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (work / "method.yaml").write_text("model: {class_path: Kladdr}\n")
    (work / "setting.yaml").write_text("model: {class_path: LadderSideTuning, init_args: {redution: 4}}\n")
    (work / "trainer.yaml").write_text("trainer: {max_epoch: 4}\n")
    (work / "broken.yaml").write_text("model: [\n")
    (work / "empty.yaml").touch()
    (work / "latin.yaml").write_bytes("model: Mé\n".encode("latin-1"))
    (work / "list.yaml").write_text("- a\n")
    (work / "number.yaml").write_text("data: 5\n")
    (work / "null.yaml").write_text("data: null\n")
    (work / "sections.yaml").write_text("trainer: [1]\n")
    before = set(work.iterdir())
    message = refusal(args.split(), capsys)
    for text in parts:
        assert text in message
    allowed = message.partition("Allowed: ")[2].rstrip(".").split(", ")
    assert len(allowed) == len(set(allowed))
    assert set(work.iterdir()) == before


def test_errors_of_the_trainer_are_explained_too(
    small: list[str], work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal(["fit", "--model=HeadOnly", "--trainer.strategy=dpp", *small], capsys)
    assert "--trainer" in message
    assert "dpp" in message
    assert list(work.iterdir()) == []


def test_texts_longer_than_the_backbone_allows_are_refused(
    small: list[str], work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal(["fit", "--model=HeadOnly", "--data.max_length=137", "--run_dir=run", *small], capsys)
    assert "data.max_length=137" in message
    assert "--data.max_length=136" in message


def test_debug_shows_the_traceback(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIT_SPU_DEBUG", "1")
    with pytest.raises(UserError, match="no checkpoint"):
        main(["test", "--ckpt_path=absent"])


def test_a_callback_of_every_run_may_be_given_again() -> None:
    kinds = [FinishValidation(), EarlyStopping("a"), EarlyStopping("b"), FinishValidation()]
    assert _without_repeats(kinds) == kinds[1:]


@pytest.mark.parametrize("placeholder", ["{tsk}", "{}", "{task"])
def test_a_wrong_placeholder_is_named(placeholder: str) -> None:
    with pytest.raises(UserError, match="--run_dir"):
        run_dir.new_run_dir(f"runs/{placeholder}", task="sst2", method="KLadder", seed=1)


def test_a_run_directory_is_never_used_twice(tmp_path: Path) -> None:
    names: dict[str, Any] = {"task": "rte", "method": "KLadder", "seed": 3}
    pattern = str(tmp_path / "{task}/{method}/{seed}/{time}")
    first = run_dir.new_run_dir(pattern, **names)
    assert first.parent == tmp_path / "rte" / "KLadder" / "3"
    assert run_dir.new_run_dir(pattern, **names) != first
    (first / "checkpoints").mkdir(parents=True)
    (first / "checkpoints" / "last.ckpt").touch()
    with pytest.raises(UserError, match="already holds a run"):
        run_dir.check_unused(first)


# -- the run directory -------------------------------------------------------------------------------------------------


def test_a_run_writes_only_into_its_directory(run: Path) -> None:
    assert list(run.parent.iterdir()) == [run]
    assert {path.name for path in run.iterdir()} == {
        "checkpoints",
        "config.yaml",
        "hparams.yaml",
        "launches.jsonl",
        "metrics.csv",
        "summary.json",
        "tensorboard",
    }
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert list((run / "tensorboard").glob("events.out.tfevents.*"))


def test_a_run_directory_records_settings_versions_and_command(run: Path) -> None:
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["model"]["init_args"]["lr"] == 0.02
    assert config["seed_everything"] == 7
    (launch,) = map(json.loads, (run / "launches.jsonl").read_text().splitlines())
    assert shlex.split(launch["command"])[:3] == ["lit-spu", "fit", "--model=LadderSideTuning"]
    assert launch["torch"] == torch.__version__
    head = subprocess.run(
        ["git", "-C", str(CHECKOUT), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
    )
    assert (launch["git"] or "").removesuffix("-dirty") == head.stdout.strip()


def test_the_name_of_a_run_directory_is_printed_as_it_is(
    small: list[str], work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["fit", "--model=HeadOnly", "--trainer.max_steps=2", "--run_dir=a[/b]c :smile:", *small])
    assert "Run directory: a[/b]c :smile:\n" in capsys.readouterr().out
    assert (work / "a[/b]c :smile:" / "summary.json").is_file()


def test_best_and_last_checkpoint(small: list[str], work: Path) -> None:
    peak = "--trainer.callbacks+=tests.test_cli.Peak"
    main(["fit", "--model=HeadOnly", "--trainer.max_epochs=3", "--run_dir=run", *small, peak])
    low, high, low_again = metrics(work / "run", "val/accuracy")
    assert low == low_again < 0.5 < high
    best, last = (load(work / "run" / "checkpoints" / f"{name}.ckpt") for name in ("best", "last"))
    assert (best["epoch"], best["global_step"]) == (1, 12)
    assert (last["epoch"], last["global_step"]) == (2, 18)


def test_the_same_config_repeats_the_run_bitwise(run: Path, work: Path) -> None:
    main(["fit", f"--config={run}/config.yaml", "--run_dir=again"])
    first, again = (load(folder / "checkpoints" / "last.ckpt")["state_dict"] for folder in (run, work / "again"))
    assert first.keys() == again.keys()
    for name, weight in first.items():
        torch.testing.assert_close(again[name], weight, rtol=0, atol=0)


def test_a_run_prints_no_advertisements(small: list[str], work: Path, capfd: pytest.CaptureFixture[str]) -> None:
    main(["validate", "--model=FullFineTuning", "--run_dir=run", *small])
    text = "".join(capfd.readouterr())
    for noise in ("Tip", "litlogger", "TPU", "deprecated", "does not have many workers"):
        assert noise not in text
    assert "No --ckpt_path" in text


@pytest.mark.filterwarnings("error:Found .* in eval mode")  # the command line itself must hide it
@pytest.mark.filterwarnings("error:.*LeafSpec.* is deprecated")
def test_a_run_restores_the_filters_of_warnings_and_logs(small: list[str], work: Path) -> None:
    log = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    before, log_before = list(warnings.filters), list(log.filters)
    main(["fit", "--model=HeadOnly", "--trainer.max_steps=2", "--run_dir=run", *small])
    main(["validate", "--ckpt_path=run", "--run_dir=validated"])
    assert list(warnings.filters) == before
    assert log.filters == log_before


# -- checkpoints -------------------------------------------------------------------------------------------------------


def test_a_checkpoint_alone_is_enough_to_evaluate(run: Path, work: Path) -> None:
    for number, path in enumerate((run, run / "checkpoints" / "best.ckpt")):
        main(["validate", f"--ckpt_path={path}", f"--run_dir={number}"])
        assert metrics(work / str(number), "val/accuracy") == [max(metrics(run, "val/accuracy"))]


def test_flags_override_a_checkpoint_and_are_reported(
    run: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["validate", f"--ckpt_path={run}", "--model.lr=0.5", "--data.limit_validation=8", "--run_dir=run"])
    config = yaml.safe_load((work / "run" / "config.yaml").read_text())
    assert config["model"]["init_args"]["lr"] == 0.5
    assert config["model"]["init_args"]["reduction"] == 2
    assert config["data"]["limit_validation"] == 8
    assert "--model.lr=0.5 (checkpoint: 0.02)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["validate", "--model.reduction=4"], ["--model.reduction=4 (checkpoint: 2)"]),
        (["fit", "--model.lr=0.5", "--model.warmup=0"], ["--model.lr=0.5 (checkpoint: 0.02)", "--model.warmup=0"]),
        (["fit", "--data.task=rte"], ["--data.task=rte (checkpoint: sst2)"]),
        (["fit", "--model=HeadOnly"], ["HeadOnly", "LadderSideTuning"]),
    ],
)
def test_settings_that_contradict_a_checkpoint_are_refused(
    args: list[str], parts: list[str], run: Path, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refusal([*args, f"--ckpt_path={run}", "--run_dir=run"], capsys)
    for text in parts:
        assert text in message


def run_interrupted(args: list[str]) -> None:
    """Run a command line that its `Interrupt` stops."""
    Interrupt.armed = True
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as exit_:
        main(args)
    signal.signal(signal.SIGINT, handler)  # Lightning ignores all that come after the first
    assert exit_.value.code == 130


@pytest.fixture(scope="module")
def resumed(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run like `run` that was interrupted after 8 of 12 steps and then continued."""
    folder = tmp_path_factory.mktemp("resumed") / "run"
    given = ["--model=LadderSideTuning", "--model.reduction=2", "--model.lr=0.02", "--seed_everything=7"]
    stop = ["--trainer.callbacks+=tests.test_cli.Interrupt", "--trainer.callbacks.steps=8"]
    run_interrupted(["fit", *given, "--trainer.max_epochs=2", f"--run_dir={folder}", *small, *stop])
    assert load(folder / "checkpoints" / "last.ckpt")["global_step"] == 8
    assert json.loads((folder / "summary.json").read_text())["status"] == "interrupted"
    main(["fit", f"--ckpt_path={folder}"])
    return folder


def test_a_resumed_run_continues_in_its_directory(resumed: Path) -> None:
    assert list(resumed.parent.iterdir()) == [resumed]
    assert load(resumed / "checkpoints" / "last.ckpt")["global_step"] == 12
    assert len((resumed / "launches.jsonl").read_text().splitlines()) == 2
    assert len(metrics(resumed, "val/accuracy", "metrics.1.csv")) == 1  # of the first epoch, before the interruption
    assert len(metrics(resumed, "val/accuracy")) == 1
    assert json.loads((resumed / "summary.json").read_text())["status"] == "completed"


def test_a_resumed_run_ends_as_if_never_interrupted(run: Path, resumed: Path) -> None:
    ours, straight = (load(folder / "checkpoints" / "last.ckpt")["state_dict"] for folder in (resumed, run))
    for name, weight in straight.items():
        torch.testing.assert_close(ours[name], weight, rtol=0, atol=0)


@pytest.mark.parametrize("stop", [["steps=5"], ["steps=5", "where=within"], ["steps=6", "where=validation"]], ids=str)
def test_dropout_and_an_unfinished_validation_survive_an_interruption(
    stop: list[str], small: list[str], work: Path
) -> None:
    given = ["--model=FullFineTuning", *small, "--model.backbone=mini-bert", "--trainer.max_epochs=2"]
    main(["fit", *given, "--run_dir=straight"])
    halt = ["--trainer.callbacks+=tests.test_cli.Interrupt", *(f"--trainer.callbacks.{setting}" for setting in stop)]
    run_interrupted(["fit", *given, "--run_dir=halted", *halt])
    main(["fit", "--ckpt_path=halted"])
    for name in ("best", "last"):
        straight, halted = (load(work / run / "checkpoints" / f"{name}.ckpt") for run in ("straight", "halted"))
        for weight, value in straight["state_dict"].items():
            torch.testing.assert_close(halted["state_dict"][weight], value, rtol=0, atol=0)
    scores = [json.loads((work / run / "summary.json").read_text())["metrics"] for run in ("straight", "halted")]
    assert scores[0]["val/loss"] == scores[1]["val/loss"]
    validated = []
    for name in ("straight", "halted"):
        with (work / name / "metrics.csv").open() as file:
            validated.append([row["step"] for row in csv.DictReader(file) if row.get("val/loss")])
    assert validated[0][-1] == validated[1][-1]  # a step that is repeated counts once


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # the best checkpoint so far is in the other run
@pytest.mark.filterwarnings("ignore:This run is resumed with 18 steps")
def test_a_checkpoint_file_starts_a_new_run_directory(run: Path, work: Path) -> None:
    before = load(run / "checkpoints" / "last.ckpt")["global_step"]
    main(["fit", f"--ckpt_path={run}/checkpoints/last.ckpt", "--trainer.max_epochs=3", "--run_dir=longer"])
    assert load(work / "longer" / "checkpoints" / "last.ckpt")["global_step"] == 18
    assert load(run / "checkpoints" / "last.ckpt")["global_step"] == before


def test_a_callback_that_is_given_again_replaces_the_default(small: list[str], work: Path) -> None:
    again = ["--trainer.callbacks+=Memory", "--trainer.callbacks.live=false", "--trainer.max_steps=2"]
    main(["fit", "--model=HeadOnly", *small, *again, "--run_dir=run"])
    measured = json.loads((work / "run" / "summary.json").read_text())["measured"]
    assert "memory/peak_mib" in measured
    assert "memory/live_peak_mib" not in measured


def test_tensorboard_has_the_settings_and_the_score(run: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from tensorboard.plugins.hparams import plugin_data_pb2

    found: dict[str, Any] = {}
    scalars: dict[str, float] = {}
    for file in (run / "tensorboard").glob("events*"):
        events = EventAccumulator(str(file)).Reload()
        scalars |= {tag: events.Scalars(tag)[-1].value for tag in events.Tags()["scalars"]}
        for content in events.summary_metadata.values():
            if content.plugin_data.plugin_name == "hparams":
                data = plugin_data_pb2.HParamsPluginData.FromString(content.plugin_data.content)
                found |= dict(data.session_start_info.hparams.items())
    assert found["method"].string_value == "LadderSideTuning"
    assert found["reduction"].number_value == 2
    summary = json.loads((run / "summary.json").read_text())
    assert scalars["final/score"] == pytest.approx(summary["best_score"])
    assert scalars["final/params/trainable"] == summary["measured"]["params/trainable"]


# -- predictions -------------------------------------------------------------------------------------------------------


def test_predictions_equal_those_of_the_loaded_method(run: Path, work: Path) -> None:
    main(["predict", f"--ckpt_path={run}", "--run_dir=run"])
    method = lit_spu.load(run)
    data = GLUE(batch_size=1, limit_test=30, cache=str(work / "cache"))
    data.encoding = method.encoding
    data.setup("predict")
    (loader,) = data.predict_dataloader()
    expected: dict[int, list[float]] = {}
    with torch.no_grad():
        for batch in loader:
            expected[int(batch["index"])] = method(batch).softmax(-1)[0].tolist()
    rows = [json.loads(line) for line in (work / "run" / "predictions.jsonl").read_text().splitlines()]
    assert [row["index"] for row in rows] == list(range(30)) == sorted(expected)
    for row, example in zip(rows, data.examples("predict"), strict=True):
        assert row["sentence"] == example["sentence"]
        assert list(row["scores"]) == ["negative", "positive"]
        assert list(row["scores"].values()) == pytest.approx(expected[row["index"]], abs=1e-5)
        assert row["label"] == max(row["scores"], key=row["scores"].get)
    header, *lines = (work / "run" / "predictions.tsv").read_text().splitlines()
    assert header == "index\tprediction"
    assert lines == [f"{row['index']}\t{TASKS['sst2'].labels.index(row['label'])}" for row in rows]


def test_output_names_the_file(run: Path, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["predict", f"--ckpt_path={run}", "--run_dir=run", "--output=answers/mine.tsv"])
    assert len((work / "answers" / "mine.tsv").read_text().splitlines()) == 31
    assert not list((work / "run").glob("predictions*"))
    assert "'mine.csv'" in refusal(["predict", f"--ckpt_path={run}", "--run_dir=other", "--output=mine.csv"], capsys)


def test_given_sentences_are_predicted_without_writing_files(
    run: Path, work: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def answers(*args: str) -> list[str]:
        capsys.readouterr()
        main(["predict", f"--ckpt_path={run}", *args])
        return capsys.readouterr().out.splitlines()

    sentences = ["It was great .", "the film was not good", "a dull story"]
    single = [line for sentence in sentences for line in answers("--data.text", sentence)]
    monkeypatch.setattr("sys.stdin", io.StringIO("\n".join(sentences) + "\n"))
    assert answers("--data.text=-") == single
    for line in single:
        label, scores = line.split("\t")
        negative, positive = (float(score) for score in scores.split()[1::2])
        assert label == ("positive" if positive > negative else "negative")
        assert negative + positive == pytest.approx(1, abs=2e-4)
    assert list(work.iterdir()) == []


@pytest.mark.parametrize(
    ("task", "prediction", "line"),
    [
        ("sst2", 1, "1"),
        ("cola", 0, "0"),
        ("mrpc", 1, "1"),
        ("qqp", 0, "0"),
        ("wnli", 1, "1"),
        ("rte", 1, "not_entailment"),
        ("qnli", 0, "entailment"),
        ("mnli", 2, "contradiction"),
        ("stsb", 3.14159, "3.142"),
    ],
)
def test_the_tsv_file_has_the_labels_of_the_glue_server(
    task: str, prediction: float, line: str, tmp_path: Path
) -> None:
    description = TASKS[task]
    scores = [0.0] * description.num_logits
    row = dict.fromkeys(description.fields, "text")
    files = [tmp_path / "out.tsv", tmp_path / "out.jsonl"]
    Predictions(files)._write("", [row, row], {1: (prediction, scores)}, description)
    assert files[0].read_text() == f"index\tprediction\n1\t{line}\n"
    answer = json.loads(files[1].read_text())
    assert answer["index"] == 1
    if description.regression:
        assert answer["label"] == pytest.approx(prediction, abs=1e-3)
    else:
        assert answer["label"] == description.labels[int(prediction)]


def test_a_second_test_set_gets_its_own_files(tmp_path: Path) -> None:
    row = {"premise": "a", "hypothesis": "b"}
    Predictions([tmp_path / "out.tsv"])._write("mismatched", [row], {0: (1, [0.0, 1.0, 0.0])}, TASKS["mnli"])
    assert (tmp_path / "out.mismatched.tsv").read_text() == "index\tprediction\n0\tneutral\n"


@pytest.mark.xdist_group("two processes")  # two such tests at once may pick the same port
@pytest.mark.slow
def test_two_devices_share_a_directory_and_predict_each_row_once(run: Path, small: list[str], work: Path) -> None:
    command = [sys.executable, str(CHECKOUT / "cli.py")]
    devices = ["--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=ddp"]
    fit = ["fit", "--model=LadderSideTuning", "--model.reduction=2", "--trainer.max_epochs=1", *small]
    subprocess.run([*command, *fit, *devices], check=True, timeout=300)
    (directory,) = work.glob("runs/*/*/*/*")
    assert {path.name for path in (directory / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt"}
    assert len((directory / "launches.jsonl").read_text().splitlines()) == 1

    subprocess.run([*command, "predict", f"--ckpt_path={run}", "--run_dir=two", *devices], check=True, timeout=300)
    main(["predict", f"--ckpt_path={run}", "--run_dir=one"])
    one, two = (
        [json.loads(line) for line in (work / name / "predictions.jsonl").read_text().splitlines()]
        for name in ("one", "two")
    )
    assert [row["index"] for row in two] == list(range(30))
    for ours, theirs in zip(one, two, strict=True):
        assert theirs["label"] == ours["label"]
        assert theirs["scores"] == pytest.approx(ours["scores"], abs=1e-5)
