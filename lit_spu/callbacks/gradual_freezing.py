"""Gradual freezing: during training, layers are frozen one by one from the bottom up and leave the backward pass.

Based on AutoFreeze (Liu, Agarwal, Venkataraman 2021, https://arxiv.org/abs/2102.01386) and, in the opposite order, on
the gradual unfreezing of ULMFiT (Howard, Ruder 2018, https://arxiv.org/abs/1801.06146).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.nn.utils import get_total_norm
from torch.optim import Optimizer

from lit_spu.callbacks.output import log_now
from lit_spu.errors import UserError
from lit_spu.ranges import Checked, Count, CountOrZero, PositiveShare


class GradualFreezing(Checked, Callback):
    """Callback that freezes the embeddings and then block by block during training, from the bottom up.

    The embeddings and each block are a layer here. A frozen layer has no gradient, so neither momentum nor weight decay
    changes it. Nothing below the lowest trainable layer is stored for the backward pass, which saves time and memory.
    `params/trainable` and `freezing/frozen`, the number of frozen layers, are logged whenever they change. After
    training all layers are unfrozen again.

    The callback works on any module whose `parameters_by_depth` lists the parameters of each layer from the bottom up.
    Layers without trainable parameters are not counted. The head is not in the list and always trains.

    Args:
        every: Number of epochs or steps between two freezings.
        unit: Unit of `every`.
        keep: Number of top layers that always train.
        thaw: Begin with only the top `keep` layers trainable, and unfreeze the next lower layer each time.
        settled: Freeze by gradients instead (AutoFreeze, with 0.5). At the end of each interval, the relative change of
            each layer's gradient norm since the last interval is computed. The lowest layers freeze, up to the first
            with a change above this quantile of the changes of all trainable layers.

    Raises:
        UserError: if a number is out of range, or, before training, if there is nothing to freeze, if the method does
            not use automatic optimization, or if the strategy would wait for gradients of frozen parameters.
    """

    def __init__(
        self,
        every: Count = 1,
        unit: Literal["epoch", "step"] = "epoch",
        keep: CountOrZero = 1,
        thaw: bool = False,
        settled: PositiveShare | None = None,
    ) -> None:
        if thaw and settled is not None:
            raise UserError(
                f"GradualFreezing: thaw=true unfreezes layers, and settled={settled} freezes them. Set one of them."
            )
        self.every, self.unit, self.keep, self.thaw, self.settled = every, unit, keep, thaw, settled
        self.num_frozen = self.num_intervals = 0
        self._layers: list[list[nn.Parameter]] = []  # the trainable parameters of each layer, from the bottom up
        self._norm_sums: list[Any] = []  # of each layer's gradient norms, over the steps of this interval
        self._last_norm_sums: list[float] = []  # the same of the interval before

    @property
    def summary(self) -> dict[str, float]:
        """Number of frozen layers."""
        return {"freezing/frozen": float(self.num_frozen)}

    # -- freezing ---------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse modules and strategies for which freezing cannot work."""
        if stage != "fit":
            return
        self.num_frozen, self.num_intervals, self._norm_sums, self._last_norm_sums = 0, 0, [], []
        name = type(pl_module).__name__
        if not pl_module.automatic_optimization:
            raise UserError(
                f"GradualFreezing: {name} takes its steps by itself, without the Trainer's backward pass, so freezing"
                " saves nothing. Remove the callback."
            )
        layers = _trainable_layers(pl_module)
        if len(layers) <= self.keep:
            raise UserError(
                f"GradualFreezing: {name} trains {len(layers)} of the backbone's embeddings and blocks, and"
                f" keep={self.keep} of them must stay trainable, so there is nothing to freeze. Lower keep, or remove"
                " the callback."
            )
        strategy = trainer.strategy
        # Lightning has no public name for the arguments that it hands to DistributedDataParallel.
        if isinstance(strategy, DDPStrategy) and not strategy._ddp_kwargs.get("find_unused_parameters"):
            raise UserError(
                "GradualFreezing: ddp waits for the gradients of frozen parameters. Use --trainer.strategy"
                " ddp_find_unused_parameters_true."
            )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # not in setup: ddp wraps the module after it, and would ignore parameters that are frozen by then
        self._layers = _trainable_layers(pl_module)
        self._norm_sums = self._norm_sums or [0.0] * len(self._layers)
        num_frozen = self._scheduled_num_frozen() if self.settled is None else self.num_frozen
        self._set_frozen(trainer, pl_module, num_frozen)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        num_intervals = (trainer.current_epoch if self.unit == "epoch" else trainer.global_step) // self.every
        if num_intervals == self.num_intervals:
            return
        self.num_intervals = num_intervals
        if self.settled is None:
            num_frozen = self._scheduled_num_frozen()
        else:
            num_frozen = self.num_frozen + self._count_settled(self.settled)
        if num_frozen != self.num_frozen:
            self._set_frozen(trainer, pl_module, num_frozen)

    def _scheduled_num_frozen(self) -> int:
        """Return the number of layers that are frozen in this interval."""
        max_frozen = len(self._layers) - self.keep
        return max(0, max_frozen - self.num_intervals) if self.thaw else min(self.num_intervals, max_frozen)

    def _set_frozen(self, trainer: Trainer, pl_module: LightningModule, num_frozen: int) -> None:
        """Freeze the lowest `num_frozen` layers, unfreeze the others, and log it."""
        self.num_frozen = num_frozen
        _freeze_lowest(self._layers, num_frozen)
        trainable = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        log_now(trainer, {"params/trainable": trainable, "freezing/frozen": num_frozen})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        _freeze_lowest(self._layers, 0)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        _freeze_lowest(self._layers, 0)

    # -- gradient norms ---------------------------------------------------------------------------------------------

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        if self.settled is None:
            return
        for number, layer in enumerate(self._layers):
            self._norm_sums[number] += get_total_norm([p.grad for p in layer if p.grad is not None])

    def _count_settled(self, quantile: float) -> int:
        """Return how many of the lowest trainable layers have settled since the last interval, and begin a new one."""
        before, now = self._last_norm_sums, [float(norm_sum) for norm_sum in self._norm_sums]
        self._last_norm_sums, self._norm_sums = now, [0.0] * len(now)
        if not before:
            return 0
        pairs = list(zip(before, now, strict=True))[self.num_frozen :]
        changes = [abs(old - new) / old if old else 0.0 for old, new in pairs]
        limit = float(torch.tensor(changes, dtype=torch.float64).quantile(quantile))
        num_settled = next((number for number, change in enumerate(changes) if change > limit), len(changes))
        return min(num_settled, len(changes) - self.keep)

    # -- resuming ---------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        return {
            "num_frozen": self.num_frozen,
            "num_intervals": self.num_intervals,
            "norm_sums": [float(norm_sum) for norm_sum in self._norm_sums],
            "last_norm_sums": self._last_norm_sums,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.num_frozen, self.num_intervals = state_dict["num_frozen"], state_dict["num_intervals"]
        self._norm_sums, self._last_norm_sums = state_dict["norm_sums"], state_dict["last_norm_sums"]


def _trainable_layers(pl_module: LightningModule) -> list[list[nn.Parameter]]:
    """Return the trainable parameters of each layer that has any, from the bottom up."""
    layers = ([p for p in layer if p.requires_grad] for layer in getattr(pl_module, "parameters_by_depth", ()))
    return [layer for layer in layers if layer]


def _freeze_lowest(layers: Sequence[Sequence[nn.Parameter]], num_frozen: int) -> None:
    """Freeze the lowest layers and drop their gradients; unfreeze the others."""
    for number, layer in enumerate(layers):
        for parameter in layer:
            parameter.requires_grad_(number >= num_frozen)
            if number < num_frozen:
                parameter.grad = None
