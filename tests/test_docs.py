"""The site builds, and takes the methods' settings from the code."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("mkdocs", reason="the docs extra is not installed: make docs installs it")

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
        rows = hooks.settings_table(cls).splitlines()[2:]
        assert len(rows) > 5
        for row in rows:
            assert row.rstrip(" |").count("|") == 3, f"{name}: {row}"
        assert len({row.split("|")[1] for row in rows}) == len(rows)


def test_settings_table_shows_a_methods_own_default(hooks: ModuleType) -> None:
    assert "| `gradient_checkpointing` | `True` |" in hooks.settings_table(hooks.METHODS["side_lora"])
    assert "| `gradient_checkpointing` | `False` |" in hooks.settings_table(hooks.METHODS["full"])


def test_every_method_has_a_card(hooks: ModuleType) -> None:
    cards = {card.stem for card in (ROOT / "docs" / "methods").glob("*.md")}
    assert cards == set(hooks.METHODS)


@pytest.mark.slow
def test_site_builds_without_broken_links(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "share_projections" in (tmp_path / "methods" / "kladder" / "index.html").read_text()
    assert "pareto.svg" in (tmp_path / "index.html").read_text()
