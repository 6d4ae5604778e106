"""Read and write the results of a study: a flat record per run, and a row per method, task and backbone."""

from __future__ import annotations

import csv
import json
import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from lit_spu.data.glue import GLUE
from lit_spu.errors import UserError
from lit_spu.files import replace_path, write_text
from lit_spu.measure import MIB
from lit_spu.safe_yaml import parse_json, read_mapping
from lit_spu.study.compare import TEST, Outcome, refuse_damage
from lit_spu.study.grid import CALIBRATED_ZERO_SHOT, MAJORITY, UNTRAINED, ZERO_SHOT
from lit_spu.study.old_names import use_present_names
from lit_spu.tasks import Task, load_task
from lit_spu.tasks.metrics import CALIBRATED, task_metrics

Record = dict[str, Any]
"""Results and settings of one finished run, by name."""

T = TypeVar("T")
K = TypeVar("K")

RESULTS = "results.json"


def group_by(items: Iterable[T], key: Callable[[T], K]) -> dict[K, list[T]]:
    """Group items by a key; keys and items stay in their original order."""
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return groups


def make_record(outcome: Outcome) -> Record:
    """Return the flat record of a finished run: place in the grid, score, measurements, settings and versions.

    Raises:
        UserError: If a file of the run is missing, damaged or not of a run, or the score is not finite.
    """
    with refuse_damage(outcome.run):
        return _check_record(_read_run(outcome.run, outcome))


def _read_run(run: Path, outcome: Outcome) -> Record:
    summary, cell = parse_json((run / "summary.json").read_text()), outcome.cell
    config = read_mapping(run / "config.yaml") if (run / "config.yaml").exists() else {}
    config = json.loads(json.dumps(config, default=str))  # as it will be in results.json
    config.pop("run_dir", None)  # chosen by the study, not a setting of the method
    launches = run / "launches.jsonl"
    launch = parse_json(launches.read_text().splitlines()[-1]) if launches.exists() else {}
    monitor = load_task(_find_task(cell.args)).monitor
    score = summary["best_score"] if summary["best_score"] is not None else summary["metrics"].get(monitor)
    if cell.tested:
        test_summary = parse_json((run / TEST / "summary.json").read_text()) if cell.args[0] == "fit" else summary
        score = test_summary["metrics"][monitor.replace("val/", "test/")]
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
        **{f"config.{name}": value for name, value in flatten(config).items()},
        **{f"version.{name}": version for name, version in summary["versions"].items()},
        "git": launch.get("git"),
        "command": cell.command,
        "curve": read_curve(run / "metrics.csv", monitor),
        "data": config.get("data"),
    }


_TYPES: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("row", "task", "backbone", "metric", "command"), str),
    **dict.fromkeys(("seed", "steps"), int),
    "rate": (int, float),
    "score": (int, float, NoneType),
    "curve": list,
    "data": (dict, NoneType),
}
"""Entries that every record has, and their types."""


def _check_record(record: Record) -> Record:
    """Return a record with single values only, apart from its curve and its data.

    Infinite and NaN costs become None, and such points of the curve are left out.

    Raises:
        KeyError, TypeError, ValueError: If an entry is missing or of another type, or the score is not finite.
    """
    for name, kind in _TYPES.items():
        if not isinstance(record[name], kind):
            raise TypeError(f"{name} is {record[name]!r}")
    if not math.isfinite(record["rate"]) or not math.isfinite(record["score"] or 0):
        raise ValueError(f"the score is {record['score']} at {record['rate']} times the learning rate")
    for step, value in record["curve"]:
        if not (isinstance(step, int) and isinstance(value, int | float)):
            raise TypeError(f"the curve has {value!r} at step {step!r}")
    curve = [(step, value) for step, value in record["curve"] if math.isfinite(value)]
    single = {name: value if name == "data" else _single_value(value) for name, value in record.items()}
    return single | {"curve": curve}


