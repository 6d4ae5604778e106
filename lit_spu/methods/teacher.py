"""A teacher: a model that knows the task, and what it answers to every example, computed once and kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_spu.checkpoints import trained_weights
from lit_spu.errors import UserError
from lit_spu.tasks import Encoding, Task


class Teacher:
    """What was trained before, by a method or by others.

    Args:
        source: A run directory, a checkpoint or a folder that `lit-spu export` wrote; or a Hugging Face folder or name,
            which answers by its trained classification head, or else, asked by the task's prompt, by its language-model
            head.
        task: The task of the student.

    Raises:
        UserError: if there is no such model, it was trained for other labels, or has no answers.
    """

    model: nn.Module
    encoding: Encoding

    def __init__(self, source: str, task: Task) -> None:
        path = Path(source)
        ours = path.is_file() or (path / "checkpoints").is_dir() or (path / trained_weights.WEIGHTS).is_file()
        try:
            found: Any = _method(source, task) if ours else _backbone(source, task)
        except UserError as error:
            said = str(error).replace("--ckpt_path", "model.teacher").replace("model.backbone", "model.teacher")
            raise UserError(said) from error
        self.model, self.encoding, self.scores = found.eval().requires_grad_(False), found.encoding, task.num_logits

    @torch.no_grad()
    def answers(self, data: Any, device: torch.device) -> Tensor:
        """Its scores [examples, labels] of all training examples of GLUE `data`, by their number, on that device.

        Raises:
            UserError: if the data are others, which it cannot read.
        """
        if not hasattr(data, "as_read_by"):
            raise UserError(f"model.teacher: a teacher reads lit_spu's GLUE data, and not {type(data).__name__}.")
        self.model.to(device)
        kept = torch.empty(len(data.examples("train")), self.scores, device=device)
        for batch in data.as_read_by(self.encoding):
            on_device = {name: tensor.to(device) for name, tensor in batch.items()}
            kept[on_device["index"]] = self.model(on_device).float()
        return kept


def _method(source: str, task: Task) -> nn.Module:
    from lit_spu.export.load import load

    method = load(source)
    if (method.task.labels, method.task.num_logits) != (task.labels, task.num_logits):
        raise UserError(
            f"model.teacher: {source} was trained for {method.task.name}, whose labels are {_named(method.task)};"
            f" those of {task.name} are {_named(task)}."
        )
    return method


def _backbone(source: str, task: Task) -> nn.Module:
    from lit_spu.backbones import load_backbone
    from lit_spu.backbones.load import find_model

    config = find_model(source).config
    classifies = any("SequenceClassification" in name for name in config.architectures or ())
    if classifies:
        names = [str(name) for _, name in sorted(config.id2label.items())]
        unnamed = all(name.startswith("LABEL_") for name in names)
        same = [name.casefold() for name in names] == [label.casefold() for label in task.labels]
        if config.num_labels != task.num_logits or not (unnamed or same or task.regression):
            raise UserError(
                f"model.teacher: {source} answers {len(names)} labels ({', '.join(names)}); those of {task.name} are"
                f" {_named(task)}, in this order. If they mean the same, set id2label in its config.json."
            )
    return load_backbone(source, task, "classifier" if classifies else "prompt")


def _named(task: Task) -> str:
    return ", ".join(task.labels) or "a number"
