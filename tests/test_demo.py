"""The README's demo in its own process, on synthetic data and an embedded backbone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def fit(folder: Path, *args: str) -> dict[str, float]:
    """Run `fit` in an empty working directory and return the metrics of its summary."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "cli.py"), "fit", *args]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [path.name for path in folder.iterdir()] == ["runs"]
    (summary,) = folder.glob("runs/**/summary.json")
    for shown in (
        "val/accuracy",
        "memory/peak_mib",
        "latency/step_ms",
        f"Run directory: {summary.parent.relative_to(folder)}",
    ):
        assert shown in done.stdout
    metrics: dict[str, float] = json.loads(summary.read_text())["metrics"]
    return metrics


@pytest.mark.slow
def test_demo_command_of_the_makefile_learns(tmp_path: Path) -> None:
    (target,) = (line for line in (ROOT / "Makefile").read_text().splitlines() if "cli.py fit" in line)
    args = target.partition("cli.py fit ")[2].replace(" $(ARGS)", "").replace("configs/", f"{ROOT}/configs/").split()
    assert fit(tmp_path, *args)["val/accuracy"] > 0.75


@pytest.mark.slow
def test_sample_data_separates_full_fine_tuning_from_a_head(tmp_path: Path) -> None:
    scores = {}
    for name in ("full", "head"):
        (tmp_path / name).mkdir()
        scores[name] = fit(tmp_path / name, "--config", f"{ROOT}/configs/{name}.yaml")["val/accuracy"]
    assert scores["full"] >= 0.95
    assert scores["head"] < 0.85
