"""What a study came to: a flat record a run, and a row over the seeds of each method, task and backbone."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml
from torch import Tensor

from lit_spu.data.glue import GLUE
from lit_spu.errors import UserError
from lit_spu.measure import MIB
from lit_spu.study.compare import TEST, Outcome
from lit_spu.study.grid import ZERO_SHOT
from lit_spu.tasks import Task, load_task
from lit_spu.tasks.metrics import task_metrics

Record = dict[str, Any]
T = TypeVar("T")
K = TypeVar("K")

RESULTS = "results.json"
MAJORITY = "majority"
"""The row of the best constant answer."""


def grouped(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """The items by their key, both in the order in which they come."""
    found: dict[K, list[T]] = {}
    for item in items:
        found.setdefault(key(item), []).append(item)
    return found


def record(outcome: Outcome) -> Record:
    """All that is known of a finished run, flat: its place, its score, what was measured, its settings and versions."""
    run = outcome.run
    summary, cell = json.loads((run / "summary.json").read_text()), outcome.cell
    config = yaml.safe_load((run / "config.yaml").read_text()) if (run / "config.yaml").exists() else {}
    config.pop("run_dir", None)  # the study's own, and no setting
    launches = run / "launches.jsonl"
    launch = json.loads(launches.read_text().splitlines()[-1]) if launches.exists() else {}
    monitor = load_task(_task(cell.args)).monitor
    score = summary["best_score"] if summary["best_score"] is not None else summary["metrics"].get(monitor)
    if cell.tested:
        tested = json.loads((run / TEST / "summary.json").read_text()) if cell.args[0] == "fit" else summary
        score = tested["metrics"][monitor.replace("val/", "test/")]
    checkpoint = run / "checkpoints" / "best.ckpt"
    place = {"row": cell.row, "task": cell.task, "backbone": cell.backbone, "seed": cell.seed, "rate": cell.rate}
    return {
        **place,
        "score": score,
        "portion": "test" if cell.tested else "validation",
        "metric": monitor.removeprefix("val/"),
        "checkpoint_mib": checkpoint.stat().st_size / MIB if checkpoint.exists() else None,
        **{name: summary[name] for name in ("steps", "epochs", "wall_seconds", "device", "devices")},
        "process_seconds": outcome.seconds,
        **summary["measured"],
        **summary["metrics"],
        **{f"config.{name}": value for name, value in flat(config).items()},
        **{f"version.{name}": version for name, version in summary["versions"].items()},
        "git": launch.get("git"),
        "command": cell.command,
        "curve": curve(run / "metrics.csv", monitor),
        "data": config.get("data"),
    }


def kept(out: Path) -> dict[str, Record]:
    """The records that are in `results.json`, by their command lines; those of an earlier study of other runs too."""
    try:
        results = json.loads((out / RESULTS).read_text())
        runs: list[Record] = [*results.get("others", []), *results["runs"]]
    except FileNotFoundError:
        return {}
    except (ValueError, KeyError) as error:
        raise UserError(f"{out / RESULTS} is no study's: {error!r}. Move it away, or give another --out.") from error
    return {run["command"]: run for run in runs}


def flat(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Nested settings by their dotted names; lists are written out."""
    if isinstance(settings, Mapping) and settings:
        return {k: v for name, value in settings.items() for k, v in flat(value, f"{prefix}{name}.").items()}
    return {prefix.removesuffix("."): json.dumps(settings) if isinstance(settings, list) else settings}


def curve(metrics: Path, monitor: str) -> list[tuple[int, float]]:
    """The monitored metric by step."""
    if not metrics.exists():
        return []
    with metrics.open() as file:
        return [(int(row["step"]), float(row[monitor])) for row in csv.DictReader(file) if row.get(monitor)]


def constants(records: Sequence[Record]) -> dict[tuple[str, str], list[float]]:
    """By task and backbone, the score of every constant answer, best first: the majority's, and a collapsed run's."""
    found = {}
    for where, here in grouped(records, _place).items():
        data = next((r["data"] for r in here if r["data"]), None)
        if data:
            task = load_task(data["task"])
            labels = torch.tensor([row["label"] for row in GLUE(**data).examples(here[0].get("portion", "validation"))])
            answers = [labels.mean().item()] if task.regression else range(len(task.labels))
            found[where] = sorted((_constant(task, labels, answer) for answer in answers), reverse=True)
    return found


def _place(r: Record) -> tuple[str, str]:
    return r["task"], r["backbone"]


def _constant(task: Task, labels: Tensor, answer: float) -> float:
    metric = task_metrics(task)[task.metrics[0]]
    metric.update(torch.full_like(labels, answer), labels)
    return float(metric.compute().nan_to_num(0.0))


