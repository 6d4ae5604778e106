"""MeZO + LST: the backbone of a ladder learns too, by forward passes, where the ladder learns by backpropagation.

The union that the project's slides describe of MeZO (https://arxiv.org/abs/2305.17333) and ladder side-tuning
(https://arxiv.org/abs/2206.06522): no gradient goes through the backbone, and nothing of it is stored.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lit_spu.backbones import Batch
from lit_spu.errors import UserError
from lit_spu.methods.kladder import KLadder
from lit_spu.methods.zeroth_order import ZerothOrder
from lit_spu.optim import schedules


class MeZOLST(ZerothOrder, KLadder):
    """Train the backbone by MeZO on what it answers to the prompt, and a ladder on the backbone by AdamW.

    Args:
        order: First the one and then the other, or both in each step.
        backbone_share: In sequence, the share of all steps that belong to the backbone.
        side_lr: Peak learning rate of the ladder; `lr` is that of MeZO.

    Raises:
        UserError: if the share is none, or the backbone is one that cannot learn.
    """

    def __init__(
        self,
        order: Literal["sequential", "joint"] = "sequential",
        backbone_share: float = 0.5,
        side_lr: float = 3e-3,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if not 0 < backbone_share < 1:
            raise UserError(f"model.backbone_share={backbone_share}: give a share between 0 and 1.")
        if self.activation_cache or self.trajectory or kwargs.get("backbone_precision") == "int8":
            raise UserError(
                "MeZOLST changes its backbone, and its ladder by gradients: leave out model.activation_cache,"
                " model.trajectory and int8."
            )
        self.order, self.backbone_share, self.side_lr = order, backbone_share, side_lr
        self.backbone.requires_grad_(True)
        # no gradient will come for these, by whichever name
        theirs = [n for n, _ in self.named_parameters(remove_duplicate=False) if n.startswith("backbone.")]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, theirs)

    def perturbed(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(f"backbone.{name}", parameter) for name, parameter in self.backbone.named_parameters()]

    def value(self, batch: Batch) -> Tensor:
        return self.objective_of(self.backbone(batch), batch)

    def configure_optimizers(self) -> Any:
        """MeZO over the backbone, and AdamW over the ladder with linear warm-up and decay over its own steps."""
        side = torch.optim.AdamW(self.side.parameters(), self.side_lr, weight_decay=self.weight_decay, fused=True)
        steps = self._steps()
        self.first = round(self.backbone_share * steps) if self.order == "sequential" else 0
        self.side_rate = schedules.linear(side, self.warmup, steps - self.first)
        return [super().configure_optimizers(), {"optimizer": side, "lr_scheduler": self.side_rate}]

    @property
    def recorded(self) -> bool:
        return False  # gradients are not in a trajectory

    def take_step(self, batch: Batch, *optimizers: Any) -> Tensor | None:
        """One step of either or of both, of which the Trainer counts one."""
        if self.order == "sequential" and self.trainer.global_step < self.first:
            return super().take_step(batch, *optimizers)
        side = optimizers[1]
        if self.order == "joint":
            super().take_step(batch, *optimizers)
            side = getattr(side, "optimizer", side)
        loss = self.loss(batch)
        self.manual_backward(loss, inputs=list(self.side.parameters()))
        side.step()
        side.zero_grad()
        return loss.detach()

    def _look_before_training(self, metric: str) -> None:
        """Nothing to tell: what answers is a ladder that has yet to learn."""

    def step_rate(self, scheduler: Any) -> None:
        """The ladder's rate has its own steps, and is logged by its own name."""
        if scheduler is not self.side_rate:
            super().step_rate(scheduler)
        elif self.trainer.global_step > self.first:
            self.log("lr/side", scheduler.get_last_lr()[0])
            scheduler.step()
