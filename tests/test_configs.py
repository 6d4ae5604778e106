"""Every config runs unchanged, on both embedded backbones, from the command line."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

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
