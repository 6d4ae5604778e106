"""The scripts in examples/ and the README's Python lines run as they are."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# scripts run as a user runs them, so that Lightning's advice is no error
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.slow
def test_sentiment_script_predicts_new_sentences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("sentiment", ROOT / "examples" / "sentiment.py")
    assert spec
    assert spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.main(str(tmp_path)) == ["positive", "negative"]
    assert _printed_accuracy(r"validation accuracy: (\S+)", capsys) > 0.9


@pytest.mark.slow
def test_readme_python_prints_its_accuracy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (ROOT / "README.md").read_text()
    (lines,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (promised,) = re.findall(r"prints `accuracy (\S+),", text)
    monkeypatch.chdir(tmp_path)
    exec(lines, {})
    # the last digits depend on the machine
    assert _printed_accuracy(r"accuracy (\S+),", capsys) == pytest.approx(float(promised), abs=0.02)
    assert Path("lora.ckpt").exists()


def test_readme_is_short_and_its_links_exist() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130
    for page in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md"):
        for target in re.findall(r"\]\(([^)#]+)", (ROOT / page).read_text()):
            assert target.startswith("https://") or (ROOT / target).exists(), f"{page}: {target}"


def _printed_accuracy(pattern: str, capsys: pytest.CaptureFixture[str]) -> float:
    (found,) = re.findall(pattern, capsys.readouterr().out)
    return float(found)
