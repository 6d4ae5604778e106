"""`python -m benchmarks.real`: the README's results on real data, a cell at a time.

Every method trains on the same examples in the same order for as many steps, at the learning rate of its config unless
stated here. Finished cells are in the CSV and are not run again; a run that is stopped loses the cell in flight.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "minilm.csv"

ROWS = {
    "full": ["--config=configs/full.yaml"],
    "last 2 layers": ["--config=configs/last_layers.yaml"],
    "head": ["--config=configs/head.yaml"],
    "LST": ["--config=configs/lst.yaml", "--model.reduction=8"],
    "k-ladder, k=1": ["--config=configs/kladder.yaml", "--model.reduction=8"],
    "k-ladder, k=2": ["--config=configs/kladder.yaml", "--model.reduction=8", "--model.k=2"],
}
TASKS = {
    "sst2": ["--data.limit_train=6000", "--trainer.max_epochs=2"],
    "mrpc": ["--trainer.max_epochs=3"],
    "rte": ["--trainer.max_epochs=3"],
}
FIELDS = ["task", "method", "seed", "score", "metric", "trainable", "live_mib", "weights_mib", "cpu_seconds", "steps"]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real", description=__doc__)
    parser.add_argument("--glue", required=True, help="a folder in GLUE's layout")
    parser.add_argument("--backbone", required=True, help="the all-MiniLM-L6-v2 encoder's folder")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--table", action="store_true", help="only print the table of what is done")
    options = parser.parse_args()
    cells = [(task, row, seed) for task in TASKS for seed in options.seeds for row in ROWS]
    for task, row, seed in cells:
        if not options.table and (task, row, str(seed)) not in {(d["task"], d["method"], d["seed"]) for d in done()}:
            keep(run(task, row, seed, options.glue, options.backbone))
            print(f"{task}, {row}, seed {seed}: {done()[-1]['score']}", flush=True)
    print(table(done()))


def run(task: str, row: str, seed: int, glue: str, backbone: str) -> dict[str, object]:
    """Train one cell in a process of its own, on one thread; what it measured."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    with TemporaryDirectory() as folder:
        data = [f"--data.source={glue}", f"--data.task={task}", f"--model.backbone={backbone}"]
        rest = [f"--seed_everything={seed}", f"--run_dir={folder}/run", "--trainer.enable_progress_bar=false"]
        command = [sys.executable, "cli.py", "fit", *ROWS[row], *data, *TASKS[task], *rest]
        subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
        summary = json.loads(Path(folder, "run", "summary.json").read_text())
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    measured = summary["measured"]
    return {
        "task": task,
        "method": row,
        "seed": seed,
        "score": summary["best_score"],
        "metric": summary["monitor"],
        "trainable": measured["params/trainable"],
        "live_mib": round(measured["memory/live_peak_mib"], 1),
        "weights_mib": round(measured["memory/weights_mib"], 1),
        "cpu_seconds": round(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, 1),
        "steps": summary["steps"],
    }


def done() -> list[dict[str, str]]:
    """The finished cells."""
    if not RESULTS.exists():
        return []
    with RESULTS.open() as file:
        return list(csv.DictReader(file))


def keep(cell: dict[str, object]) -> None:
    """Add a finished cell."""
    new = not RESULTS.exists()
    with RESULTS.open("a") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerow(cell)


def table(cells: list[dict[str, str]]) -> str:
    """The README's table: mean and spread of the scores, and what the first task's runs cost."""
    lines = ["| | trainable | " + " | ".join(TASKS) + " | live MiB | time |", "|---|---:|" + "---:|" * (len(TASKS) + 2)]

    def of(row: str, task: str, field: str) -> list[float]:
        return [float(cell[field]) for cell in cells if (cell["method"], cell["task"]) == (row, task)]

    for row in ROWS:
        scores = [of(row, task, "score") for task in TASKS]
        shown = [
            f"{statistics.mean(s):.3f} ± {statistics.pstdev(s):.3f}" if len(s) > 1 else "".join(f"{v:.3f}" for v in s)
            for s in scores
        ]
        trainable = {cell["trainable"] for cell in cells if cell["method"] == row}
        # of the last task, whose texts are the longest
        last = list(TASKS)[-1]
        live, time = of(row, last, "live_mib"), of(row, last, "cpu_seconds")
        yardstick = of("full", last, "cpu_seconds")
        costs = [
            f"{statistics.mean(live):.0f}" if live else "",
            f"{statistics.mean(time) / statistics.mean(yardstick):.2f}" if time and yardstick else "",
        ]
        lines.append(f"| {row} | {', '.join(f'{int(n):,}' for n in trainable)} | {' | '.join([*shown, *costs])} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
