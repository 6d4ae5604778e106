"""Table of the trainable parameters by part of the module."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelSummary
from torch import nn

from lit_spu.callbacks.output import log_now
from lit_spu.console import make_console
from lit_spu.errors import UserError


class TrainableParameters(ModelSummary):
    """Callback that prints the trainable parameters by part and logs their number as `params/trainable`.

    It replaces Lightning's own model summary. If the module has a `backbone` with `blocks`, the parts are the
    embeddings, the blocks (including adapters inside them), the head (everything else in the backbone) and the module's
    other children, such as a side network. The parts of any other module are its children.

    Attributes:
        summary: `params/trainable` and `params/total`.

    Raises:
        UserError: before training, if no parameter is trainable.
    """

    def __init__(self) -> None:
        super().__init__()
        self.summary: dict[str, float] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse to fit a module without trainable parameters."""
        parameters = list(pl_module.parameters())
        if stage == "fit" and parameters and not any(parameter.requires_grad for parameter in parameters):
            raise UserError(
                f"{type(pl_module).__name__} has nothing to train: all of its {_count(parameters):,} parameters are"
                " frozen. Choose another method or other settings; to evaluate without training, use validate."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        parts = {name: list(parameters) for name, parameters in _parts(pl_module).items()}
        all_parameters = list(pl_module.parameters())
        trainable = _count(parameter for parameter in all_parameters if parameter.requires_grad)
        self.summary = {"params/trainable": trainable, "params/total": _count(all_parameters)}
        log_now(trainer, {"params/trainable": trainable})
        if trainer.is_global_zero:
            _print({**parts, "all": all_parameters})


def _parts(module: LightningModule) -> dict[str, list[nn.Parameter]]:
    """Return the parameters by part; a parameter that is shared belongs to the first part that has it."""
    backbone: Any = getattr(module, "backbone", None)
    owners: dict[str, Iterable[nn.Module]] = {}
    if blocks := getattr(backbone, "blocks", None):
        base_model = getattr(backbone, "base_model", None)
        owners = {"embeddings": getattr(base_model, "embeddings", []), "blocks": blocks, "head": [backbone]}
    owners |= {name: [child] for name, child in module.named_children() if child is not backbone or not blocks}
    parts: dict[str, list[nn.Parameter]] = {}
    assigned: set[nn.Parameter] = set()
    for name, modules in owners.items():
        parameters = {parameter for owner in modules for parameter in owner.parameters()} - assigned
        assigned |= parameters
        if parameters:
            parts[name] = list(parameters)
    if remaining := set(module.parameters()) - assigned:
        parts["own"] = list(remaining)
    return parts


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _print(parts: dict[str, list[nn.Parameter]]) -> None:
    from rich.table import Table

    table = Table("part")
    for header in ("trainable", "of", "%"):
        table.add_column(header, justify="right")
    for name, parameters in parts.items():
        total = _count(parameters)
        trainable = _count(parameter for parameter in parameters if parameter.requires_grad)
        table.add_row(name, f"{trainable:,}", f"{total:,}", f"{100 * trainable / total:.2f}")
    make_console().print(table)
