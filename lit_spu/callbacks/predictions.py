"""Predictions for a split or for given texts: as JSON lines, as TSV for the GLUE server, or printed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_spu.files import write_text
from lit_spu.ranges import Checked, Length
from lit_spu.tasks import Task

Prediction: TypeAlias = tuple[float, list[float]]
"""The predicted value of one example (a label's number, or a number), and the probability of each label."""


class Predictions(Checked, Callback):
    """Callback that collects the results of `predict_step` on every device and writes each example once and in order.

    Args:
        files: Files to write: `.tsv` for the GLUE server, any other suffix for JSON lines. A second test set of the
            task gets its own files, for example `predictions.mismatched.tsv` next to `predictions.tsv`.
        echo: Also print each prediction.
    """

    def __init__(self, files: Annotated[Sequence[Path], Length()], echo: bool = False) -> None:
        self.files, self.echo = files, echo
        self.predictions: dict[tuple[int, int], Prediction] = {}  # by the number of the test set and of the row in it

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        columns = [outputs[name].tolist() for name in ("index", "prediction", "scores")]
        for index, value, probabilities in zip(*columns, strict=True):
            self.predictions[dataloader_idx, index] = value, probabilities

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        predictions = self._gather(trainer)
        if not trainer.is_global_zero:
            return
        task: Any = pl_module.task
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        parts = ("", *task.files.parts[1:]) if task.files else ("",)
        for number in sorted({number for number, _ in predictions}):
            rows = data.examples("predict", parts[number])
            predicted = {row: predictions[number, row] for row in range(len(rows)) if (number, row) in predictions}
            self._write(parts[number], rows, predicted, task)

    def _gather(self, trainer: Trainer) -> dict[tuple[int, int], Prediction]:
        """Return the predictions of all ranks; a row that two ranks predicted occurs once."""
        by_rank: list[Any] = [self.predictions]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            by_rank = [None] * trainer.world_size
            torch.distributed.all_gather_object(by_rank, self.predictions)
        return {key: prediction for predictions in by_rank for key, prediction in predictions.items()}

    def _write(
        self, part: str, rows: Sequence[Mapping[str, Any]], predictions: Mapping[int, Prediction], task: Task
    ) -> None:
        """Write, and print on request, the predictions for one test set by the row's number."""
        for file in self.files:
            lines = _tsv_lines(predictions, task) if file.suffix == ".tsv" else _json_lines(predictions, rows, task)
            write_text(file.with_stem(f"{file.stem}.{part}" if part else file.stem), "\n".join([*lines, ""]))
        if self.echo:
            for value, probabilities in predictions.values():
                by_label = _probabilities_by_label(probabilities, task)
                columns = "  ".join(f"{label} {probability:.4f}" for label, probability in by_label.items())
                print(f"{_label(value, task)}\t{columns}".rstrip())


def _json_lines(predictions: Mapping[int, Prediction], rows: Sequence[Mapping[str, Any]], task: Task) -> Iterator[str]:
    """Format the predictions as JSON, each with the fields of its example."""
    for index, (value, probabilities) in predictions.items():
        fields = {field: rows[index][field] for field in task.fields}
        result = {"label": _label(value, task), "scores": _probabilities_by_label(probabilities, task)}
        yield json.dumps({"index": index, **fields, **result}, ensure_ascii=False)


def _tsv_lines(predictions: Mapping[int, Prediction], task: Task) -> Iterator[str]:
    """Format the predictions for the GLUE server, with the labels as the official files spell them."""
    labels = (task.files.spelling if task.files else ()) or task.labels
    yield "index\tprediction"
    for index, (value, _) in predictions.items():
        yield f"{index}\t{f'{value:.3f}' if task.regression else labels[int(value)]}"


def _label(value: float, task: Task) -> str | float:
    """Return the predicted label, or the predicted number of a regression."""
    return round(value, 4) if task.regression else task.labels[int(value)]


def _probabilities_by_label(probabilities: Sequence[float], task: Task) -> dict[str, float]:
    """Return the probability of each label; a regression has none."""
    return {} if task.regression else dict(zip(task.labels, probabilities, strict=True))
