"""Command lines and files at random: no traceback, no hang, short messages, nothing accepted out of range.

LIT_SPU_FUZZ multiplies the number of examples, LIT_SPU_FUZZ_SEED draws others:

    LIT_SPU_FUZZ=25 LIT_SPU_FUZZ_SEED=1 python -m pytest -m slow tests/fuzz
"""

from __future__ import annotations

import os
import shlex
import shutil
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

from tests.fuzz import lines
from tests.fuzz.harness import run_line

SCALE = int(os.environ.get("LIT_SPU_FUZZ", "1"))
SEED = int(os.environ.get("LIT_SPU_FUZZ_SEED", "0"))

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
            print(problem, flush=True)

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
