"""Several side networks, trained on one pass of the frozen backbone that they read.

What each becomes is what it would have become alone: the backbone computes the same for all of them, and they share
nothing else. So a grid of rates or seeds costs one backbone and as many side networks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_spu import registry
from lit_spu.backbones import Batch
from lit_spu.errors import UserError, did_you_mean
from lit_spu.methods.base import HiddenStateReader

OWN = ("lr", "weight_decay", "gradient_checkpointing")
"""Of the settings that all methods have, those that each sibling may have for itself."""


class SharedTrunk(HiddenStateReader):
    """Train siblings that read one backbone, each as it would train alone.

    It answers by the sibling that was best at the last validation, whose score is logged as `val/<metric>`; those of
    all are `val/<metric>/<name>`.

    Args:
        siblings: For each sibling, by its name, its own settings. `seed` draws its start and its dropout; without one
            that is the run's seed. The data come in the order of the run.
        side: The class of the siblings: one whose methods read the blocks of a frozen backbone.
        settings: What all siblings are set to.

    Raises:
        UserError: if there is no sibling, one has a setting that all must share, or the class reads no backbone.
    """

    def __init__(
        self,
        siblings: Mapping[str, Mapping[str, Any]],
        side: str = "LadderSideTuning",
        settings: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.backbone.requires_grad_(False)
        if not siblings:
            raise UserError("model.siblings: give one at least, by a name: {low: {lr: 1e-3}, high: {lr: 3e-3}}.")
        common = {**kwargs, "activation_cache": None, **(settings or {})}
        made = {name: _made(side, name, common, own) for name, own in siblings.items()}
        for sibling in made.values():
            sibling.backbone.share(self.backbone)
        self.siblings: Any = nn.ModuleDict(made)
        self.seeds = {name: own.get("seed") for name, own in siblings.items()}
        self.draws: dict[str, int] = {}  # the seed of each in this batch
        self.best = next(iter(siblings))

    def prepare(self, examples: Callable[[int], Iterable[Batch]]) -> None:
        for sibling in self.siblings.values():
            sibling.prepare(examples)

    def forward(self, batch: Batch) -> Tensor:
        scores: Tensor = self.siblings[self.best](batch)
        return scores

    def loss(self, batch: Batch) -> Tensor:
        losses = []
        for name, sibling in self._reading(batch):
            if name in self.draws:
                torch.manual_seed(self.draws[name])
            losses.append(sibling.loss(batch))
        return torch.stack(losses).sum()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        self.draws = {name: self.batch_seed(self.seed if seed is None else seed) for name, seed in self.seeds.items()}

    def _reading(self, batch: Batch) -> Iterator[tuple[str, HiddenStateReader]]:
        """One sibling after the other, while it reads what the backbone computed for all."""
        taps = self.taps(batch)
        for name, sibling in self.siblings.items():
            sibling.kept = lambda _: taps
            yield name, sibling
            sibling.kept = None

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [group for sibling in self.siblings.values() for group in sibling.parameter_groups()]

    def configure_gradient_clipping(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        """Clip each sibling's gradients by their own norm."""
        for sibling in self.siblings.values():
            its_own: Any = SimpleNamespace(param_groups=sibling.parameter_groups())
            super().configure_gradient_clipping(its_own, *args, **kwargs)

    def _evaluate(self, batch: Batch, prefix: str) -> None:
        for _, sibling in self._reading(batch):
            sibling._evaluate(batch, prefix)

    def _log_metrics(self) -> None:
        found = {
            name: {
                f"{prefix}{metric}": value.nan_to_num(0.0)
                for prefix, metrics in sibling.metrics.items()
                for metric, value in metrics.compute().items()
            }
            for name, sibling in self.siblings.items()
        }
        for sibling in self.siblings.values():
            sibling.metrics.clear()
        if all(self.task.monitor in scores for scores in found.values()):
            self.best = max(found, key=lambda name: float(found[name][self.task.monitor]))
        for name, scores in found.items():
            self.log_dict({f"{metric}/{name}": value for metric, value in scores.items()}, sync_dist=True)
        self.log_dict(found[self.best], prog_bar=True, sync_dist=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["best_sibling"] = self.best

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.best = checkpoint["best_sibling"]


def _made(side: str, name: str, common: Mapping[str, Any], own: Mapping[str, Any]) -> HiddenStateReader:
    """A sibling as it would be made alone, under its own seed or the run's."""
    classes = {cls.__name__: cls for cls in registry.classes("lit_spu.methods") if issubclass(cls, HiddenStateReader)}
    if side not in classes:
        raise UserError(f"model.side={side} reads no frozen backbone. {did_you_mean(side, classes)}")
    cls: Any = classes[side]
    if shared := [setting for setting in registry.settings(HiddenStateReader) if setting in own and setting not in OWN]:
        raise UserError(f"model.siblings.{name}: {', '.join(shared)} must be the same for all: set it for the model.")
    known = {*registry.settings(cls), "seed"}
    for setting in own:
        if setting not in known:
            raise UserError(f"model.siblings.{name}: {side} has no {setting!r}. {did_you_mean(setting, known)}")
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(own.get("seed", torch.initial_seed()))
        made: HiddenStateReader = cls(
            **{**common, **{setting: value for setting, value in own.items() if setting != "seed"}}
        )
    return made
