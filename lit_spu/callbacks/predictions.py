"""Answers to a split, or to sentences given: as JSON lines, as the GLUE server's TSV, or printed."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_spu.tasks import Task

Answers = dict[tuple[int, int], tuple[float, list[float]]]
"""Prediction and scores by the number of the set and that of the row in it."""


class Predictions(Callback):
    """Collects what `predict_step` gives on every device, and writes each example's answer once and in order.

    Args:
        files: Where to write: `.tsv` as the GLUE server wants it, anything else as JSON lines. A task's second test set
            gets files of its own, `predictions.mismatched.tsv` beside `predictions.tsv`.
        echo: Print each answer, too.
    """

    def __init__(self, files: Sequence[Path], echo: bool = False) -> None:
        self.files, self.echo = files, echo
        self.answers: Answers = {}

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        rows = [outputs[name].tolist() for name in ("index", "prediction", "scores")]
        for index, prediction, scores in zip(*rows, strict=True):
            self.answers[dataloader_idx, index] = prediction, scores

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        shares: list[Any] = [self.answers]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            shares = [None] * trainer.world_size
            torch.distributed.all_gather_object(shares, self.answers)
        if not trainer.is_global_zero:
            return
        task: Any = pl_module.task
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        answers = {key: answer for share in shares for key, answer in share.items()}  # a row that ranks share, once
        parts = ("", *task.files.parts[1:]) if task.files else ("",)
        for number in sorted({number for number, _ in answers}):
            rows = data.examples("predict", parts[number])
            its_answers = {row: answers[number, row] for row in range(len(rows)) if (number, row) in answers}
            self._write(parts[number], rows, its_answers, task)

    def _write(self, part: str, rows: Sequence[Mapping[str, Any]], answers: Mapping[int, Any], task: Task) -> None:
        for file in self.files:
            lines = _server(answers, task) if file.suffix == ".tsv" else _json(answers, rows, task)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.with_stem(f"{file.stem}.{part}" if part else file.stem).write_text("\n".join([*lines, ""]), "utf-8")
        if self.echo:
            for prediction, scores in answers.values():
                named = "  ".join(f"{label} {score:.4f}" for label, score in _scores(scores, task).items())
                print(f"{_label(prediction, task)}\t{named}".rstrip())


def _json(answers: Mapping[int, Any], rows: Sequence[Mapping[str, Any]], task: Task) -> Iterator[str]:
    for index, (prediction, scores) in answers.items():
        fields = {field: rows[index][field] for field in task.fields}
        answer = {"label": _label(prediction, task), "scores": _scores(scores, task)}
        yield json.dumps({"index": index, **fields, **answer}, ensure_ascii=False)


def _server(answers: Mapping[int, Any], task: Task) -> Iterator[str]:
    """The GLUE server's form: the labels as the official files spell them."""
    labels = (task.files.spelling if task.files else ()) or task.labels
    yield "index\tprediction"
    for index, (prediction, _) in answers.items():
        yield f"{index}\t{f'{prediction:.3f}' if task.regression else labels[int(prediction)]}"


def _label(prediction: float, task: Task) -> str | float:
    return round(prediction, 4) if task.regression else task.labels[int(prediction)]


def _scores(scores: Sequence[float], task: Task) -> dict[str, float]:
    """The probabilities by label; a regression has none."""
    return {} if task.regression else dict(zip(task.labels, scores, strict=True))
