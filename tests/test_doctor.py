"""The findings of `lit-spu doctor`."""

from __future__ import annotations

import tomllib
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants
from packaging.requirements import Requirement
from packaging.version import Version

from lit_spu.__main__ import main
from lit_spu.cli import doctor

CHECKOUT = Path(__file__).parents[1]
DECLARED = [
    "torch>=2.8",
    "lightning>=2.6.1",
    "gone>=1",
    'matplotlib>=3.9; extra == "report"',
    'ruff>=0.8; extra == "test"',
    'torch==2.13.0; extra == "tested"',
]


def check_packages(monkeypatch: pytest.MonkeyPatch, **installed: str) -> dict[str, tuple[str, str]]:
    def version(name: str) -> str:
        if name not in installed:
            raise PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(doctor, "requires", lambda _: DECLARED)
    monkeypatch.setattr(doctor, "version", version)
    return {found.subject: (found.state, found.text) for found in doctor.check_packages()}


def test_missing_old_and_malicious_packages_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    found = check_packages(monkeypatch, torch="2.7.1", lightning="2.6.3")
    assert found["torch"][0] == "bad"
    assert "pip install 'torch>=2.8'" in found["torch"][1]
    assert found["lightning"][0] == "bad"
    assert "malicious" in found["lightning"][1]
    assert found["gone"] == ("bad", "missing: pip install 'gone>=1'")
    assert found["matplotlib"][0] == "note"
    assert "lit-spu[report]" in found["matplotlib"][1]
    assert "ruff" not in found


def test_right_versions_are_ok(monkeypatch: pytest.MonkeyPatch) -> None:
    found = check_packages(monkeypatch, torch="2.13.0+cpu", lightning="2.6.6", gone="1.0", matplotlib="3.11")
    assert {state for state, _ in found.values()} == {"ok"}
    assert found["torch"][1] == "2.13.0+cpu (tested: 2.13.0)"
    assert found["lightning"][1] == "2.6.6"


def test_tested_versions_are_those_of_the_constraints_and_end_the_allowed_range() -> None:
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    tested = dict(declaration.split("==") for declaration in project["optional-dependencies"]["tested"])
    assert set(tested) == {"jsonargparse", "lightning", "torch", "transformers"}
    lines = (CHECKOUT / "constraints.txt").read_text().splitlines()
    assert tested.items() <= dict(line.split("==") for line in lines if "==" in line).items()
    for requirement in map(Requirement, project["dependencies"]):
        if found := tested.get(requirement.name):
            major, minor, *_ = Version(found).release
            assert requirement.specifier.contains(found)
            assert f"<{major}.{minor + 1}" in str(requirement.specifier), requirement


def test_a_read_only_cache_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    (tokens, *_) = doctor.check_storage()
    assert tokens.state == "bad"
    assert "--data.cache" in tokens.text


def test_an_offline_hub_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    (hub,) = doctor.check_hub()
    assert hub.state == "note"
    assert "HF_HUB_OFFLINE" in hub.text


def test_an_unreachable_hub_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    class Unreachable:
        def model_info(self, *args: object, **kwargs: object) -> None:
            raise OSError("no route")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "HfApi", Unreachable)
    (hub,) = doctor.check_hub()
    assert hub.state == "note"
    assert "no route" in hub.text


def test_problems_are_counted_and_set_the_exit_status(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(doctor, "examine", lambda: iter([doctor.Finding("torch", "ok", "2.13")]))
    main(["doctor"])
    assert "torch" in capsys.readouterr().out
    monkeypatch.setattr(doctor, "examine", lambda: iter([doctor.Finding("torch", "bad", "2.1")]))
    with pytest.raises(SystemExit) as exit_:
        main(["doctor"])
    assert exit_.value.code == 1
    assert "1 problem found." in capsys.readouterr().out
