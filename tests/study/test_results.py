"""Rows, baselines and unfair differences of hand-made records."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from lit_spu.data.glue import GLUE
from lit_spu.study.grid import CALIBRATED_ZERO_SHOT, MAJORITY, ZERO_SHOT
from lit_spu.study.results import Record, find_unfair_differences, flatten, rows, score_constants


def record(row: str, seed: int, score: float | None, rate: float = 1.0, **more: Any) -> Record:
    place = {"row": row, "task": "sst2", "backbone": "mini-bert", "seed": seed, "rate": rate}
    made: Record = {
        "score": score,
        "metric": "accuracy",
        "steps": 10,
        "devices": 1,
        "command": "lit-spu fit",
        "curve": [],
    }
    return {**place, **made, "data": {"task": "sst2", "limit_validation": 60}, **more}


def test_a_row_is_the_mean_over_the_seeds_at_the_best_rate() -> None:
    records = [
        record("lst", 1, 0.7, memory=10.0, curve=[(5, 0.6), (10, 0.7)]),
        record("lst", 2, 0.8, memory=30.0, curve=[(5, 0.4), (10, 0.8), (15, 0.1)]),
        record("lst", 1, 0.9, rate=3),
        record("lst", 2, 0.1, rate=3),
        record("lst", 3, None),  # a run without validation
    ]
    (row,) = rows(records, {})
    assert (row.rate, row.score) == (1.0, 0.75)
    assert row.deviation == pytest.approx(0.0707, abs=1e-4)
    assert row.costs["memory"] == 20
    assert row.curve == [(5, 0.5), (10, 0.75)]


def test_a_rate_is_chosen_on_validation_and_never_on_test() -> None:
    records = [
        record("lst", 1, 0.6, portion="test", curve=[(5, 0.9)]),
        record("lst", 1, 0.8, rate=3, portion="test", curve=[(5, 0.7)]),
    ]
    (row,) = rows(records, {})
    assert (row.rate, row.score) == (1.0, 0.6)


def test_constant_answers_are_the_majority_row_and_mark_collapsed_runs() -> None:
    labels = Counter(row["label"] for row in GLUE(task="sst2", limit_validation=60).examples("validation"))
    shares = sorted((count / 60 for count in labels.values()), reverse=True)
    fixed, problems = score_constants([record("lst", 1, 0.5)])
    assert not problems
    assert fixed[("sst2", "mini-bert")] == pytest.approx(shares)
    scored = [record("lst", 1, shares[0]), record("lst", 2, shares[1]), record("lst", 3, 0.99)]
    found = {row.name: row for row in rows([*scored, record("full", 1, 0.99)], fixed)}
    assert (found["lst"].collapsed, found["full"].collapsed) == (2, 0)
    assert found[MAJORITY].score == pytest.approx(shares[0])
    assert found[MAJORITY].deviation is None


@pytest.mark.parametrize("stage", ["val", "test"])
def test_the_calibrated_score_of_the_zero_shot_run_is_a_row(stage: str) -> None:
    scores = {
        f"{stage}/accuracy": 0.5,
        f"{stage}/accuracy_calibrated": 0.0,
        f"{stage}/mismatched_accuracy_calibrated": 1,
    }
    records = [record(ZERO_SHOT, 1, 0.5, **scores), record("lst", 1, 0.9, **{"val/accuracy_calibrated": 0.8})]
    found = {row.name: row for row in rows(records, {("sst2", "mini-bert"): [0.5, 0.0]})}
    assert {name: row.scores for name, row in found.items()} == {
        ZERO_SHOT: [0.5],
        CALIBRATED_ZERO_SHOT: [0.0],
        "lst": [0.9],
        MAJORITY: [0.5],
    }
    assert found[CALIBRATED_ZERO_SHOT].collapsed == 0
    assert [row.name for row in rows([record(ZERO_SHOT, 1, 0.5)], {})] == [ZERO_SHOT]


def test_a_constant_answer_has_no_score_in_regression() -> None:
    regression = record("lst", 1, 0.5, data={"task": "stsb", "limit_validation": 20})
    assert score_constants([regression])[0]["sst2", "mini-bert"] == []


def test_a_seed_without_a_score_counts_as_collapsed() -> None:
    undefined = record("lst", 2, None) | {"val/accuracy": None}
    seeds = [record("lst", 1, 0.5), undefined, record("lst", 3, None)]
    (row,) = rows(seeds, {})
    assert (row.scores, row.collapsed) == ([0.5], 1)


def test_unfair_differences_are_described() -> None:
    fair = [record("full", 1, 0.5), record("lst", 1, 0.6)]
    assert find_unfair_differences(fair) == []
    (steps,) = find_unfair_differences([record("full", 1, 0.5), record("lst", 1, 0.6, steps=20)])
    assert steps == "steps on sst2, mini-bert: 10: full; 20: lst"
    batch = "config.data.batch_size"
    (batches,) = find_unfair_differences([record("full", 1, 0.5, **{batch: 32}), record("lst", 1, 0.6, **{batch: 16})])
    assert batches == "data.batch_size on sst2, mini-bert: 32: full; 16: lst"
    split = "config.data.split_seed"
    drawn = [record(row, seed, 0.5, **{split: seed}) for row in ("full", "lst") for seed in (1, 2)]
    assert find_unfair_differences([*drawn, record("older", 1, 0.5), record("older", 2, 0.5)]) == []
    assert find_unfair_differences([*drawn[:3], record("lst", 2, 0.5, **{split: 1})]) == [
        "data.split_seed on sst2, mini-bert: 1: full, lst; 2: full"
    ]
    (seeds,) = find_unfair_differences([*fair, record("lst", 2, 0.6)])
    assert seeds == "finished runs on sst2, mini-bert: full: 1, lst: 2"


def test_settings_are_flattened() -> None:
    nested = {"data": {"task": "sst2", "drop": [1, 2]}, "model": None, "empty": {}}
    assert flatten(nested) == {"data.task": "sst2", "data.drop": "[1, 2]", "model": None, "empty": {}}


def test_a_custom_task_has_a_majority_row(tmp_path: Path) -> None:
    """Its row has a short name that cannot be loaded as a task; its data settings can."""
    own = Path(__file__).parents[2] / "examples" / "own_task"
    data = {"task": str(own / "task.yaml"), "source": str(own)}
    scored = [record("lst", 1, 0.9, data=data) | {"task": "task"}]
    found = {row.name: row for row in rows(scored, score_constants(scored)[0])}
    assert found[MAJORITY].metric == "accuracy"
    assert 0 < found[MAJORITY].score < 1
