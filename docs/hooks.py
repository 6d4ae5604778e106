"""What the site takes from the code: every method's settings, defaults and results, and the contributors' page."""

from __future__ import annotations

import csv
import inspect
import re
import statistics
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

from lit_spu import registry
from lit_spu.methods.base import Method

ROOT = Path(__file__).parents[1]
METHODS = {
    cls.__module__.rpartition(".")[2]: cls
    for cls in registry.classes("lit_spu.methods")
    if issubclass(cls, Method) and not inspect.isabstract(cls)
}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are kept elsewhere."""
    for name in ("CONTRIBUTING", "CHANGELOG"):
        files.append(File.generated(config, f"{name.lower()}.md", content=(ROOT / f"{name}.md").read_text()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Behind a method's text: its settings, its configs, and what it came to in the studies."""
    path = Path(page.file.src_uri)
    if path.parent.name != "methods" or path.stem not in METHODS:
        return markdown
    cls = METHODS[path.stem]
    configs = [file for file in sorted((ROOT / "configs").rglob("*.yaml")) if f"{cls.__module__}." in file.read_text()]
    shown = [f"`{file.relative_to(ROOT)}`\n\n```yaml\n{file.read_text()}```" for file in configs]
    return "\n\n".join((markdown, "## Settings", settings(cls), "## Configs", *shown, *measured(configs)))


def settings(cls: type[Method]) -> str:
    """A table of the constructor's arguments, those of the method first, then those that all share."""
    rows = [
        f"| `{name}` | `{parameter.default!r}` | {argument(base, name).replace('|', chr(92) + '|')} |"
        for name, (base, parameter) in registry.settings(cls).items()
    ]
    return "\n".join(("| setting | default | |", "|---|---|---|", *rows))


def argument(cls: type, name: str) -> str:
    """What the docstring of a class says of an argument."""
    found = re.search(rf"^    {name}: (.*?)(?=^    \w+: |^\w|\Z)", inspect.getdoc(cls) or "", re.MULTILINE | re.DOTALL)
    return " ".join(found[1].split()) if found else ""


def measured(configs: list[Path]) -> list[str]:
    """The rows of these configs in every study that is kept under docs/studies."""
    tables = []
    for results in sorted((ROOT / "docs" / "studies").glob("*/results.csv")):
        with results.open() as file:
            runs = [run for run in csv.DictReader(file) if run["score"]]
        rows = []
        for row in dict.fromkeys(run["row"] for run in runs):
            if row.partition(",")[0] in {config.stem for config in configs}:
                for task in dict.fromkeys(run["task"] for run in runs):
                    scores = [float(run["score"]) for run in runs if (run["row"], run["task"]) == (row, task)]
                    if scores:
                        spread = f" ± {statistics.stdev(scores):.3f}" if len(scores) > 1 else ""
                        rows.append(f"| {row} | {task} | {statistics.mean(scores):.3f}{spread} | {len(scores)} |")
        if rows:
            head = f"Study [{results.parent.name}](../studies/{results.parent.name}/report.html):"
            tables.append("\n".join((head, "", "| | task | score | seeds |", "|---|---|---:|---:|", *rows)))
    return ["## Measured", *tables] if tables else []
