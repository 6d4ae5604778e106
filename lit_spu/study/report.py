"""Write the report of a study: one HTML page with sortable tables and plots, and tables in Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from lit_spu.files import write_text
from lit_spu.study import plots
from lit_spu.study.columns import COLUMNS, MEMORY, RELATIVE, TRAINED
from lit_spu.study.compare import Outcome
from lit_spu.study.grid import UNTRAINED, ZERO_SHOT, Study
from lit_spu.study.results import Record, Row, group_by


@dataclass(frozen=True)
class Part:
    """Rows of one task on one backbone, best first."""

    task: str
    backbone: str
    rows: Sequence[Row]
    reference: Row | None

    def save_plots(self, folder: Path) -> dict[str, str]:
        """Write the plots as SVG and PNG into a subdirectory, and return the SVG texts by name."""
        trained = [row for row in self.rows if row.name not in UNTRAINED]
        figures = {draw.__name__: draw(trained) for draw in (plots.pareto, plots.memory, plots.curves) if trained}
        return plots.save(figures, folder / f"{self.task}-{self.backbone}")


@dataclass(frozen=True)
class Overview:
    """Rows of all tasks on one backbone: by name, then by task."""

    backbone: str
    tasks: Sequence[str]
    rows: Mapping[str, Mapping[str, Row]]
    reference: str

    def mean_ratio(self, name: str, cost: str) -> float | None:
        """Return the ratio of a row's cost to the reference row's, averaged over the tasks."""
        own, reference = self.rows[name], self.rows.get(self.reference, {})
        ratios = [
            own[task].costs[cost] / reference[task].costs[cost]
            for task in self.tasks
            if task in own and task in reference and cost in own[task].costs and reference[task].costs.get(cost)
        ]
        return statistics.mean(ratios) if ratios else None

    def maximum(self, name: str, cost: str) -> float | None:
        """Return a row's largest cost over the tasks."""
        return max((row.costs[cost] for row in self.rows[name].values() if cost in row.costs), default=None)

    def worth_their_memory(self) -> list[str]:
        """Return the names of the rows that are worth their memory, in order of memory.

        Each has a mean score over the tasks that is more than two standard errors above that of every row before it.
        With a single seed, higher is enough. Rows without all tasks and seeds are left out.
        """
        seeds = {seed for tasks in self.rows.values() for row in tasks.values() for seed in row.seeds}
        found: list[str] = []
        memory = {name: cost for name in self.rows if (cost := self.maximum(name, MEMORY))}
        for name in sorted(memory, key=memory.__getitem__):  # of equal memory, the better one is first in `rows`
            row = self.rows[name]
            complete = len(row) == len(self.tasks) and all(seeds == {*of_task.seeds} for of_task in row.values())
            if complete and all(_is_better(row, self.rows[other]) for other in found):
                found.append(name)
        return found

    def markdown(self) -> str:
        """Return the table in Markdown."""
        over = f"/ {self.reference}"
        heads = (self.backbone, "trained", *self.tasks, "memory MiB", over, f"step {over}")
        lines = [f"| {' | '.join(heads)} |", f"|---|{'---:|' * (len(heads) - 1)}"]
        for name, row in self.rows.items():
            scores = [score(row[task]) if task in row else "–" for task in self.tasks]
            ratios = [self.mean_ratio(name, cost) for cost in RELATIVE]
            costs = [number(self.maximum(name, MEMORY)), *("–" if r is None else f"{r:.2f}" for r in ratios)]
            lines.append(f"| {' | '.join((name, number(self.maximum(name, TRAINED)), *scores, *costs))} |")
        return "\n".join(lines)


def overviews(rows: Sequence[Row], reference: str) -> list[Overview]:
    """Return an overview of each backbone, its rows ordered by their mean score, best first."""
    tables = []
    for backbone, group in group_by(rows, lambda row: row.backbone).items():
        tasks = list(dict.fromkeys(row.task for row in group))
        by_name = group_by(group, lambda row: row.name)
        means = {name: sum(row.score for row in named) / len(tasks) for name, named in by_name.items()}
        ranked = {name: {row.task: row for row in by_name[name]} for name in sorted(means, key=lambda n: -means[n])}
        tables.append(Overview(backbone, tasks, ranked, reference))
    return tables


def _is_better(row: Mapping[str, Row], other: Mapping[str, Row]) -> bool:
    """Return whether a row's mean score over the tasks is more than two standard errors above another's, by seed."""
    pairs = [(of_task.by_seed, other[task].by_seed) for task, of_task in row.items()]
    gains = [statistics.fmean(own[seed] - others[seed] for own, others in pairs) for seed in pairs[0][0]]
    error: float = statistics.stdev(gains) / math.sqrt(len(gains)) if len(gains) > 1 else 0.0
    return statistics.fmean(gains) > 2 * error


def score(row: Row) -> str:
    """Format the mean score of a row and its standard deviation."""
    return f"{row.score:.3f}" + ("" if row.deviation is None else f" ± {row.deviation:.3f}")


def parts(rows: Sequence[Row], reference: str) -> list[Part]:
    """Split the rows by task and backbone, best first."""
    tables = []
    for (task, backbone), group in group_by(rows, lambda row: (row.task, row.backbone)).items():
        reference_row = next((row for row in group if row.name == reference), None)
        tables.append(Part(task, backbone, sorted(group, key=lambda row: -row.score), reference_row))
    return tables


def write(
    study: Study,
    rows: Sequence[Row],
    records: Sequence[Record],
    failures: Sequence[Outcome],
    differences: Sequence[str],
    out: Path,
) -> Path:
    """Write `report.html`, the plots, and `results.md` with tables for a README.

    Args:
        study: The study.
        rows: Rows of the tables.
        records: Records of the finished runs.
        failures: Outcomes of runs without a result.
        differences: Differences between rows that make the comparison unfair.
        out: Directory of the study.

    Returns:
        The path of the HTML page.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("lit_spu.study", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "score": score}
    first = records[0] if records else {}
    tables = overviews(rows, study.reference)
    path = out / "report.html"
    page = environment.get_template("report.html.j2").render(
        title=out.name,
        date=f"{datetime.now():%Y-%m-%d %H:%M}",
        study=study,
        parts=[(part, part.save_plots(out / "plots")) for part in parts(rows, study.reference)],
        tables=tables,
        columns=COLUMNS,
        relative=RELATIVE,
        trained=TRAINED,
        differences=differences,
        failures=failures,
        records=records,
        device=first.get("device"),
        versions={name.removeprefix("version."): value for name, value in first.items() if name.startswith("version.")},
        steps=sorted({record["steps"] for record in records if record["row"] != ZERO_SHOT}),
        batch_sizes=sorted({size for record in records if (size := record.get("config.data.batch_size"))}, key=str),
    )
    write_text(path, page)
    write_text(out / "results.md", "\n\n".join(table.markdown() for table in tables) + "\n")
    return path


def number(value: float | None) -> str:
    """Format a number: integers and large values without decimals, others with three digits, None as a dash."""
    if value is None:
        return "–"
    if value == int(value) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"
