"""One page that opens anywhere: tables to sort, and the pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from lit_spu.study import plots
from lit_spu.study.compare import Outcome
from lit_spu.study.grid import ZERO_SHOT, Study
from lit_spu.study.results import MAJORITY, Record, Row

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


def parts(rows: Sequence[Row], reference: str) -> list[Part]:
    """The rows by task and backbone, best first."""
    found = []
    for task, backbone in dict.fromkeys((row.task, row.backbone) for row in rows):
        here = [row for row in rows if (row.task, row.backbone) == (task, backbone)]
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
    """Write `report.html` and the pictures; its path."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("lit_spu.study", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = number
    first = records[0] if records else {}
    path = out / "report.html"
    page = environment.get_template("report.html.j2").render(
        title=out.name,
        date=f"{datetime.now():%Y-%m-%d %H:%M}",
        study=study,
        parts=[(part, part.pictures(out / "plots")) for part in parts(rows, study.reference)],
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
    return path


def number(value: float | None) -> str:
    """Counts in full, measures with three digits."""
    if value is None:
        return "–"
    if value == int(value) or abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"
