"""The target: that it can be built, and what it takes from the code."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("mkdocs", reason="the docs extra is not installed")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def hooks() -> ModuleType:
    spec = importlib.util.spec_from_file_location("hooks", ROOT / "docs" / "hooks.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_setting_of_every_method_is_explained(hooks: ModuleType) -> None:
    for name, cls in hooks.METHODS.items():
        rows = hooks.settings(cls).splitlines()[2:]
        assert len(rows) > 5
        for row in rows:
            assert row.rstrip(" |").count("|") == 3, f"{name}: {row}"
        assert len({row.split("|")[1] for row in rows}) == len(rows)


def test_a_methods_own_default_is_shown(hooks: ModuleType) -> None:
    assert "| `gradient_checkpointing` | `True` |" in hooks.settings(hooks.METHODS["side_lora"])
    assert "| `gradient_checkpointing` | `False` |" in hooks.settings(hooks.METHODS["full"])


@pytest.mark.slow
def test_the_site_is_built(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--target-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "share_projections" in (tmp_path / "methods" / "kladder" / "index.html").read_text()
