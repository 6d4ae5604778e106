"""Hooks of the site: the settings, configs and results of every method's page, and the pages outside docs/."""

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
"""Every method by the name of its module, which is the name of its page."""


def on_config(config: Any) -> Any:
    """Add the pages of the methods to the navigation of mkdocs.yml."""
    cards = sorted((ROOT / "docs" / "methods").glob("*.md"))
    config.nav.append({"Methods": [f"methods/{card.name}" for card in cards]})
    return config


def on_files(files: Files, config: Any) -> Files:
    """Add CONTRIBUTING and CHANGELOG, which lie beside docs/, with their links adapted."""
    for name in ("CONTRIBUTING", "CHANGELOG"):
        content = (ROOT / f"{name}.md").read_text().replace("](docs/", "](")
        files.append(File.generated(config, f"{name.lower()}.md", content=content))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Append the settings, the configs and the measured scores to a method's page."""
    path = Path(page.file.src_uri)
    if path.parent.name != "methods" or path.stem not in METHODS:
        return markdown
    cls = METHODS[path.stem]
    configs = [file for file in sorted((ROOT / "configs").rglob("*.yaml")) if f"{cls.__module__}." in file.read_text()]
    shown = [f"`{file.relative_to(ROOT)}`\n\n```yaml\n{file.read_text()}```" for file in configs]
    return "\n\n".join((markdown, "## Settings", settings_table(cls), "## Configs", *shown, *score_tables(configs)))


def settings_table(cls: type[Method]) -> str:
    """Return a table of the constructor's arguments: the method's own first, then the shared ones."""
    rows = [
        f"| `{name}` | `{parameter.default!r}` | {describe_argument(base, name).replace('|', chr(92) + '|')} |"
        for name, (base, parameter) in registry.settings(cls).items()
    ]
    return "\n".join(("| setting | default | |", "|---|---|---|", *rows))


def describe_argument(cls: type, name: str) -> str:
    """Return the description of an argument from the docstring of a class, or an empty text."""
    found = re.search(rf"^    {name}: (.*?)(?=^    \w+: |^\w|\Z)", inspect.getdoc(cls) or "", re.MULTILINE | re.DOTALL)
    return " ".join(found[1].split()) if found else ""


def score_tables(configs: list[Path]) -> list[str]:
    """Return a heading and one table for each study in docs/studies that has rows of these configs."""
    names = {config.stem for config in configs}
    tables = []
    for results in sorted((ROOT / "docs" / "studies").glob("*/results.csv")):
        if rows := score_rows(results, names):
            heading = f"Study [{results.parent.name}](../studies/{results.parent.name}/report.html):"
            tables.append("\n".join((heading, "", "| | task | score | seeds |", "|---|---|---:|---:|", *rows)))
    return ["## Measured", *tables] if tables else []


def score_rows(results: Path, names: set[str]) -> list[str]:
    """Return one table row for each row and task of a study, if the row's config is one of `names`."""
    with results.open() as file:
        runs = [run for run in csv.DictReader(file) if run["score"] and run["row"].partition(",")[0] in names]
    scores: dict[tuple[str, str], list[float]] = {}
    for run in runs:
        scores.setdefault((run["row"], run["task"]), []).append(float(run["score"]))
    return [
        f"| {row} | {task} | {statistics.mean(found):.3f}{format_deviation(found)} | {len(found)} |"
        for (row, task), found in scores.items()
    ]


def format_deviation(scores: list[float]) -> str:
    """Return ` ± ` and the standard deviation, or nothing for a single score."""
    return f" ± {statistics.stdev(scores):.3f}" if len(scores) > 1 else ""
