"""One page that opens anywhere: tables to sort, and the pictures."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from lit_spu.study import plots
from lit_spu.study.compare import Outcome
from lit_spu.study.grid import ZERO_SHOT, Study
from lit_spu.study.results import MAJORITY, Record, Row, grouped

COLUMNS = {
    "params/trainable": ("trained", "Parameters that are trained"),
    "memory/live_peak_mib": ("memory MiB", "Live tensor bytes at the peak of a training step, weights included"),
    "latency/step_ms": ("step ms", "Median time of an optimizer step"),
    "latency/step_p95_ms": ("p95 ms", "95th percentile of the time of a step"),
    "latency/inference_ms": ("inference ms", "Median time of a forward pass in validation"),
    "checkpoint_mib": ("checkpoint MiB", "Size of the best checkpoint with its optimizer state"),
    "passes/forward": ("forwards", "Forward passes of the training"),
    "passes/backward": ("backwards", "Backward passes of the training"),
    "steps": ("steps", "Optimizer steps"),
}
"""What a table shows beside the score: heading and meaning."""
RELATIVE = ("memory/live_peak_mib", "latency/step_ms")
"""Columns that are also given over the reference row's."""
BRIEF = ("params/trainable", "memory/live_peak_mib", "latency/step_ms", "latency/inference_ms")
"""Columns for which a terminal has room."""


@dataclass(frozen=True)
class Part:
    """One task on one backbone."""

    task: str
    backbone: str
    rows: Sequence[Row]
    reference: Row | None

    def pictures(self, folder: Path) -> dict[str, str]:
        """The pictures as SVG, written to a directory as SVG and PNG."""
        trained = [row for row in self.rows if row.name not in (ZERO_SHOT, MAJORITY)]
        figures = {draw.__name__: draw(trained) for draw in (plots.pareto, plots.memory, plots.curves) if trained}
        return plots.save(figures, folder / f"{self.task}-{self.backbone}")


@dataclass(frozen=True)
class Overview:
    """All tasks on one backbone: the rows of each method by task."""

    backbone: str
    tasks: Sequence[str]
    rows: Mapping[str, Mapping[str, Row]]
    reference: str

    def over_reference(self, name: str, cost: str) -> float | None:
        """The mean over the tasks of a row's cost over the reference row's."""
        own, its = self.rows[name], self.rows.get(self.reference, {})
        ratios = [
            own[task].costs[cost] / its[task].costs[cost]
            for task in self.tasks
            if task in own and task in its and cost in own[task].costs and its[task].costs.get(cost)
        ]
        return statistics.mean(ratios) if ratios else None

    def most(self, name: str, cost: str) -> float | None:
        """A row's greatest cost on any task."""
        return max((row.costs[cost] for row in self.rows[name].values() if cost in row.costs), default=None)

    def markdown(self) -> str:
        """The same as a table for a README."""
        over = f"/ {self.reference}"
        heads = (self.backbone, "trained", *self.tasks, "memory MiB", over, f"step {over}")
        lines = [f"| {' | '.join(heads)} |", f"|---|{'---:|' * (len(heads) - 1)}"]
        for name, row in self.rows.items():
            scores = [score(row[task]) if task in row else "–" for task in self.tasks]
            ratios = [self.over_reference(name, cost) for cost in RELATIVE]
            costs = [number(self.most(name, RELATIVE[0])), *("–" if r is None else f"{r:.2f}" for r in ratios)]
            lines.append(f"| {' | '.join((name, number(self.most(name, 'params/trainable')), *scores, *costs))} |")
        return "\n".join(lines)


def overviews(rows: Sequence[Row], reference: str) -> list[Overview]:
    """One for each backbone, the best on average first."""
    found = []
    for backbone, here in grouped(rows, lambda row: row.backbone).items():
        tasks = list(dict.fromkeys(row.task for row in here))
        by_name = grouped(here, lambda row: row.name)
        means = {name: sum(row.score for row in of) / len(tasks) for name, of in by_name.items()}
        ranked = {name: {row.task: row for row in by_name[name]} for name in sorted(means, key=lambda n: -means[n])}
        found.append(Overview(backbone, tasks, ranked, reference))
    return found


def score(row: Row) -> str:
    """Mean and deviation."""
    return f"{row.score:.3f}" + ("" if row.deviation is None else f" ± {row.deviation:.3f}")


def parts(rows: Sequence[Row], reference: str) -> list[Part]:
    """The rows by task and backbone, best first."""
    found = []
    for (task, backbone), here in grouped(rows, lambda row: (row.task, row.backbone)).items():
        yardstick = next((row for row in here if row.name == reference), None)
        found.append(Part(task, backbone, sorted(here, key=lambda row: -row.score), yardstick))
    return found


def write(
    study: Study,
    rows: Sequence[Row],
    records: Sequence[Record],
    troubles: Sequence[Outcome],
    unequal: Sequence[str],
    out: Path,
) -> Path:
    """Write `report.html`, the pictures, and `results.md`, tables for a README; the page's path."""
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
        parts=[(part, part.pictures(out / "plots")) for part in parts(rows, study.reference)],
        overviews=[table for table in tables if len(table.tasks) > 1],
        columns=COLUMNS,
        relative=RELATIVE,
        unequal=unequal,
        troubles=troubles,
        records=records,
        device=first.get("device"),
        versions={name.removeprefix("version."): value for name, value in first.items() if name.startswith("version.")},
        steps=sorted({r["steps"] for r in records if r["row"] != ZERO_SHOT}),
        batches=sorted({r["config.data.batch_size"] for r in records if r.get("config.data.batch_size")}),
    )
    path.write_text(page)
    (out / "results.md").write_text("\n\n".join(table.markdown() for table in tables) + "\n")
    return path


def number(value: float | None) -> str:
    """Counts in full, measures with three digits."""
    if value is None:
        return "–"
    if value == int(value) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"
