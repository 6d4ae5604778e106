"""Every config runs unchanged, on both embedded backbones, from the command line."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_spu.__main__ import main

FOLDER = Path(__file__).parents[1] / "configs"
CONFIGS = [*sorted(FOLDER.glob("*.yaml")), *sorted(FOLDER.glob("grids/*.yaml"))]
METHODS = [path for path in CONFIGS if "class_path" in yaml.safe_load(path.read_text()).get("model", {})]
OVERLAYS = [path for path in CONFIGS if path not in METHODS]

pytestmark = [
    # the tiny runs of these tests are shorter than any sensible logging interval
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:Before training, accuracy"),  # a ladder that MeZO trains from random weights
]


def test_there_are_configs() -> None:
    assert len(METHODS) >= 5


@pytest.mark.parametrize("config", CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_short(config: Path) -> None:
    lines = [line for line in config.read_text().splitlines() if line and not line.startswith("#")]
    assert len(lines) <= 15


@pytest.mark.parametrize("backbone", ["mini-bert", pytest.param("mini-t5", marks=pytest.mark.slow)])
@pytest.mark.parametrize("config", METHODS, ids=lambda path: path.stem)
def test_config_on_backbone(tmp_path: Path, config: Path, backbone: str) -> None:
    run = tmp_path / "run"
    small = ["--data.limit_train=64", "--data.limit_validation=50", "--trainer.max_epochs=1"]
    places = [f"--data.cache={tmp_path}", f"--run_dir={run}"]
    main(["fit", f"--config={config}", f"--model.backbone={backbone}", *places, *small])
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "completed"
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    logged = {name: float(value) for row in rows for name, value in row.items() if value}
    assert 0 <= logged["val/accuracy"] <= 1
    assert math.isfinite(logged["val/loss"])
    assert (run / "config.yaml").is_file()
    assert list(run.glob("**/*.ckpt"))


COMBINATIONS = [
    ["precision=bf16-mixed", "gradient_clip_val=1", "accumulate_grad_batches=2"],
    ["precision=bf16-mixed"],
    ["precision=bf16-true", "gradient_clip_val=1"],
    ["precision=bf16-true", "accumulate_grad_batches=2"],
    ["precision=16-mixed", "gradient_clip_val=1"],
    ["precision=16-true"],
    ["precision=64-true"],
    ["gradient_clip_val=0.5", "gradient_clip_algorithm=value", "accumulate_grad_batches=3"],
]


FAST = [
    ("kladder", COMBINATIONS[0]),
    ("lst_paper", COMBINATIONS[1]),
    ("mezo", COMBINATIONS[0]),
    ("mezo", COMBINATIONS[1]),
]


def combinations() -> list[Any]:
    """Return every config and combination on two families, most of them as slow tests."""
    cases = []
    for config in METHODS:
        for family, used in (("bert", COMBINATIONS), ("t5", COMBINATIONS[::2])):
            for combination in used:
                marks = [] if family == "bert" and (config.stem, combination) in FAST else [pytest.mark.slow]
                name = "-".join([config.stem, family, *combination])
                cases.append(pytest.param(config, family, combination, marks=marks, id=name))
    return cases


@pytest.mark.filterwarnings(
    "ignore:Precision .* is not supported by the model summary",
    "ignore:.*AMP with fp16 is not supported on CPU",  # Lightning says that it takes bf16-mixed
)
@pytest.mark.parametrize(("config", "family", "combination"), combinations())
def test_precision_clipping_and_accumulation(
    tiny: Callable[[str], str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    config: Path,
    family: str,
    combination: list[str],
) -> None:
    """Each combination runs, or is refused in a line or two before a model is loaded."""
    run = tmp_path / "run"
    small = ["--data.limit_train=32", "--data.limit_validation=16", "--data.batch_size=8", "--trainer.max_epochs=1"]
    places = [f"--model.backbone={tiny(family)}", f"--data.cache={tmp_path}", f"--run_dir={run}"]
    flags = [f"--trainer.{flag}" for flag in combination]
    code: Any = 0
    try:
        main(["fit", f"--config={config}", "--trainer.callbacks=null", *places, *small, *flags])
    except SystemExit as stop:
        code = stop.code
    if code:
        lines = capsys.readouterr().err.strip().splitlines()
        assert code == 2
        assert lines[-1].startswith("error: ")
        is_overflow = "precision=16-true" in combination and "not finite" in lines[-1]
        assert is_overflow or lines[-1].startswith("error: trainer."), (
            "refused by Lightning, after the model was loaded"
        )
        assert is_overflow or not run.exists()
        return
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "completed"
    assert math.isfinite(summary["metrics"]["val/loss"])


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.stem)
@pytest.mark.parametrize("config", METHODS, ids=lambda path: path.stem)
def test_an_overlay_applies_to_every_config(config: Path, overlay: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", f"--config={config}", f"--config={overlay}", "--print_config"])
    assert stop.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    ours, laid = yaml.safe_load(config.read_text()), yaml.safe_load(overlay.read_text())
    assert printed["model"]["class_path"].endswith(ours["model"]["class_path"].rpartition(".")[2])
    assert printed["model"]["init_args"]["backbone"] == laid["model"]["init_args"]["backbone"]
    assert printed["data"]["source"] == laid["data"]["source"]
