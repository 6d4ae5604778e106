"""What is trained, part by part."""

from __future__ import annotations

from collections.abc import Iterable

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelSummary
from torch import nn

from lit_spu.callbacks.loggers import log_now
from lit_spu.errors import UserError


class TrainableParameters(ModelSummary):
    """Prints a table of the trainable parameters by part and logs their number as `params/trainable`.

    It takes the place of Lightning's own model summary. The parts of a module whose `backbone` has `blocks` are the
    embeddings, the blocks (with what is inserted there) and the head (all behind the blocks), and beside the backbone
    the module's other children, a side network for one; the parts of any other module are its children.

    Attributes:
        summary: `params/trainable` and `params/total`.

    Raises:
        UserError: before anything runs, if nothing is trainable.
    """

    def __init__(self) -> None:
        super().__init__()
        self.summary: dict[str, float] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse to fit a module that cannot learn."""
        parameters = list(pl_module.parameters())
        if stage == "fit" and parameters and not any(parameter.requires_grad for parameter in parameters):
            raise UserError(
                f"{type(pl_module).__name__} leaves nothing to train: all of its {_count(parameters):,} parameters"
                " are frozen. Choose a method, or settings of it, that train something; to score without training use"
                " validate."
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        parts = {name: list(parameters) for name, parameters in _parts(pl_module).items()}
        everything = list(pl_module.parameters())
        trainable = _count(parameter for parameter in everything if parameter.requires_grad)
        self.summary = {"params/trainable": trainable, "params/total": _count(everything)}
        log_now(trainer, {"params/trainable": trainable})
        if trainer.is_global_zero:
            _print({**parts, "all": everything})


def _parts(module: LightningModule) -> dict[str, list[nn.Parameter]]:
    """The parameters by part, each in the first part that has it."""
    backbone = getattr(module, "backbone", None)
    owners: dict[str, Iterable[nn.Module]] = {}
    if blocks := getattr(backbone, "blocks", None):
        stem = getattr(backbone, "stem", None)
        owners = {"embeddings": getattr(stem, "embeddings", []), "blocks": blocks, "head": [backbone]}  # type: ignore[list-item]
    owners |= {name: [child] for name, child in module.named_children() if child is not backbone or not blocks}
    parts: dict[str, list[nn.Parameter]] = {}
    seen: set[nn.Parameter] = set()
    for name, modules in owners.items():
        mine = {parameter for owner in modules for parameter in owner.parameters()} - seen
        seen |= mine
        if mine:
            parts[name] = list(mine)
    if own := set(module.parameters()) - seen:
        parts["own"] = list(own)
    return parts


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _print(parts: dict[str, list[nn.Parameter]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table("part")
    for header in ("trainable", "of", "%"):
        table.add_column(header, justify="right")
    for name, parameters in parts.items():
        total = _count(parameters)
        trainable = _count(parameter for parameter in parameters if parameter.requires_grad)
        table.add_row(name, f"{trainable:,}", f"{total:,}", f"{100 * trainable / total:.2f}")
    Console().print(table)
