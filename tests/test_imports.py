"""Who may import whom: the arrows of the design, read from the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "lit_spu"

# What each part may import of the others. `errors` knows nothing of the project, so all may use it.
ARROWS: dict[str, set[str]] = {
    "errors": set(),
    "registry": set(),
    "measure": set(),
    "tasks": set(),
    "checkpoints": set(),
    "optim": {"checkpoints"},
    "backbones": {"tasks", "checkpoints"},
    "data": {"tasks"},
    "nn": {"backbones.base", "backbones.rms_norm"},
    "methods": {"nn", "optim", "backbones", "tasks", "registry", "checkpoints", "export.load"},
    "callbacks": {"measure", "nn", "optim", "tasks", "methods.teacher"},
    "study": {"methods", "data", "measure", "registry", "tasks"},
}
TOP = {"__init__", "__main__", "cli", "export"}  # the top may import everything below it


def modules() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def imports(path: Path) -> Iterator[str]:
    """The project's modules that a file imports, without the package's name, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path}: relative import"
            names = [node.module] if node.module != "lit_spu" else [f"lit_spu.{alias.name}" for alias in node.names]
        else:
            continue
        yield from (name.removeprefix("lit_spu.") for name in names if name.startswith("lit_spu."))


def part(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def test_every_part_is_in_the_design() -> None:
    assert {part(path) for path in modules()} == set(ARROWS) | TOP


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_arrows(path: Path) -> None:
    own = part(path)
    if own in TOP:
        return
    allowed = ARROWS[own] | {own, "errors"}
    for name in imports(path):
        known = any(name == target or name.startswith(f"{target}.") for target in allowed)
        assert known, f"{own} must not import {name}"


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_only_backbones_and_data_know_transformers(path: Path) -> None:
    names = {
        node.module.partition(".")[0]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module
    }
    if part(path) in ("methods", "nn", "optim", "measure", "callbacks"):
        assert "transformers" not in names


def can_be_made(module: str) -> bool:
    """Return whether a module of `methods` holds a method, not a base class or a helper."""
    tree = ast.parse((ROOT / f"{module.replace('.', '/')}.py").read_text())
    derived = any(isinstance(node, ast.ClassDef) and node.bases for node in tree.body)
    return derived and "abstractmethod" not in ast.dump(tree)


def test_no_method_imports_a_sibling_but_to_be_one() -> None:
    for path in (ROOT / "methods").glob("*.py"):
        siblings = {name for name in imports(path) if name.startswith("methods.") and can_be_made(name)}
        bases = {
            base.id
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.ClassDef)
            for base in node.bases
            if isinstance(base, ast.Name)
        }
        assert len(siblings) <= 1, path
        if siblings:
            assert "Method" not in bases, path
