"""The allowed imports between the parts of the package, read from the source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "lit_spu"

# The other parts that each part may import. Every part may import `errors` and `console`, which import nothing
# of the project, and `files`, `ranges` and `safe_yaml`, which import `errors` alone.
ALLOWED: dict[str, set[str]] = {
    "errors": set(),
    "files": set(),
    "safe_yaml": set(),
    "console": set(),
    "ranges": set(),
    "version": set(),
    "registry": set(),
    "measure": set(),
    "tasks": set(),
    "checkpoints": {"version"},
    "optim": {"checkpoints", "backbones.hooks"},
    "backbones": {"tasks", "checkpoints"},
    "data": {"tasks"},
    "nn": {
        f"backbones.{file}" for file in ("backbone", "hooks", "precision", "side_model", "stacks", "target_linears")
    },
    "methods": {
        *("nn", "optim", "backbones", "tasks", "registry", "checkpoints", "export.load"),
        *(f"callbacks.{file}" for file in ("output", "rank_check", "trajectory_recorder", "zero_shot_report")),
    },
    "callbacks": {"measure", "nn", "optim", "tasks", "checkpoints", "methods.teacher", "backbones.stacks", "version"},
    "study": {"methods", "data", "measure", "registry", "tasks", "backbones.load"},
    "export": {"methods", "data", "backbones", "nn", "optim", "measure", "tasks", "checkpoints", "registry", "version"},
    "public": {"methods.base", "export.load", "registry"},
    "__init__": {"public", "version"},
    "__main__": {"cli", "version"},
}
UNRESTRICTED = {"cli"}  # the command line may import every other part, but no other part may import it


def source_files() -> list[Path]:
    return sorted(ROOT.rglob("*.py"))


def module_name(path: Path) -> str:
    """Return the full name of the module in a file of the package."""
    return ".".join(path.relative_to(ROOT.parent).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in source_files()}


def runtime_nodes(node: ast.AST) -> Iterator[ast.AST]:
    """Yield the nodes below `node` without those under `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING":
            continue
        yield child
        yield from runtime_nodes(child)


def imports(path: Path) -> Iterator[str]:
    """Yield the full names of the project's modules that a file imports, also inside functions."""
    for node in runtime_nodes(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and (node.module or "") in MODULES:
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            yield from (name if name in MODULES else str(node.module) for name in names)


def short(name: str) -> str:
    """Return a module's name without that of the package."""
    return name.partition(".")[2] or "__init__"


def part(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def file_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_every_part_has_a_rule() -> None:
    assert {part(path) for path in source_files()} == set(ALLOWED) | UNRESTRICTED


@pytest.mark.parametrize("path", source_files(), ids=file_id)
def test_a_file_imports_only_allowed_parts(path: Path) -> None:
    own = part(path)
    if own in UNRESTRICTED:
        return
    allowed = ALLOWED[own] | {own, "errors", "files", "safe_yaml", "console", "ranges"}
    for name in map(short, imports(path)):
        assert any(name == target or name.startswith(f"{target}.") for target in allowed), f"{own} imports {name}"


def test_no_files_import_each_other_in_a_circle() -> None:
    graph = {name: set(imports(path)) for name, path in MODULES.items()}
    assert sum(map(len, graph.values())) > len(MODULES)  # imports are found
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"import circle: {' imports '.join(reversed(error.args[1]))}")


@pytest.mark.parametrize("path", source_files(), ids=file_id)
def test_only_backbones_and_data_import_transformers(path: Path) -> None:
    names = {
        node.module.partition(".")[0]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and node.module
    }
    if part(path) in ("methods", "nn", "optim", "measure", "callbacks"):
        assert "transformers" not in names


def defines_method(name: str) -> bool:
    """Return whether a module of `methods` holds a method, not a base class or a helper."""
    tree = ast.parse(MODULES[name].read_text())
    derived = any(isinstance(node, ast.ClassDef) and node.bases for node in tree.body)
    return derived and "abstractmethod" not in ast.dump(tree)


def test_a_method_imports_another_only_as_its_base() -> None:
    for path in (ROOT / "methods").glob("*.py"):
        if path.stem == "base":  # joins the base classes of all methods
            continue
        siblings = {name for name in imports(path) if name.startswith("lit_spu.methods.") and defines_method(name)}
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
