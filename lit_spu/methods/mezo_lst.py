"""MeZO + LST: the backbone is trained by forward passes, and a ladder beside it by backpropagation.

From the project's slides: a combination of MeZO (https://arxiv.org/abs/2305.17333) and ladder side-tuning
(https://arxiv.org/abs/2206.06522). No gradient passes through the backbone, and none of its activations are saved.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import torch
from lightning.pytorch import Callback
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from lit_spu.backbones import Batch
from lit_spu.callbacks.rank_check import RankCheck
from lit_spu.errors import UserError
from lit_spu.methods.ladder import LadderSideTuning
from lit_spu.methods.zeroth_order import ZerothOrder
from lit_spu.optim import schedules
from lit_spu.optim.adamw import fused_adamw
from lit_spu.ranges import Positive, Range


class MeZOLST(ZerothOrder, LadderSideTuning):
    """Train the backbone by MeZO on the loss of its own logits, and a ladder that reads it by AdamW.

    Args:
        order: `sequential` trains first the backbone and then the ladder, `joint` trains both in each step.
        backbone_share: Share of all steps that train the backbone, if `order` is sequential.
        side_lr: Peak learning rate of the ladder; `lr` is the learning rate of MeZO.

    Raises:
        UserError: If the share is out of range, or the backbone cannot be trained.
    """

    captures_own_steps = False

    def __init__(
        self,
        order: Literal["sequential", "joint"] = "sequential",
        backbone_share: Annotated[float, Range(0.0, 1.0, without_low=True, without_high=True)] = 0.5,
        side_lr: Positive = 3e-3,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if self.activation_cache or self.trajectory or kwargs.get("backbone_precision") == "int8":
            raise UserError(
                "MeZOLST changes its backbone in each step, and its ladder by gradients: leave out"
                " model.activation_cache, model.trajectory and int8."
            )
        self.order, self.backbone_share, self.side_lr = order, backbone_share, side_lr
        self.backbone.requires_grad_(True)
        # otherwise DDP would wait for gradients of these weights
        names = [n for n, _ in self.named_parameters(remove_duplicate=False) if n.startswith("backbone.")]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, names)

    def configure_callbacks(self) -> list[Callback]:
        """Return the rank check alone: a new ladder has no zero-shot score, and no trajectory can replay its steps."""
        return [RankCheck(self.check_every)]

    def perturbed_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        return [(f"backbone.{name}", parameter) for name, parameter in self.backbone.named_parameters()]

    def objective_value(self, batch: Batch) -> Tensor:
        return self.objective_from(self.backbone(batch), batch)

    def configure_optimizers(self) -> Any:
        """Return MeZO over the backbone, and AdamW over the ladder with warm-up and decay over its own steps."""
        side = fused_adamw(self.side.parameters(), self.side_lr, weight_decay=self.weight_decay)
        steps = self._count_steps()
        self.num_backbone_steps = round(self.backbone_share * steps) if self.order == "sequential" else 0
        self.side_lr_scheduler = schedules.linear(side, self.warmup, steps - self.num_backbone_steps)
        return [super().configure_optimizers(), {"optimizer": side, "lr_scheduler": self.side_lr_scheduler}]

    def take_step(self, batch: Batch, *optimizers: Any) -> Tensor | None:
        """Take a step of MeZO, of AdamW or of both. The Trainer counts it as one step."""
        if self.order == "sequential" and self.trainer.global_step < self.num_backbone_steps:
            return super().take_step(batch, *optimizers)
        side = optimizers[1]
        if self.order == "joint":
            super().take_step(batch, *optimizers)
            side = getattr(side, "optimizer", side)  # Lightning's wrapper would count this as a second step
        loss = self.loss(batch)
        self.manual_backward(loss, inputs=list(self.side.parameters()))
        side.step()
        side.zero_grad()
        return loss.detach()

    def step_lr_scheduler(self, scheduler: Any) -> None:
        """Log the ladder's learning rate as `lr/side`, and advance it in the ladder's steps only."""
        if scheduler is not self.side_lr_scheduler:
            super().step_lr_scheduler(scheduler)
        elif self.trainer.global_step > self.num_backbone_steps:
            self.log_step("lr/side", scheduler.get_last_lr()[0])
            scheduler.step()
