"""Export of a distilled student as a model without its teacher, and a table that compares both."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from statistics import median
from typing import Any

import torch
from rich.box import SIMPLE
from rich.table import Table

from lit_spu.backbones import Backbone, load_backbone
from lit_spu.checkpoints import run_dir
from lit_spu.console import make_console
from lit_spu.data.glue import GLUE
from lit_spu.errors import UserError, name_flag
from lit_spu.export import writers
from lit_spu.export.load import load
from lit_spu.measure import MIB, interleave
from lit_spu.methods.base import Method
from lit_spu.methods.lst_distill import LSTDistillation
from lit_spu.ranges import Text
from lit_spu.tasks.metrics import format_score, task_metrics

NUM_ROUNDS = 5
"""Timed forward passes of each model."""


def separate(ckpt_path: Text, output: Text, data: dict[str, Any] | None = None) -> None:
    """Write the student of LST distillation as a Hugging Face model, and compare it with its teacher.

    The written model does not need this package. Both models are scored on the validation split, the student as loaded
    from the folder. Times are medians of processor time on the first batch, which has the longest texts.

    Args:
        ckpt_path: A run directory (its best checkpoint) or a checkpoint of LSTDistillation.
        output: The folder to write; it must be new or empty.
        data: Settings of the data that replace those of the run, as {source: path/to/glue}.

    Raises:
        UserError: if there is no checkpoint, it is of another method, or the folder is not empty.
    """
    folder = writers.new_folder(output)
    with name_flag("--ckpt_path"):
        file = run_dir.find_checkpoint(ckpt_path, "best")
        method = load(file)
    if not isinstance(method, LSTDistillation):
        raise UserError(
            f"--ckpt_path: {file} holds {type(method).__name__}, which needs its backbone. Only LSTDistillation trains"
            " a student that works without it; lit-spu export writes the other methods."
        )
    writers.write_folder(folder, method, file, "merged", partial(writers.write_model, method, method.student))
    student = load_backbone(str(folder), method.task, method.student.head_type).eval()
    batches = _validation_batches(method, run_dir.saved_config(file)["data"] | (data or {}))
    title = f"{folder}: {method.task.name}, validation"
    make_console().print(_comparison_table(title, {"teacher": method.backbone, "student": student}, batches))


def _validation_batches(method: Method, settings: dict[str, Any]) -> list[dict[str, torch.Tensor]]:
    module = GLUE(**settings)
    module.encoding = method.encoding
    module.setup("validate")
    return list(module.val_dataloader()[0])


def _comparison_table(title: str, models: dict[str, Backbone], batches: Sequence[dict[str, torch.Tensor]]) -> Table:
    """Return a table with the size, score and time of each model."""
    task = models["student"].task
    seconds = interleave({name: partial(model, batches[0]) for name, model in models.items()}, NUM_ROUNDS)
    table = Table(title=title, title_justify="left", box=SIMPLE)
    for header in ("model", "parameters", "MiB", task.metrics[0], "ms a batch"):
        table.add_column(header, justify="left" if header == "model" else "right")
    for name, model in models.items():
        count = sum(p.numel() for p in model.model.parameters())
        size = sum(p.nbytes for p in model.model.parameters()) / MIB
        result = format_score(score(model, batches)) if model.head_is_pretrained else "head untrained"
        table.add_row(name, f"{count:,}", f"{size:,.1f}", result, f"{1000 * median(seconds[name]):,.1f}")
    return table


@torch.no_grad()
def score(backbone: Backbone, batches: Sequence[dict[str, torch.Tensor]]) -> float:
    """Return the first metric of the task, for the backbone's own logits."""
    metric = task_metrics(backbone.task)[backbone.task.metrics[0]]
    for batch in batches:
        metric.update(backbone.predict(backbone(batch))[0], batch["labels"])
    return float(metric.compute())
