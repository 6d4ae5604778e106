"""A distilled student as a model of its own, beside its teacher: what it scores, how large it is, how long it takes."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from lit_spu import GLUE, load
from lit_spu.backbones import Backbone, load_backbone
from lit_spu.checkpoints import run_dir
from lit_spu.errors import UserError
from lit_spu.export import writers
from lit_spu.measure import MIB, interleave
from lit_spu.methods.lst_distill import LSTDistillation
from lit_spu.tasks.metrics import task_metrics

ROUNDS = 5


def separate(ckpt_path: str, output: str, data: dict[str, Any] | None = None) -> None:
    """Write the student of LST distillation as a Hugging Face model, and compare it with its teacher.

    The folder needs nothing of this package. Both are scored on the validation split, the student as it is loaded from
    the folder; times are medians of processor time on its first batch, the one with the longest texts.

    Args:
        ckpt_path: A run directory (its best checkpoint) or a checkpoint of LSTDistillation.
        output: The folder to write; it must not hold anything yet.
        data: Settings of the data, laid over those of the run, as {source: path/to/glue}.

    Raises:
        UserError: if there is no checkpoint, it is of another method, or the folder is not empty.
    """
    folder = writers.new_folder(output)
    file = run_dir.checkpoint(ckpt_path, "best")
    method = load(file)
    if not isinstance(method, LSTDistillation):
        raise UserError(
            f"--ckpt_path: {file} holds {type(method).__name__}, which cannot do without its backbone. Only"
            " LSTDistillation trains a student that can; export writes what others trained."
        )
    use = writers.model_folder(method, method.student, folder)
    (folder / "README.md").write_text(writers.card(method, file, use, "merged"))
    teacher, student = method.backbone, load_backbone(str(folder), method.task, method.student.head_type).eval()
    module = GLUE(**run_dir.made_with(file)["data"] | (data or {}))
    module.encoding = method.encoding
    module.setup("validate")
    batches = list(module.val_dataloader()[0])
    seconds = interleave({"teacher": lambda: teacher(batches[0]), "student": lambda: student(batches[0])}, ROUNDS)
    table = Table(title=f"{folder}: {method.task.name}, validation", title_justify="left", box=SIMPLE)
    for header in ("model", "parameters", "MiB", method.task.metrics[0], "ms a batch"):
        table.add_column(header, justify="left" if header == "model" else "right")
    for name, backbone in (("teacher", teacher), ("student", student)):
        count = sum(p.numel() for p in backbone.model.parameters())
        size = sum(p.nbytes for p in backbone.model.parameters()) / MIB
        found = f"{score(backbone, batches):.4f}" if backbone.head_is_pretrained else "head untrained"
        table.add_row(name, f"{count:,}", f"{size:,.1f}", found, f"{1000 * median(seconds[name]):,.1f}")
    Console().print(table)


@torch.no_grad()
def score(backbone: Backbone, batches: Sequence[dict[str, torch.Tensor]]) -> float:
    """What a model scores by itself, in the task's first metric."""
    metric = task_metrics(backbone.task)[backbone.task.metrics[0]]
    for batch in batches:
        metric.update(backbone.predict(backbone(batch))[0], batch["labels"])
    return float(metric.compute().nan_to_num(0.0))
