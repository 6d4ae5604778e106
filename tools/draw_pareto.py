"""Draw score against memory for one study: `python -m tools.draw_pareto docs/studies/minilm docs/pareto.svg`.

Every point is the mean over the seeds of one method, with the standard deviation as a bar. The grey line joins the
methods that no other method beats in both score and memory. Methods that miss a task are skipped in its panel.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

MEMORY = "memory/live_peak_mib"
LABELS = {
    "full": "full fine-tuning",
    "last_layers": "last 2 layers",
    "lora": "LoRA",
    "lora_kv_ffn": "LoRA k-v-ffn",
    "siva": "SiVA",
    "side_lora": "Side LoRA",
    "ia3": "(IA)³",
    "ia3_out": "(IA)³-out",
    "ff_only": "FF-only",
    "bitfit": "BitFit",
    "lst": "",
    "kladder": "ladders",
    "kladder, k=2": "",
    "head": "head",
}
"""Labels of the points. The three ladders overlap, and one label serves all of them."""
LADDERS = ("lst", "kladder", "kladder, k=2")
LABEL_OFFSETS = {
    ("sst2", "kladder"): (-6, 6),
    ("sst2", "full"): (-6, 6),
    ("sst2", "ff_only"): (-6, -2),
    ("sst2", "ia3"): (7, -2),
    ("sst2", "ia3_out"): (-6, -10),
    ("sst2", "bitfit"): (7, -8),
    ("sst2", "lora_kv_ffn"): (4, -14),
    ("sst2", "siva"): (7, 0),
    ("cola", "kladder"): (-6, -12),
    ("cola", "head"): (-6, 6),
    ("cola", "last_layers"): (-6, 4),
    ("cola", "lora_kv_ffn"): (-6, 4),
    ("cola", "ia3"): (7, -6),
    ("cola", "ia3_out"): (-6, -10),
}
"""Offsets of labels from their points, where the default would overlap another label. Negative: left of the point."""


class Point(NamedTuple):
    """A method on one task: its name, its memory, and the mean and deviation of its score."""

    row: str
    mib: float
    score: float
    deviation: float


def read_points(study: Path, task: str) -> list[Point]:
    """Return the methods of a study that ran on a task, by memory."""
    with (study / "results.csv").open() as file:
        runs = [run for run in csv.DictReader(file) if run["task"] == task and run["score"] and run[MEMORY]]
    points = []
    for row in dict.fromkeys(run["row"] for run in runs):
        scores = [float(run["score"]) for run in runs if run["row"] == row]
        mib = statistics.mean(float(run[MEMORY]) for run in runs if run["row"] == row)
        points.append(Point(row, mib, statistics.mean(scores), statistics.stdev(scores) if len(scores) > 1 else 0.0))
    return sorted(points, key=lambda point: point.mib)


def draw(study: Path, tasks: Sequence[tuple[str, str]], machine: str, output: Path) -> None:
    """Draw one panel for each task, given with the name of its metric."""
    from matplotlib import rcParams
    from matplotlib.figure import Figure

    rcParams["svg.hashsalt"] = "lit_spu"  # the same picture has the same text
    rcParams["svg.fonttype"] = "none"  # text as text: half of the size
    figure = Figure(figsize=(4.7 * len(tasks), 3.9), layout="constrained")
    for axis, (task, metric) in zip(figure.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        draw_panel(axis, task, read_points(study, task))
        axis.set_title(f"{metric} ↑", loc="left", fontsize=10)
    figure.supxlabel(f"peak memory of training with the model's weights, MiB ({machine}); left is better", fontsize=9)
    figure.savefig(output, dpi=150, metadata={"Date": None} if output.suffix == ".svg" else None)


def draw_panel(axis: Any, task: str, points: Sequence[Point]) -> None:
    """Draw the methods, their names, and the line of those that no other beats in both."""
    best: list[Point] = []
    for point in points:
        colour = "tab:orange" if point.row in LADDERS else "black" if point.row == "full" else "tab:blue"
        axis.errorbar(point.mib, point.score, point.deviation, fmt="o", color=colour, ms=5, lw=0.8, alpha=0.9)
        offset = LABEL_OFFSETS.get((task, point.row), (7, 4))
        axis.annotate(
            LABELS.get(point.row, point.row),
            (point.mib, point.score),
            offset,
            textcoords="offset points",
            horizontalalignment="right" if offset[0] < 0 else "left",
            fontsize=8.5,
            color=colour,
        )
        if not best or point.score > best[-1].score:
            best.append(point)
    axis.step([point.mib for point in best], [point.score for point in best], where="post", color="0.75", zorder=0)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.2)
    axis.set_xlim(0, 800)


def main() -> None:
    """Draw SST-2 and CoLA of the study given on the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", type=Path, help="folder with a results.csv, as lit-spu compare writes it")
    parser.add_argument("output", type=Path, help="an .svg or .png file")
    parser.add_argument("--machine", default="CPU, live tensor bytes")
    args = parser.parse_args()
    tasks = [("sst2", "SST-2 accuracy (6,000 training examples)"), ("cola", "CoLA Matthews correlation")]
    draw(args.study, tasks, args.machine, args.output)


if __name__ == "__main__":
    main()
