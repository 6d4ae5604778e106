"""Every metric equals that of scikit-learn or scipy, above all where its definition ends."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn import metrics as sklearn_metrics

from lit_spu.tasks import load_task
from lit_spu.tasks.metrics import CALIBRATED, format_score, task_metrics

TASKS = {
    count: load_task({"name": "t", "fields": ["x"], "labels": list("abcd"[:count]), "metrics": [*names]})
    for count in (2, 3, 4)
    for names in [("accuracy", "f1", "matthews")]
}
REGRESSION = load_task({"name": "t", "fields": ["x"], "score_range": [0, 5], "metrics": ["pearson", "spearman"]})


def compute(task: Any, batches: list[tuple[Any, Any]], dtype: Any) -> dict[str, float]:
    """Return the metrics of batches of predictions and targets."""
    metrics = task_metrics(task)
    for predictions, targets in batches:
        for name in task.metrics:
            metrics[name].update(torch.tensor(predictions, dtype=dtype), torch.tensor(targets, dtype=dtype))
    return {name: float(metrics[name].compute()) for name in task.metrics}


def oracle(function: Callable[..., Any], *args: Any, **kwargs: Any) -> float:
    """Return the value of scikit-learn or scipy, without its warnings; NaN where scipy refuses."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return float(getattr(value := function(*args, **kwargs), "statistic", value))
        except ValueError:
            return math.nan


@st.composite
def answers(draw: Any, values: Callable[[], Any]) -> list[tuple[list[Any], list[Any]]]:
    """Batches of predictions and targets, often constant."""
    size = draw(st.integers(1, 12))
    lists = [
        draw(st.lists(values(), min_size=size, max_size=size) | values().map(lambda value: [value] * size))
        for _ in range(2)
    ]
    cut = draw(st.integers(0, size - 1))
    return [(lists[0][part], lists[1][part]) for part in (slice(cut), slice(cut, None)) if lists[0][part]]


@given(data=st.data(), labels=st.sampled_from([2, 3, 4]))
def test_metrics_of_classes_are_scikit_learns(data: st.DataObject, labels: int) -> None:
    batches = data.draw(answers(lambda: st.integers(0, labels - 1)))
    guess, true = (np.concatenate([batch[side] for batch in batches]) for side in (0, 1))
    average = "binary" if labels == 2 else "macro"
    assert compute(TASKS[labels], batches, torch.long) == pytest.approx(
        {
            "accuracy": oracle(sklearn_metrics.accuracy_score, true, guess),
            "f1": oracle(sklearn_metrics.f1_score, true, guess, average=average),
            "matthews": oracle(sklearn_metrics.matthews_corrcoef, true, guess),
        },
        abs=1e-6,
    )


@given(batches=answers(lambda: st.integers(-3, 3) | st.floats(-5, 5, width=32).map(lambda x: round(x, 3))))
def test_metrics_of_regressions_are_scipys(batches: list[tuple[list[float], list[float]]]) -> None:
    x, y = (np.concatenate([batch[side] for batch in batches]).astype(np.float32) for side in (0, 1))
    x, y = x.astype(np.float64), y.astype(np.float64)
    expected = {"pearson": oracle(stats.pearsonr, x, y), "spearman": oracle(stats.spearmanr, x, y)}
    assert compute(REGRESSION, batches, torch.float32) == pytest.approx(expected, abs=1e-5, nan_ok=True)


@settings(max_examples=25)
@given(seed=st.integers(0, 99), size=st.integers(2, 40), labels=st.sampled_from([2, 3, 4]))
def test_calibrated_metrics_are_those_of_probabilities_over_their_mean(seed: int, size: int, labels: int) -> None:
    random = np.random.default_rng(seed)
    logits, true = (
        random.normal(size=(size, labels)) * 3 + random.normal(size=labels) * 9,
        random.integers(labels, size=size),
    )
    metrics = task_metrics(TASKS[labels], calibrated=True)
    for part in np.split(np.arange(size), [size // 3]):
        for name in TASKS[labels].metrics:
            metrics[f"{name}{CALIBRATED}"].update(torch.tensor(logits[part]), torch.tensor(true[part]))
    probabilities = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    guess = (probabilities / probabilities.mean(0)).argmax(1)
    for name in TASKS[labels].metrics:
        plain = compute(TASKS[labels], [(guess, true)], torch.long)[name]
        for _ in range(2):  # computing a value changes nothing
            assert float(metrics[f"{name}{CALIBRATED}"].compute()) == pytest.approx(plain, abs=1e-6)


def test_lists_are_gathered_from_all_ranks() -> None:
    def gathered(task: Any, name: str, answers: torch.Tensor, targets: torch.Tensor) -> float:
        """Compute a metric on the first of two ranks; the second has the same answers in reverse."""
        metric = task_metrics(task, calibrated=not task.regression)[name]
        metric.distributed_available_fn = lambda: True
        metric.dist_sync_fn = lambda values, group=None: [values, values.flip(0)]
        metric.update(answers, targets)
        return float(metric.compute())

    torch.manual_seed(0)
    x, y, logits, labels = torch.randn(9), torch.randn(9), torch.randn(9, 2), torch.randint(2, (9,))
    assert gathered(REGRESSION, "pearson", x, y) == pytest.approx(oracle(stats.pearsonr, x, y), abs=1e-5)
    guess = (logits.softmax(-1) / logits.softmax(-1).mean(0)).argmax(1)
    expected = pytest.approx(oracle(sklearn_metrics.accuracy_score, labels, guess))
    assert gathered(TASKS[2], f"accuracy{CALIBRATED}", logits, labels) == expected


def test_matthews_of_one_true_class_is_0() -> None:
    guess = [0] * 23 + [1]
    assert compute(TASKS[2], [(guess, [0] * 24)], torch.long)["matthews"] == 0.0


def test_the_mean_loss_keeps_nan_and_weighs_by_examples() -> None:
    loss = task_metrics(REGRESSION)["loss"]
    loss.update(torch.tensor(1.0), 3)
    loss.update(torch.tensor(3.0), 1)
    assert float(loss.compute()) == 1.5
    loss.update(torch.tensor(torch.nan), 1)
    assert math.isnan(loss.compute())


def test_an_undefined_score_is_shown_as_a_dash() -> None:
    assert [format_score(value) for value in (0.5, math.nan)] == ["0.5000", "–"]