@dataclass(frozen=True)
class Row:
    """One method on one task and backbone, over its seeds."""

    name: str
    task: str
    backbone: str
    rate: float
    metric: str
    scores: Sequence[float]
    costs: Mapping[str, float] = field(default_factory=dict)
    curve: Sequence[tuple[float, float]] = ()
    collapsed: int = 0
    """Seeds whose score is that of a constant answer."""
    command: str = ""

    @property
    def score(self) -> float:
        """The mean over the seeds."""
        return statistics.mean(self.scores)

    @property
    def deviation(self) -> float | None:
        """The sample standard deviation over the seeds, where there are two or more."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None


def rows(records: Sequence[Record], fixed: Mapping[tuple[str, str], Sequence[float]]) -> list[Row]:
    """A row for each method, task and backbone, at its best learning rate; `fixed` has each one's constant scores."""
    found = []
    for (task, backbone), here in grouped((r for r in records if r["score"] is not None), _place).items():
        constant, metric = fixed.get((task, backbone), []), here[0]["metric"]
        for name, of_row in grouped(here, lambda r: str(r["row"])).items():
            by_rate = grouped(of_row, lambda r: float(r["rate"]))
            rate, best = max(by_rate.items(), key=lambda item: statistics.mean(r["score"] for r in item[1]))
            collapsed = sum(any(math.isclose(r["score"], c, abs_tol=1e-6) for c in constant) for r in best)
            found.append(
                Row(
                    name,
                    task,
                    backbone,
                    rate,
                    metric,
                    [r["score"] for r in best],
                    _means(best),
                    _mean_curve([r["curve"] for r in best]),
                    0 if name == ZERO_SHOT else collapsed,
                    best[0]["command"],
                )
            )
        if constant:
            found.append(Row(MAJORITY, task, backbone, 1.0, metric, constant[:1]))
    return found


def _means(records: Sequence[Record]) -> dict[str, float]:
    """The mean of every number that was measured, over the seeds that have it."""
    names = dict.fromkeys(name for r in records for name, value in r.items() if _measure(name, value))
    return {name: statistics.mean(r[name] for r in records if isinstance(r.get(name), int | float)) for name in names}


def _measure(name: str, value: object) -> bool:
    return isinstance(value, int | float) and not name.startswith(("config.", "version.", "seed", "rate", "score"))


def _mean_curve(curves: Sequence[Sequence[tuple[int, float]]]) -> list[tuple[float, float]]:
    """The mean score at every step that all seeds have."""
    steps = [step for step, _ in curves[0] if all(step in dict(curve) for curve in curves)]
    return [(step, statistics.mean(dict(curve)[step] for curve in curves)) for step in steps]


def unequal(records: Sequence[Record]) -> list[str]:
    """What is not the same for all rows of a task and backbone, and should be for the comparison to be fair.

    Runs of other seeds may differ, as in the split that they draw; and a run may be older than a setting.
    """
    found = []
    trained = [r for r in records if r["row"] != ZERO_SHOT]
    for (task, backbone), here in grouped(trained, _place).items():
        data = [name for name in dict.fromkeys(n for r in here for n in r) if name.startswith("config.data.")]
        for name in ("steps", "config.trainer.accumulate_grad_batches", "devices", *data):
            known = [r for r in here if name in r]
            if any(len({r[name] for r in same}) > 1 for same in grouped(known, lambda r: r["seed"]).values()):
                values = grouped(known, itemgetter(name))
                said = (f"{value}: {', '.join(grouped(some, lambda r: r['row']))}" for value, some in values.items())
                found.append(f"{name.removeprefix('config.')} on {task}, {backbone}: {'; '.join(said)}")
        runs = grouped(here, lambda r: r["row"])
        if len({tuple(sorted((r["seed"], r["rate"]) for r in cells)) for cells in runs.values()}) > 1:
            counts = ", ".join(f"{name}: {len(cells)}" for name, cells in runs.items())
            found.append(f"finished runs on {task}, {backbone}: {counts}")
    return found


def _task(args: Sequence[str]) -> str:
    return next(arg.partition("=")[2] for arg in args if arg.startswith("--data.task="))


def write(records: Sequence[Record], found: Sequence[Row], out: Path) -> None:
    """`results.csv`, a line a run, and `results.json`, which also has the rows and the learning curves.

    Records of runs that are not of this study stay in `results.json`: their directories may be gone.
    """
    others = kept(out)
    for r in records:
        others.pop(r["command"], None)
    names = list(dict.fromkeys(name for r in records for name in r if name not in ("curve", "data")))
    with (out / "results.csv").open("w") as file:
        writer = csv.DictWriter(file, names, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
    summary = [
        {
            "row": row.name,
            "task": row.task,
            "backbone": row.backbone,
            "rate": row.rate,
            "metric": row.metric,
            "score_mean": row.score,
            "score_std": row.deviation,
            "seeds": len(row.scores),
            "collapsed": row.collapsed,
            **row.costs,
        }
        for row in found
    ]
    (out / RESULTS).write_text(
        json.dumps({"rows": summary, "runs": list(records), "others": list(others.values())}, indent=1) + "\n"
    )
