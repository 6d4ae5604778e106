"""The scripts in examples/ run as they are."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.filterwarnings("ignore")  # a script is run as a user runs it: Lightning's advice is no error
def test_sentiment_script_predicts_new_sentences(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("sentiment", EXAMPLES / "sentiment.py")
    assert spec
    assert spec.loader
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    assert script.main(str(tmp_path)) == ["positive", "negative"]
    accuracy = float(capsys.readouterr().out.rpartition("validation accuracy: ")[2].split()[0])
    assert accuracy > 0.9
