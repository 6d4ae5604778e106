"""Command lines and files at random: no traceback, no hang, short messages, nothing accepted out of range.

LIT_SPU_FUZZ multiplies the number of examples, LIT_SPU_FUZZ_SEED draws others:

    LIT_SPU_FUZZ=25 LIT_SPU_FUZZ_SEED=1 python -m pytest -m slow tests/fuzz
"""

from __future__ import annotations

import os
import shlex
import shutil
import tempfile
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

from lit_spu.cli.subcommands import COMMANDS
from tests.fuzz import files, lines
from tests.fuzz.harness import run_line

SCALE = int(os.environ.get("LIT_SPU_FUZZ", "1"))
SEED = int(os.environ.get("LIT_SPU_FUZZ_SEED", "0"))

KEPT = Path(tempfile.gettempdir(), "lit_spu_fuzz")
"""Folder of the damaged files that were not handled well."""

pytestmark = pytest.mark.slow

T = TypeVar("T", bound=Hashable)


def find_problems(strategy: SearchStrategy[T], check: Callable[[T], str], count: int) -> list[str]:
    """Check as many examples of a strategy, and return the problems of all of them."""
    problems: list[str] = []
    seen: set[T] = set()

    @seed(SEED)
    @settings(
        max_examples=count * SCALE,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def examine(example: T) -> None:
        if example in seen:
            return
        seen.add(example)
        if problem := check(example):
            problems.append(problem)
            print(problem)
        if len(seen) % 50 == 0:
            print(f"{len(seen)} examples, {len(problems)} problems", flush=True)

    examine()
    print(f"{len(seen)} examples, {len(problems)} problems")
    return problems


def test_command_lines(tmp_path: Path) -> None:
    def check(line: lines.Line) -> str:
        folder = tmp_path / "work"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        lines.make_folder(folder)
        problem = run_line(line, folder, steps=True).problem
        return problem and f"lit-spu {shlex.join(line)}\n    {problem}"

    assert not find_problems(lines.lines(), check, 60)


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fuzz") / "originals"
    files.make_originals(folder)
    return folder


@pytest.mark.parametrize("case", files.CASES)
def test_the_undamaged_files_are_accepted(case: str, originals: Path, tmp_path: Path) -> None:
    shutil.copytree(originals, tmp_path / "work")
    ended = run_line(with_limits(files.CASES[case].line), tmp_path / "work", steps=True)
    assert not ended.problem
    assert ended.code == 0, ended.errors


def test_files(originals: Path, tmp_path: Path) -> None:
    def check(damage: files.Damage) -> str:
        folder = tmp_path / "work"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(originals, folder)
        files.write_damage(damage, folder)
        line = files.CASES[damage.case].line
        problem = run_line(with_limits(line), folder, steps=True).problem
        if problem:
            kept = Path(
                os.environ.get("LIT_SPU_FUZZ_KEEP", tmp_path), f"{abs(hash(damage)):x}-{Path(damage.file).name}"
            )
            KEPT.mkdir(exist_ok=True)
            kept.write_bytes(damage.content if isinstance(damage.content, bytes) else b"")
            what = kept if isinstance(damage.content, bytes) else damage.content or "nothing"
            return f"lit-spu {shlex.join(line)}, with {what} as {damage.file}\n    {problem}"
        return ""

    assert not find_problems(files.damages(originals), check, 60)


def with_limits(line: tuple[str, ...]) -> tuple[str, ...]:
    """Return the line with the flags that shorten a run."""
    return line if line[0] in COMMANDS else (*line, *files.LIMITS)
