"""A study's pictures. Each method has one colour in all of them."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_spu.measure import Kind
from lit_spu.study.results import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COSTS = {
    "memory/live_peak_mib": "peak memory, MiB",
    "latency/step_ms": "time of a step, ms",
    "params/trainable": "trained parameters",
    "passes/backward": "backward passes",
}
"""What a score is set against, where methods differ in it."""


def pareto(rows: Sequence[Row]) -> Figure:
    """Scores against each cost. The line joins the rows that no other beats in both."""
    costs = [name for name in COSTS if _differ([row.costs[name] for row in rows if name in row.costs])] or [*COSTS][:1]
    shown = [row for row in rows if any(name in row.costs for name in costs)]
    figure, axes = _figure(len(costs), 4.2, 3.6)
    for axis, name in zip(axes, costs, strict=True):
        having = ((row.costs[name], row.score, row) for row in rows if name in row.costs)
        points = sorted(having, key=lambda point: point[:2])
        for cost, score, row in points:
            axis.errorbar(cost, score, row.deviation or 0, fmt="o", color=_colour(row.name, rows), ms=6, lw=1)
        best: list[tuple[float, float]] = []
        for cost, score, _ in points:
            if not best or score > best[-1][1]:
                best.append((cost, score))
        axis.step(*zip(*best, strict=True), where="post", color="0.6", lw=1, zorder=0) if best else None
        axis.set_xscale("log")
        axis.set_xlabel(COSTS[name])
        axis.margins(0.12)
        _plain_ticks(axis, [cost for cost, _, _ in points])
    axes[0].set_ylabel(rows[0].metric)
    _legend(figure, shown, rows)
    return figure


def curves(rows: Sequence[Row]) -> Figure:
    """The validation score by step, the mean over the seeds."""
    figure, (axis,) = _figure(1, 6.5, 3.4)
    shown = [row for row in rows if row.curve]
    for row in shown:
        steps, scores = zip(*row.curve, strict=True)
        axis.plot(steps, scores, ".-", color=_colour(row.name, rows), lw=1.5)
    axis.set_xlabel("step")
    axis.set_ylabel(f"validation {rows[0].metric}")
    _legend(figure, shown, rows)
    return figure


def memory(rows: Sequence[Row]) -> Figure:
    """Peak memory by kind."""
    shown = sorted(
        (row for row in rows if "memory/live_peak_mib" in row.costs), key=lambda r: r.costs["memory/live_peak_mib"]
    )
    figure, (axis,) = _figure(1, 6.5, 0.9 + 0.35 * max(len(shown), 1))
    left = [0.0] * len(shown)
    shades = dict(zip(reversed(Kind), ("#33415c", "#7d8597", "#b8860b", "#2a9d8f", "#d9d9d9"), strict=True))
    for kind, shade in shades.items():
        widths = [row.costs.get(f"memory/{kind.name.lower()}_mib", 0.0) for row in shown]
        axis.barh([row.name for row in shown], widths, left=left, color=shade, label=kind.name.lower(), height=0.7)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axis.set_xlabel("MiB at the peak of a training step")
    axis.invert_yaxis()
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    return figure


def save(figures: Mapping[str, Figure], folder: Path) -> dict[str, str]:
    """Write every figure as SVG and PNG; the SVG's text, to put into a page."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = {}
    for name, figure in figures.items():
        figure.savefig(folder / f"{name}.png", dpi=150)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
        text = buffer.getvalue()
        (folder / f"{name}.svg").write_text(text)
        texts[name] = text[text.index("<svg") :]
    return texts


def _figure(panels: int, width: float, height: float) -> tuple[Figure, Sequence[Any]]:
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["svg.hashsalt"] = "lit_spu"  # the same picture has the same text
    figure = Figure(figsize=(width * panels, height), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False, sharey=True)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return figure, axes


def _differ(values: Sequence[float]) -> bool:
    """Whether there is more than one, and a logarithm of each."""
    return len({*values}) > 1 and min(values) > 0


def _colour(name: str, rows: Sequence[Row]) -> Any:
    from matplotlib import colormaps

    names = list(dict.fromkeys(row.name for row in rows))
    return colormaps["tab10" if len(names) <= 10 else "tab20"](names.index(name))


def _legend(figure: Figure, shown: Sequence[Row], rows: Sequence[Row]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], marker="o", ls="", color=_colour(row.name, rows), label=row.name) for row in shown]
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9)


def _plain_ticks(axis: Any, values: Sequence[float]) -> None:
    """Numbers instead of powers of ten, also where they span less than one."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if values and max(values) / min(values) < 30:
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
