"""Metrics of a task: the loss and the scores that GLUE reports."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lit_spu.tasks import Metric, Task

CALIBRATED = "_calibrated"
"""End of the names of the metrics of calibrated predictions."""


def task_metrics(task: Task, calibrated: bool = False) -> Any:
    """Return a torchmetrics collection of the loss and the task's metrics, synchronised across processes.

    The metrics follow GLUE: accuracy over all examples, F1 of the second of two labels. Every value is that of
    scikit-learn or scipy, also where it is a convention: F1 and Matthews are 0 without two classes. A correlation of
    constant values is undefined, which is NaN. A loss that is not finite makes the mean loss not finite.

    Args:
        task: The task.
        calibrated: Add each metric of the predictions by `calibrate`, under its name and `_calibrated`. Unlike the
            others it is updated with logits [batch, labels] instead of predictions [batch].
    """
    from torchmetrics import Metric as BaseMetric
    from torchmetrics import MetricCollection
    from torchmetrics.classification import (
        BinaryF1Score,
        MulticlassAccuracy,
        MulticlassF1Score,
        MulticlassMatthewsCorrCoef,
    )
    from torchmetrics.utilities import dim_zero_cat  # of a list, or of a tensor that is gathered from all ranks

    class Mean(BaseMetric):
        """Mean of values with weights. Unlike torchmetrics' own, it drops no NaN."""

        full_state_update = False
        total: Tensor
        weight: Tensor

        def __init__(self) -> None:
            super().__init__()
            for name in ("total", "weight"):
                self.add_state(name, torch.tensor(0.0), dist_reduce_fx="sum")

        def update(self, value: Tensor, weight: float) -> None:
            self.total += value.detach() * weight
            self.weight += weight

        def compute(self) -> Any:
            return self.total / self.weight

    class Matthews(MulticlassMatthewsCorrCoef):
        """Matthews correlation that is 0 if all predictions or all targets are equal, as scikit-learn's."""

        def compute(self) -> Any:
            counts = self.confmat.cpu().double()
            total, targets, predictions = counts.sum(), counts.sum(1), counts.sum(0)
            covariance = counts.trace() * total - targets @ predictions
            variances = (total**2 - targets @ targets) * (total**2 - predictions @ predictions)
            value = covariance / variances.sqrt() if variances else torch.zeros_like(covariance)
            return value.float().to(self.confmat.device)

    class Collected(BaseMetric):
        """Base class of metrics that need all outputs and targets together."""

        full_state_update = False
        outputs: list[Tensor]
        targets: list[Tensor]

        def __init__(self) -> None:
            super().__init__()
            for name in ("outputs", "targets"):
                self.add_state(name, [], dist_reduce_fx="cat")

        def update(self, outputs: Tensor, targets: Tensor) -> None:
            self.outputs.append(outputs.detach())
            self.targets.append(targets)

    class Correlation(Collected):
        """Correlation of two lists of numbers: NaN if there are fewer than two, or if one list is constant."""

        def __init__(self, transform: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            self.transform = transform

        def compute(self) -> Any:
            lists = (self.outputs, self.targets)
            x, y = (self.transform(dim_zero_cat(values).cpu().double()) for values in lists)
            value = _correlate(x, y)
            return value.float().to(self.device)

    class Calibrated(Collected):
        """Metric of calibrated predictions, which depend on all logits."""

        def __init__(self, metric: BaseMetric) -> None:
            super().__init__()
            self.metric = metric

        def compute(self) -> Any:
            self.metric.reset()
            self.metric.update(calibrate(dim_zero_cat(self.outputs)).argmax(-1), dim_zero_cat(self.targets))
            return self.metric.compute()

    labels = len(task.labels)
    make: dict[Metric, Callable[[], Any]] = {
        "accuracy": lambda: MulticlassAccuracy(labels, average="micro"),
        "f1": lambda: BinaryF1Score() if labels == 2 else MulticlassF1Score(labels, average="macro"),
        "matthews": lambda: Matthews(labels),
        "pearson": lambda: Correlation(lambda values: values),
        "spearman": lambda: Correlation(_rank),
    }
    metrics: dict[str, Any] = {name: make[name]() for name in task.metrics}
    if calibrated:
        metrics |= {f"{name}{CALIBRATED}": Calibrated(make[name]()) for name in task.metrics}
    return MetricCollection({"loss": Mean(), **metrics}, compute_groups=False)


def calibrate(logits: Tensor) -> Tensor:
    """Return log-probabilities [texts, labels], less the log of each label's mean probability over the texts.

    This removes the preference of a prompt for some label words, and needs no labels: Batch Calibration
    (https://arxiv.org/abs/2309.17249).
    """
    log_probabilities = logits.float().log_softmax(-1)
    return log_probabilities - log_probabilities.logsumexp(0) + math.log(len(logits))


def format_score(value: float) -> str:
    """Return a score with four decimals, or – where it is undefined."""
    return "–" if math.isnan(value) else f"{value:.4f}"


def _correlate(x: Tensor, y: Tensor) -> Tensor:
    """Return Pearson's correlation of two vectors, or NaN if it is undefined."""
    if len(x) < 2 or (x == x[0]).all() or (y == y[0]).all():
        return x.new_tensor(float("nan"))
    x, y = ((values - values.mean()) for values in (x, y))
    correlation: Tensor = (x / x.norm()) @ (y / y.norm())
    return correlation.clamp(-1, 1)


def _rank(values: Tensor) -> Tensor:
    """Return the ranks of values from 1; equal values share the mean of their ranks."""
    _, inverse, counts = values.unique(return_inverse=True, return_counts=True)
    ranks: Tensor = counts.cumsum(0) - (counts - 1) / 2
    return ranks[inverse]