def _single_value(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if isinstance(value, int | str | NoneType) else json.dumps(value, default=str)


class Saved(NamedTuple):
    """Contents of `results.json`: records by command line, and why other records in it cannot be read."""

    records: dict[str, Record]
    problems: list[str]


def read_records(out: Path) -> Saved:
    """Read the records in `results.json`.

    They include runs that do not belong to the present study. Names of older versions are replaced.

    Raises:
        UserError: If the file does not contain results of a study.
    """
    file, saved = out / RESULTS, Saved({}, [])
    if not file.exists():
        return saved
    try:
        with refuse_damage(file):
            results = parse_json(file.read_text(encoding="utf-8"))
            runs = [*results.get("others", []), *results["runs"]]
    except UserError as error:
        raise UserError(f"{error}. Move away what is no result of a study, or choose another --out.") from error
    for run in runs:
        try:
            with refuse_damage(file):
                record = _check_record(use_present_names(run))
                saved.records[record["command"]] = record
        except UserError as error:
            saved.problems.append(str(error))
    return saved


def flatten(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings to dotted names. Lists become JSON text."""
    if isinstance(settings, Mapping) and settings:
        return {k: v for name, value in settings.items() for k, v in flatten(value, f"{prefix}{name}.").items()}
    return {prefix.removesuffix("."): json.dumps(settings) if isinstance(settings, list) else settings}


def read_curve(metrics: Path, monitor: str) -> list[tuple[int, float]]:
    """Read the steps and values of the monitored metric from `metrics.csv`."""
    if not metrics.exists():
        return []
    with metrics.open() as file:
        return [(int(row["step"]), float(row[monitor])) for row in csv.DictReader(file) if row.get(monitor)]


def score_constants(records: Sequence[Record]) -> tuple[dict[tuple[str, str], list[float]], list[str]]:
    """Score every constant answer on the data of each task and backbone.

    Returns:
        The scores by task and backbone, best first; none for a correlation, which is undefined then. The first one is
        the majority baseline. A run whose score equals one of them, or is undefined, has collapsed. Then, for each task
        whose data cannot be read, why it has no scores.
    """
    scores, problems = {}, []
    for place, group in group_by(records, _task_and_backbone).items():
        data = next((record["data"] for record in group if record["data"]), None)
        if data:
            try:
                scores[place] = _score_answers(data, group[0].get("portion", "validation"))
            except Exception as error:  # the data may be gone or changed since the runs, in any manner
                problems.append(f"no majority row on {', '.join(place)}: {' '.join(str(error).split())}")
    return scores, problems


def _score_answers(data: Mapping[str, Any], portion: Any) -> list[float]:
    task = load_task(data["task"])
    labels = torch.tensor([example["label"] for example in GLUE(**data).examples(portion)])
    answers = [labels.mean().item()] if task.regression else range(len(task.labels))
    found = (_score_constant(task, labels, answer) for answer in answers)
    return sorted((score for score in found if not math.isnan(score)), reverse=True)


def _task_and_backbone(record: Record) -> tuple[str, str]:
    return record["task"], record["backbone"]


def _score_constant(task: Task, labels: Tensor, answer: float) -> float:
    metric = task_metrics(task)[task.metrics[0]]
    metric.update(torch.full_like(labels, answer), labels)
    return float(metric.compute())


@dataclass(frozen=True)
class Row:
    """Results of one method on one task and backbone, over its seeds."""

    name: str
    task: str
    backbone: str
    rate: float
    metric: str
    scores: Sequence[float]
    costs: Mapping[str, float] = field(default_factory=dict)
    """Mean over the seeds of every measured number, by its name in the records."""
    curve: Sequence[tuple[float, float]] = ()
    """Mean learning curve: pairs of a step and a score."""
    collapsed: int = 0
    """Number of seeds with the score of a constant answer."""
    command: str = ""
    """Command line of the first seed."""
    seeds: Sequence[int] = ()
    """Random seeds of the scores."""

    @property
    def by_seed(self) -> dict[int, float]:
        """Scores by random seed."""
        return dict(zip(self.seeds, self.scores, strict=True))

    @property
    def score(self) -> float:
        """Mean over the seeds."""
        return statistics.mean(self.scores)

    @property
    def deviation(self) -> float | None:
        """Sample standard deviation over the seeds, or None for a single seed."""
        return statistics.stdev(self.scores) if len(self.scores) > 1 else None


def rows(records: Sequence[Record], constant_scores: Mapping[tuple[str, str], Sequence[float]]) -> list[Row]:
    """Return a row for each method, task and backbone, at the learning rate that is best on validation.

    Args:
        records: Records of finished runs.
        constant_scores: Scores of the constant answers by task and backbone, from `score_constants`.
    """
    table = []
    scored = [record for record in records if record["score"] is not None]
    scored += [
        record | {"row": CALIBRATED_ZERO_SHOT, "score": score}
        for record in scored
        for name, score in record.items()
        if record["row"] == ZERO_SHOT and name.endswith(f"/{record['metric']}{CALIBRATED}")
    ]
    for (task, backbone), group in group_by(scored, _task_and_backbone).items():
        constant, metric = constant_scores.get((task, backbone), []), group[0]["metric"]
        for name, of_row in group_by(group, lambda record: str(record["row"])).items():
            by_rate = group_by(of_row, lambda record: float(record["rate"]))
            rate, best = max(by_rate.items(), key=lambda item: statistics.mean(map(_validation_score, item[1])))
            collapsed = sum(any(math.isclose(run["score"], c, abs_tol=1e-6) for c in constant) for run in best)
            collapsed += sum(_is_undefined(run) and _is_in_row(run, task, backbone, name, rate) for run in records)
            table.append(
                Row(
                    name,
                    task,
                    backbone,
                    rate,
                    metric,
                    scores=[run["score"] for run in best],
                    costs=_average_costs(best),
                    curve=_average_curves([run["curve"] for run in best]),
                    collapsed=0 if name in UNTRAINED else collapsed,
                    command=best[0]["command"],
                    seeds=[run["seed"] for run in best],
                )
            )
        if constant:
            table.append(Row(MAJORITY, task, backbone, 1.0, metric, constant[:1]))
    return table


def _is_undefined(record: Record) -> bool:
    """Return whether a run was scored, but its metric was undefined: a correlation of equal predictions."""
    return record["score"] is None and f"val/{record['metric']}" in record


def _is_in_row(record: Record, *row: object) -> bool:
    return tuple(record[name] for name in ("task", "backbone", "row", "rate")) == row


def _validation_score(record: Record) -> float:
    """Return the best score on validation: a rate that was chosen on test would make the test score too high."""
    score: float = max((score for _, score in record["curve"]), default=record["score"])
    return score


def _average_costs(records: Sequence[Record]) -> dict[str, float]:
    """Average every measured number over the records that have it."""
    names = dict.fromkeys(name for record in records for name, value in record.items() if _is_cost(name, value))
    return {name: statistics.mean(r[name] for r in records if isinstance(r.get(name), int | float)) for name in names}


def _is_cost(name: str, value: object) -> bool:
    """Return whether a record's entry is a measured number."""
    return isinstance(value, int | float) and not name.startswith(("config.", "version.", "seed", "rate", "score"))


def _average_curves(curves: Sequence[Sequence[tuple[int, float]]]) -> list[tuple[float, float]]:
    """Average the scores at every step that all curves have."""
    steps = [step for step, _ in curves[0] if all(step in dict(curve) for curve in curves)]
    return [(step, statistics.mean(dict(curve)[step] for curve in curves)) for step in steps]


def find_unfair_differences(records: Sequence[Record]) -> list[str]:
    """List differences between the rows of a task and backbone that make their comparison unfair.

    Compared are steps, batches, devices, data settings and the number of finished runs. Settings may differ between
    seeds (each seed can draw its own split). Records without a setting are skipped: they may be older than it.
    """
    differences = []
    trained = [record for record in records if record["row"] != ZERO_SHOT]
    for (task, backbone), group in group_by(trained, _task_and_backbone).items():
        names = dict.fromkeys(name for record in group for name in record)
        data = [name for name in names if name.startswith("config.data.")]
        for name in ("steps", "config.trainer.accumulate_grad_batches", "devices", *data):
            present = [record for record in group if name in record]
            by_seed = group_by(present, lambda record: record["seed"]).values()
            if any(len({record[name] for record in same_seed}) > 1 for same_seed in by_seed):
                values = group_by(present, itemgetter(name))
                texts = (f"{value}: {', '.join(group_by(some, itemgetter('row')))}" for value, some in values.items())
                differences.append(f"{name.removeprefix('config.')} on {task}, {backbone}: {'; '.join(texts)}")
        runs = group_by(group, itemgetter("row"))
        if len({tuple(sorted((run["seed"], run["rate"]) for run in of_row)) for of_row in runs.values()}) > 1:
            counts = ", ".join(f"{name}: {len(of_row)}" for name, of_row in runs.items())
            differences.append(f"finished runs on {task}, {backbone}: {counts}")
    return differences


def _find_task(args: Sequence[str]) -> str:
    return next(arg.partition("=")[2] for arg in args if arg.startswith("--data.task="))


def write(records: Sequence[Record], table: Sequence[Row], out: Path) -> None:
    """Write `results.csv` (a line per run) and `results.json` (the rows, and the records with learning curves).

    Records of other runs that are already in `results.json` stay there: their run directories may be gone.
    """
    commands = {record["command"] for record in records}
    others = [record for command, record in read_records(out).records.items() if command not in commands]
    names = list(dict.fromkeys(name for record in records for name in record if name not in ("curve", "data")))
    with replace_path(out / "results.csv") as partial, partial.open("w", encoding="utf-8") as file:
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
        for row in table
    ]
    contents = {"rows": summary, "runs": list(records), "others": others}
    write_text(out / RESULTS, json.dumps(contents, indent=1, default=str) + "\n")
