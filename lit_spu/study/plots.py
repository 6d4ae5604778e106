"""Draw the plots of a study. A method has the same colour in all of them."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_spu.measure import Kind
from lit_spu.study.columns import AXES, MEMORY
from lit_spu.study.results import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

KIND_COLOURS = {
    Kind.WEIGHTS: "#33415c",
    Kind.OPTIMIZER: "#7d8597",
    Kind.GRADIENTS: "#b8860b",
    Kind.ACTIVATIONS: "#2a9d8f",
    Kind.REST: "#d9d9d9",
}


def pareto(rows: Sequence[Row]) -> Figure:
    """Plot scores against each cost. A line joins the rows that no other row beats in both."""
    costs = [name for name in AXES if _differ([row.costs[name] for row in rows if name in row.costs])] or [MEMORY]
    shown = [row for row in rows if any(name in row.costs for name in costs)]
    figure, axes = _make_figure(len(costs), 4.2, 3.6)
    for axis, name in zip(axes, costs, strict=True):
        measured = ((row.costs[name], row.score, row) for row in rows if name in row.costs)
        points = sorted(measured, key=lambda point: point[:2])
        for cost, score, row in points:
            axis.errorbar(cost, score, row.deviation or 0, fmt="o", color=_choose_colour(row.name, rows), ms=6, lw=1)
        best: list[tuple[float, float]] = []
        for cost, score, _ in points:
            if not best or score > best[-1][1]:
                best.append((cost, score))
        if best:
            axis.step(*zip(*best, strict=True), where="post", color="0.6", lw=1, zorder=0)
        axis.set_xscale("log")
        axis.set_xlabel(AXES[name])
        axis.margins(0.12)
        _set_plain_ticks(axis, [cost for cost, _, _ in points])
    axes[0].set_ylabel(rows[0].metric)
    _add_legend(figure, shown, rows)
    return figure


def curves(rows: Sequence[Row]) -> Figure:
    """Plot the validation score over the steps: the mean over the seeds."""
    figure, (axis,) = _make_figure(1, 6.5, 3.4)
    shown = [row for row in rows if row.curve]
    for row in shown:
        steps, scores = zip(*row.curve, strict=True)
        axis.plot(steps, scores, ".-", color=_choose_colour(row.name, rows), lw=1.5)
    axis.set_xlabel("step")
    axis.set_ylabel(f"validation {rows[0].metric}")
    _add_legend(figure, shown, rows)
    return figure


def memory(rows: Sequence[Row]) -> Figure:
    """Plot the peak memory by kind as stacked bars, smallest first."""
    shown = sorted((row for row in rows if MEMORY in row.costs), key=lambda row: row.costs[MEMORY])
    figure, (axis,) = _make_figure(1, 6.5, 0.9 + 0.35 * max(len(shown), 1))
    left = [0.0] * len(shown)
    for kind, colour in KIND_COLOURS.items():
        widths = [row.costs.get(f"memory/{kind.name.lower()}_mib", 0.0) for row in shown]
        axis.barh([row.name for row in shown], widths, left=left, color=colour, label=kind.name.lower(), height=0.7)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    axis.set_xlabel("MiB at the peak of a training step")
    axis.invert_yaxis()
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    return figure


def save(figures: Mapping[str, Figure], folder: Path) -> dict[str, str]:
    """Write every figure as SVG and PNG.

    Returns:
        The text of each SVG from its `<svg` tag on, for an HTML page.
    """
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


def _make_figure(panels: int, width: float, height: float) -> tuple[Figure, Sequence[Any]]:
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["svg.hashsalt"] = "lit_spu"  # the same figure always yields the same SVG text
    figure = Figure(figsize=(width * panels, height), layout="constrained")
    axes = figure.subplots(1, panels, squeeze=False, sharey=True)[0]
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return figure, axes


def _differ(values: Sequence[float]) -> bool:
    """Return whether the values differ and are all positive, as a logarithmic axis needs."""
    return len({*values}) > 1 and min(values) > 0


def _choose_colour(name: str, rows: Sequence[Row]) -> Any:
    from matplotlib import colormaps

    names = list(dict.fromkeys(row.name for row in rows))
    return colormaps["tab10" if len(names) <= 10 else "tab20"](names.index(name))


def _add_legend(figure: Figure, shown: Sequence[Row], rows: Sequence[Row]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], marker="o", ls="", color=_choose_colour(row.name, rows), label=row.name) for row in shown]
    figure.legend(handles=handles, loc="outside right upper", frameon=False, fontsize=9)


def _set_plain_ticks(axis: Any, values: Sequence[float]) -> None:
    """Label a logarithmic axis with plain numbers, also if the values span less than one power of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    if values and max(values) / min(values) < 30:
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axis.xaxis.set_minor_formatter(NullFormatter())
