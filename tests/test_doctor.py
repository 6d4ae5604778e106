"""What the doctor finds where something is amiss."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from lit_spu.__main__ import main
from lit_spu.cli import doctor

DECLARED = [
    "torch>=2.8",
    "lightning>=2.6.1",
    "gone>=1",
    'matplotlib>=3.9; extra == "report"',
    'ruff>=0.8; extra == "test"',
]


def packages(monkeypatch: pytest.MonkeyPatch, **installed: str) -> dict[str, tuple[str, str]]:
    def version(name: str) -> str:
        if name not in installed:
            raise PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(doctor, "requires", lambda _: DECLARED)
    monkeypatch.setattr(doctor, "version", version)
    return {found.subject: (found.state, found.says) for found in doctor.packages()}


def test_missing_old_and_malicious_packages_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    found = packages(monkeypatch, torch="2.7.1", lightning="2.6.3")
    assert found["torch"][0] == "bad"
    assert "pip install 'torch>=2.8'" in found["torch"][1]
    assert found["lightning"][0] == "bad"
    assert "malicious" in found["lightning"][1]
    assert found["gone"] == ("bad", "missing: pip install 'gone>=1'")
    assert found["matplotlib"][0] == "note"
    assert "lit-spu[report]" in found["matplotlib"][1]
    assert "ruff" not in found


def test_what_is_right_is_ok(monkeypatch: pytest.MonkeyPatch) -> None:
    found = packages(monkeypatch, torch="2.13.0+cpu", lightning="2.6.6", gone="1.0", matplotlib="3.11")
    assert {state for state, _ in found.values()} == {"ok"}


def test_a_cache_that_cannot_be_written_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    (tokens, *_) = doctor.storage()
    assert tokens.state == "bad"
    assert "--data.cache" in tokens.says


def test_an_offline_hub_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (hub,) = doctor.network()
    assert hub.state == "note"
    assert "HF_HUB_OFFLINE" in hub.says


def test_an_unreachable_hub_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unreachable:
        def model_info(self, *args: object, **kwargs: object) -> None:
            raise OSError("no route")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", Unreachable)
    (hub,) = doctor.network()
    assert hub.state == "note"
    assert "no route" in hub.says


def test_the_report_ends_in_a_status(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: iter([doctor.Finding("torch", "ok", "2.13")]))
    main(["doctor"])
    assert "torch" in capsys.readouterr().out
    monkeypatch.setattr(doctor, "examine", lambda: iter([doctor.Finding("torch", "bad", "2.1")]))
    with pytest.raises(SystemExit) as exit_:
        main(["doctor"])
    assert exit_.value.code == 1
    assert "To mend: 1." in capsys.readouterr().out
