"""Several side networks, trained together on the hidden states of one frozen backbone.

They share nothing else, so each is trained exactly as it would be alone. A grid of learning rates or seeds costs one
pass of the backbone and several of side networks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_spu import registry
from lit_spu.backbones import Batch, HiddenStates
from lit_spu.errors import UserError, did_you_mean
from lit_spu.methods.frozen import DrawExamples, HiddenStateReader
from lit_spu.ranges import Length, Name, Seed, Text, check, declared

OWN_SETTINGS = ("lr", "weight_decay", "gradient_checkpointing")
"""Settings common to all methods that may differ between siblings."""


class SharedTrunk(HiddenStateReader):
    """Train several methods ("siblings") that read one backbone, each as it would be trained alone.

    The logits are those of the sibling that was best in the last validation. Its scores are logged as `val/<metric>`,
    and those of all siblings as `val/<metric>/<name>`.

    Args:
        siblings: By name, each sibling's own settings. `seed` is the seed of its initial weights and its dropout, by
            default the run's. The order of the data is the same for all.
        side: Class of the siblings, a method that reads the hidden states of a frozen backbone.
        settings: Settings of all siblings.

    Raises:
        UserError: If there is no sibling, if one has a setting that all must share, or if the class reads no hidden
            states.
    """

    def __init__(
        self,
        siblings: Annotated[Mapping[Name, Mapping[str, Any]], Length(1, unique=False)],
        side: Text = "LadderSideTuning",
        settings: Mapping[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        cls = _find_class(side)
        for name, own in siblings.items():
            if hasattr(nn.ModuleDict(), name):
                raise UserError(f"model.siblings: {name!r} is an attribute of torch's ModuleDict. Choose another name.")
            _check_settings(cls, own, f"model.siblings.{name}", {"seed": Seed})
        _check_settings(cls, settings or {}, "model.settings", {})
        super().__init__(**kwargs)
        self.backbone.requires_grad_(False)
        common = {**kwargs, "activation_cache": None, **(settings or {})}
        methods = {name: _make_sibling(cls, common, own) for name, own in siblings.items()}
        for method in methods.values():
            method.backbone.share_frozen_weights(self.backbone)
        self.siblings: Any = nn.ModuleDict(methods)
        self.seeds = {name: own.get("seed") for name, own in siblings.items()}
        self.batch_seeds: dict[str, int] = {}
        self.best = next(iter(siblings))

    def prepare(self, examples: DrawExamples) -> None:
        for sibling in self.siblings.values():
            sibling.prepare(examples)

    def logits_from(self, hidden_states: Sequence[HiddenStates], batch: Batch) -> Tensor:
        logits: Tensor = self.siblings[self.best](batch, hidden_states)
        return logits

    def loss(self, batch: Batch, hidden_states: Sequence[HiddenStates] | None = None) -> Tensor:
        """Return the sum of the siblings' losses."""
        hidden_states = hidden_states or self.hidden_states(batch)
        losses = []
        for name, sibling in self.siblings.items():
            if name in self.batch_seeds:
                self.seed_generators(self.batch_seeds[name])
            losses.append(sibling.loss(batch, hidden_states))
        return torch.stack(losses).sum()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        super().on_train_batch_start(batch, batch_idx)
        self.batch_seeds = {
            name: self.batch_seed(self.seed if seed is None else seed) for name, seed in self.seeds.items()
        }

    def parameter_groups(self) -> list[dict[str, Any]]:
        return [group for sibling in self.siblings.values() for group in sibling.parameter_groups()]

    def configure_gradient_clipping(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
        """Clip each sibling's gradients by their own norm."""
        for sibling in self.siblings.values():
            # Lightning reads nothing but the groups
            optimizer_part: Any = SimpleNamespace(param_groups=sibling.parameter_groups())
            super().configure_gradient_clipping(optimizer_part, *args, **kwargs)

    def evaluate_batch(self, batch: Batch, prefix: str) -> None:
        hidden_states = self.hidden_states(batch)
        for sibling in self.siblings.values():
            sibling.update_metrics(sibling(batch, hidden_states), batch, prefix)

    def log_metrics(self) -> None:
        scores = {name: sibling.compute_metrics() for name, sibling in self.siblings.items()}
        monitor = self.task.monitor
        if monitor in scores[self.best]:  # not in a test
            self.best = max(scores, key=lambda name: float(scores[name][monitor].nan_to_num(-torch.inf)))
        for name, metrics in scores.items():
            self.log_scores({f"{metric}/{name}": value for metric, value in metrics.items()})
        self.log_scores(scores[self.best], prog_bar=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["best_sibling"] = self.best

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        self.best = checkpoint["best_sibling"]


def _find_class(side: str) -> type[HiddenStateReader]:
    """Return the method of this name that reads hidden states, and is no group of siblings itself."""
    methods = [cls for cls in registry.concrete_subclasses(HiddenStateReader) if cls is not SharedTrunk]
    classes = {cls.__name__: cls for cls in methods}
    if side not in classes:
        raise UserError(f"model.side={side} reads no hidden states. {did_you_mean(side, classes)}")
    return classes[side]


def _check_settings(cls: type[HiddenStateReader], own: Mapping[str, Any], key: str, extra: Mapping[str, Any]) -> None:
    """Check settings of siblings, before a model is loaded. `extra` has types of settings that are not the class's."""
    shared = [s for s in registry.settings(HiddenStateReader) if s in own and s not in OWN_SETTINGS]
    if shared:
        raise UserError(f"{key}: {', '.join(shared)} must be equal for all: set it for the model.")
    known = {*registry.settings(cls), *extra}
    for setting in own:
        if setting not in known:
            raise UserError(f"{key}: {cls.__name__} has no {setting!r}. {did_you_mean(setting, known)}")
    check({**declared(cls), **extra}, own, f"{key}.")


def _make_sibling(cls: Any, common: Mapping[str, Any], own: Mapping[str, Any]) -> HiddenStateReader:
    """Create a sibling under its own seed or the run's, as it would be created alone."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(own.get("seed", torch.initial_seed()))
        settings = {setting: value for setting, value in own.items() if setting != "seed"}
        sibling: HiddenStateReader = cls(**{**common, **settings})
    return sibling
