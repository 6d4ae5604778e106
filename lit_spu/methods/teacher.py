"""A teacher: a model trained for the task, and its logits for every training example."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lit_spu.checkpoints import trained_weights
from lit_spu.errors import NonFiniteError, UserError, name_flag
from lit_spu.tasks import Encoding, Task


class Teacher:
    """A frozen model that was trained before, by a method of this package or elsewhere.

    Args:
        source: A run directory, a checkpoint, or a folder written by `lit-spu export`; or a Hugging Face folder or
            name. A Hugging Face model predicts by its trained classification head, or, if it has none, by its
            language-model head with the task's prompt.
        task: The student's task.

    Raises:
        UserError: If there is no such model, or it was trained for other labels.
    """

    model: nn.Module
    encoding: Encoding

    def __init__(self, source: str, task: Task) -> None:
        path = Path(source)
        is_method = path.is_file() or (path / "checkpoints").is_dir() or (path / trained_weights.WEIGHTS).is_file()
        try:
            model: Any = _load_method(source, task) if is_method else _load_backbone(source, task)
        except UserError as error:
            # the loader of backbones names another flag than the user has set
            raise UserError(str(error).replace("model.backbone", "model.teacher")) from error
        self.model, self.encoding = model.eval().requires_grad_(False), model.encoding
        self.num_logits = task.num_logits

    @torch.no_grad()
    def compute_logits(self, data: Any, device: torch.device) -> Tensor:
        """Return the logits [examples, labels] for all training examples of the GLUE data module `data`, on `device`.

        Raises:
            UserError: If `data` is another data module, which cannot be tokenised for the teacher, or a logit is not
                finite.
        """
        if not hasattr(data, "as_read_by"):
            raise UserError(
                f"model.teacher: a teacher reads the data module lit_spu.GLUE only, and not {type(data).__name__}."
            )
        self.model.to(device)
        logits = torch.empty(len(data.examples("train")), self.num_logits, device=device)
        for batch in data.as_read_by(self.encoding):
            on_device = {name: tensor.to(device) for name, tensor in batch.items()}
            logits[on_device["index"]] = self.model(on_device).float()
        if not logits.isfinite().all():
            raise NonFiniteError("model.teacher: some logits of the teacher are not finite. Give another one.")
        return logits


def _load_method(source: str, task: Task) -> nn.Module:
    """Load a trained method of this package, and check that its labels are those of `task`."""
    from lit_spu.export.load import load

    with name_flag("model.teacher"):
        method = load(source)
    check_same_labels(f"model.teacher: {source}", method.task, task)
    return method


def check_same_labels(where: str, trained_for: Task, task: Task) -> None:
    """Check that logits of one task are answers to another: the labels are the same, in the same order.

    Raises:
        UserError: If they are not. The message starts with `where`, the flag and the source of the logits.
    """
    if (trained_for.labels, trained_for.score_range) != (task.labels, task.score_range):
        raise UserError(
            f"{where} was trained for {trained_for.name}, whose labels are {_list_labels(trained_for)}. The labels of"
            f" {task.name} are {_list_labels(task)}. Choose one that was trained for the same labels."
        )


def _load_backbone(source: str, task: Task) -> nn.Module:
    """Load a Hugging Face model, and check that the labels of its classification head are those of `task`."""
    from lit_spu.backbones import load_backbone
    from lit_spu.backbones.load import find_model

    architectures = find_model(source).config.architectures or ()
    is_classifier = any("SequenceClassification" in name for name in architectures)
    backbone = load_backbone(source, task, "classifier" if is_classifier else "prompt")
    backbone.check_knows_answers("model.teacher", "Choose a teacher that was trained for these labels.")
    return backbone


def _list_labels(task: Task) -> str:
    return ", ".join(task.labels) or "a number from {:g} to {:g}".format(*task.score_range or ())
