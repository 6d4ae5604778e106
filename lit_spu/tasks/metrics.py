"""Metrics of a task: the loss and the scores that GLUE reports."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lit_spu.tasks import Metric, Task


def task_metrics(task: Task) -> Any:
    """Return a torchmetrics collection of the loss and the task's metrics, synchronised across processes.

    The metrics follow GLUE: accuracy over all examples, F1 of the second of two labels.
    """
    from torchmetrics import MeanMetric, MetricCollection, PearsonCorrCoef, SpearmanCorrCoef
    from torchmetrics.classification import (
        BinaryF1Score,
        MulticlassAccuracy,
        MulticlassF1Score,
        MulticlassMatthewsCorrCoef,
    )

    class Matthews(MulticlassMatthewsCorrCoef):
        """Matthews correlation that is 0 if all predictions are equal; torchmetrics returns up to 0.2 then."""

        def compute(self) -> Tensor:
            value = super().compute()
            return value if int((self.confmat.sum(0) > 0).sum()) > 1 else torch.zeros_like(value)

    labels = len(task.labels)
    make: dict[Metric, Callable[[], Any]] = {
        "accuracy": lambda: MulticlassAccuracy(labels, average="micro"),
        "f1": lambda: BinaryF1Score() if labels == 2 else MulticlassF1Score(labels, average="macro"),
        "matthews": lambda: Matthews(labels),
        "pearson": PearsonCorrCoef,
        "spearman": SpearmanCorrCoef,
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*will save all targets")  # two numbers for each example need little memory
        metrics: dict[str, Any] = {name: make[name]() for name in task.metrics}
    return MetricCollection({"loss": MeanMetric(), **metrics}, compute_groups=False)
