"""What all methods have in common that learn by MeZO (https://arxiv.org/abs/2305.17333): forward passes alone.

The paper's results rest on prompts: asked by one, a pretrained model is near an answer, and what is left is a direction
that a few noisy looks find. With a new head there is nothing to start from.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, Literal

import torch
from torch.optim.lr_scheduler import ConstantLR, LRScheduler

from lit_spu.backbones import Batch, Head
from lit_spu.errors import UserError
from lit_spu.methods.base import Method
from lit_spu.optim import schedules
from lit_spu.optim.mezo import MeZO, NoiseName


class ZerothOrder(Method):
    """A method whose trained weights learn by MeZO. It comes first among the bases, before the method itself.

    Dropout is off, and no gradient is ever made.

    Args:
        head: The language-model head at the prompt's blank, or, as a control, a new classification head.
        lr: Learning rate.
        schedule: Of the learning rate: constant, as the paper has it, or linear warm-up and decay.
        epsilon: How far along a direction the loss is looked at.
        noise: What directions are made of: normal noise, as the paper's; signs; blocks of one table of normal noise;
            or matrices of rank one, which are never made, so that a step costs little more than its forward passes.
        directions: How many are looked along in a step, whose moves are averaged.

    Raises:
        UserError: if a number is out of range, or another optimizer is asked for.
    """

    @abstractmethod
    def __init__(
        self,
        head: Head = "prompt",
        lr: float = 1e-5,
        schedule: Literal["constant", "linear"] = "constant",
        epsilon: float = 1e-3,
        noise: NoiseName = "gaussian",
        directions: int = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(head=head, lr=lr, **kwargs)
        if self.optimizer != "adamw":
            raise UserError(f"model.optimizer={self.optimizer}: MeZO is itself the optimizer. Leave the setting out.")
        if epsilon <= 0 or directions < 1:
            raise UserError(f"model.epsilon={epsilon} must be above 0, and model.directions={directions} at least 1.")
        self.schedule, self.epsilon, self.noise, self.directions = schedule, epsilon, noise, directions
        self.automatic_optimization = False

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        loss = optimizer.step(closure=lambda: self.loss(batch), examples=len(batch["labels"]))
        scheduler = self.lr_schedulers()
        assert isinstance(scheduler, LRScheduler)
        self.log("train/loss", loss.float(), prog_bar=True, batch_size=len(batch["input_ids"]))
        self.log("lr", scheduler.get_last_lr()[0])
        scheduler.step()

    def configure_optimizers(self) -> Any:
        """MeZO over what is trained, with the same seed on all ranks, and its learning rate by step."""
        names = {id(parameter): name for name, parameter in self.named_parameters()}
        groups = [
            {**group, "params": [(names[id(p)], p) for p in group["params"]]} for group in self.parameter_groups()
        ]
        optimizer = MeZO(
            groups,
            epsilon=self.epsilon,
            noise=self.noise,
            directions=self.directions,
            seed=self.trainer.strategy.broadcast(torch.initial_seed()),
            reduce=lambda sums: self.trainer.strategy.reduce(sums, reduce_op="sum"),
        )
        constant = self.schedule == "constant"
        scheduler = ConstantLR(optimizer, 1.0) if constant else schedules.linear(optimizer, self.warmup, self._steps())
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def train(self, mode: bool = True) -> ZerothOrder:
        """Evaluation mode always: two looks at the loss must differ by the weights alone."""
        super().train(False)
        return self
