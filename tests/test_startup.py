"""Entry points: what runs without importing torch, and the quick help, which agrees with the real parser."""

from __future__ import annotations

import inspect
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from lit_spu import __version__
from lit_spu.__main__ import main
from lit_spu.cli.subcommands import COMMANDS, RUNS

CHECKOUT = Path(__file__).parents[1]
ENTRY_POINTS = (["cli.py"], ["-m", "lit_spu"])
HEAVY = ("torch", "lightning", "transformers", "jsonargparse", "datasets")


def heavy_imports(statement: str) -> list[str]:
    """Return the heavy packages that a new interpreter has imported after `statement`."""
    code = f"import sys\n{statement}\nprint(*(name for name in {HEAVY} if name in sys.modules), file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=CHECKOUT)
    return done.stderr.split()


@pytest.mark.parametrize(
    "statement",
    [
        "import lit_spu",
        "import lit_spu; lit_spu.__version__; hasattr(lit_spu, 'nothing')",
        "from lit_spu import errors, public, registry",
        "from lit_spu.__main__ import main; main([])",
        "from lit_spu.__main__ import main; main(['--help'])",
        "from lit_spu.__main__ import main; main(['--version'])",
    ],
)
def test_nothing_heavy_is_imported(statement: str) -> None:
    assert heavy_imports(statement) == []


def test_heavy_imports_are_detected() -> None:
    assert "torch" in heavy_imports("import torch")


def test_the_quick_help_lists_the_real_subcommands(capsys: pytest.CaptureFixture[str]) -> None:
    from lit_spu.cli.fit import SpuCLI

    assert set(SpuCLI.subcommands()) == set(RUNS)
    main(["--help"])
    text = capsys.readouterr().out
    for name, description in (RUNS | COMMANDS).items():
        assert f"  {name}" in text
        assert description in text
        with pytest.raises(SystemExit):
            main([name, "--help"])
        assert description in " ".join(capsys.readouterr().out.split())


def test_the_help_of_fit_lists_every_method(capsys: pytest.CaptureFixture[str]) -> None:
    from lit_spu import registry
    from lit_spu.methods.base import Method

    with pytest.raises(SystemExit):
        main(["fit", "--help"])
    text = "".join(capsys.readouterr().out.split())
    methods = [cls for cls in registry.classes("lit_spu.methods") if issubclass(cls, Method)]
    assert len(methods) > 1
    for cls in methods:
        assert inspect.isabstract(cls) or cls.__name__ in text


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--version"])
    assert capsys.readouterr().out == f"lit-spu {__version__}\n"
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["project"]
    assert project["version"] == __version__
    assert project["scripts"]["lit-spu"] == "lit_spu.__main__:main"


@pytest.mark.parametrize("entry_point", ENTRY_POINTS, ids=" ".join)
def test_entry_points_are_the_same(entry_point: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, *entry_point, "--version"], capture_output=True, text=True, check=True, cwd=CHECKOUT
    )
    assert done.stdout == f"lit-spu {__version__}\n"
