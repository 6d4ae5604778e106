"""Settings that would be ignored, or changed by a callback, are refused before a model is loaded."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from lit_spu.__main__ import main
from lit_spu.callbacks.zero_shot_report import ZeroShotReport
from lit_spu.cli import fit

pytestmark = [
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:Before training, accuracy"),
    pytest.mark.filterwarnings("ignore:This run is resumed with"),
]


@pytest.fixture
def small(tiny: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Flags of a short run in an empty working directory, whose cache lies elsewhere."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    data = ["--data.batch_size=8", "--data.limit_train=32", "--data.limit_validation=16"]
    return [f"--model.backbone={tiny('bert')}", f"--data.cache={tmp_path}/cache", *data, "--run_dir=run"]


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        ("fit --trainer.default_root_dir=X", ["--trainer.default_root_dir=X", "--run_dir"]),
        ("predict --trainer.default_root_dir=X", ["--trainer.default_root_dir=X", "--run_dir"]),
        ("fit --trainer.overfit_batches=1", ["--trainer.overfit_batches", "--data.limit_train"]),
        ("fit --trainer.use_distributed_sampler=false", ["--trainer.use_distributed_sampler"]),
        ("fit --trainer.model_registry=a", ["--trainer.model_registry", "--ckpt_path"]),
        ("validate --trainer.enable_checkpointing=true", ["--trainer.enable_checkpointing", "validate"]),
        ("fit --weights_only=false", ["--weights_only"]),
        ("test --weights_only=null", ["--weights_only"]),
        ("predict --return_predictions=true", ["--return_predictions", "--output"]),
        ("fit --data.text=a", ["--data.text=a", "predict"]),
        ("test --data.text=a", ["--data.text=a", "predict"]),
        ("predict --data.text=a --run_dir=b", ["--run_dir=b", "--output"]),
        ("fit --trainer.callbacks+=LearningRateFinder", ["LearningRateFinder", "--model.lr"]),
        ("fit --trainer.callbacks=BatchSizeFinder", ["BatchSizeFinder", "--data.batch_size"]),
        (
            'fit --trainer.callbacks+=GradientAccumulationScheduler --trainer.callbacks.scheduling={"1":2}',
            ["GradientAccumulationScheduler", "--trainer.accumulate_grad_batches"],
        ),
        (
            "fit --trainer.callbacks+=StochasticWeightAveraging --trainer.callbacks.swa_lrs=0.1",
            ["StochasticWeightAveraging", "leave it out"],
        ),
        ("fit --trainer.callbacks+=TrajectoryRecorder", ["TrajectoryRecorder", "MeZO", "leave it out"]),
        ("fit --trainer.callbacks+=RankCheck", ["RankCheck", "MeZO", "leave it out"]),
        ("fit --trainer.callbacks+=EMAWeightAveraging", ["EMAWeightAveraging", "leave it out"]),
        ("fit --trainer.callbacks+=BackboneFinetuning", ["BackboneFinetuning", "GradualFreezing"]),
        (
            "fit --trainer.callbacks+=ModelPruning --trainer.callbacks.pruning_fn=l1_unstructured",
            ["ModelPruning", "leave it out"],
        ),
    ],
)
def test_what_would_be_ignored_is_refused(
    args: str,
    parts: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def load(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a model is loaded")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lit_spu.methods.base.load_backbone", load)
    subcommand, *given = args.split()
    with pytest.raises(SystemExit) as stop:
        main([subcommand, "--model=HeadOnly", *given])
    assert stop.value.code == 2
    (line,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    for text in parts:
        assert text in line
    assert list(tmp_path.iterdir()) == []


def test_every_flag_that_the_command_line_sets_itself_is_known() -> None:
    """Whoever lets the command line replace another flag of the Trainer decides here what a given value means."""
    source = inspect.getsource(fit)
    replaced = {name for name in inspect.signature(Trainer.__init__).parameters if f'settings["{name}"]' in source}
    replaced |= {name for name in inspect.signature(Trainer.__init__).parameters if f'"{name}":' in source}
    # the given callbacks, loggers and plugins are kept, beside those of the run
    assert replaced - {"callbacks", "logger", "plugins"} == {"default_root_dir", "enable_checkpointing"}


def test_a_trial_leaves_nothing(small: list[str]) -> None:
    for model in ("HeadOnly", "MeZOBitFit"):
        main(["fit", f"--model={model}", *small, "--trainer.fast_dev_run=true"])
        assert list(Path.cwd().iterdir()) == []


@pytest.mark.parametrize(("steps", "accumulate"), [(2, 1), (6, 1), (4, 1), (1, 2)])
def test_a_run_that_ends_within_an_epoch_is_validated_once(steps: int, accumulate: int, small: list[str]) -> None:
    given = [f"--trainer.max_steps={steps}", f"--trainer.accumulate_grad_batches={accumulate}"]
    main(["fit", "--model=HeadOnly", *small, *given])
    summary = json.loads(Path("run/summary.json").read_text())
    assert summary["steps"] == steps
    assert summary["best_score"] is not None
    best, last = (torch.load(f"run/checkpoints/{name}.ckpt", weights_only=True) for name in ("best", "last"))
    assert last["global_step"] == steps
    assert best["global_step"] in (steps, steps // 4 * 4)
    rows = Path("run/metrics.csv").read_text().splitlines()
    column = rows[0].split(",").index("val/accuracy")
    assert sum(bool(row.split(",")[column]) for row in rows[1:]) == -(-steps * accumulate // 4)


def test_the_table_of_parameters_can_be_left_out(small: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(["fit", "--model=HeadOnly", *small, "--trainer.max_steps=1", "--trainer.enable_model_summary=false"])
    assert "trainable" not in capsys.readouterr().out.partition("fit completed")[0]


def test_the_score_before_training_is_kept_when_a_run_is_resumed(
    small: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    scores: list[float | None] = []
    original = ZeroShotReport.on_train_start

    def record(self: ZeroShotReport, trainer: Trainer, pl_module: LightningModule) -> None:
        scores.append(self.score)
        original(self, trainer, pl_module)

    monkeypatch.setattr(ZeroShotReport, "on_train_start", record)
    reports: list[str] = []
    monkeypatch.setattr(ZeroShotReport, "_report", lambda self, metric, score: reports.append(metric))
    mezo = ["--model=MeZO", "--model.lr=0.05", "--trainer.num_sanity_val_steps=-1", "--trainer.callbacks=null"]
    main(["fit", *mezo, *small, "--trainer.max_epochs=1"])
    first = json.loads(Path("run/summary.json").read_text())["metrics"]
    main(["fit", "--ckpt_path=run", "--trainer.max_epochs=3"])
    second = json.loads(Path("run/summary.json").read_text())["metrics"]
    assert second["zero_shot/accuracy"] == first["zero_shot/accuracy"]
    assert scores[0] == scores[1]
    assert reports == ["accuracy"]


@pytest.mark.parametrize("setting", ["lr", "rank"])
def test_a_number_beyond_all_floats_is_refused(setting: str, capsys: pytest.CaptureFixture[str]) -> None:
    config = f"--config={Path(__file__).parents[1]}/configs/lora.yaml"
    with pytest.raises(SystemExit) as exit_:
        main(["fit", config, f"--model.init_args.{setting}=1{'0' * 400}"])
    error = capsys.readouterr().err
    assert exit_.value.code == 2
    assert setting in error
    assert "is too large" in error or "is not allowed" in error
