"""The beginning of a launch: nothing in the run directory changes before its first step."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer


class FirstStep(Callback, ABC):
    """Base class of callbacks that write nothing before the first step of a launch.

    A launch that is refused, that cannot restore its checkpoint, or whose first step fails, therefore leaves the run
    directory as it was. Evaluation begins when its weights have been restored.
    """

    has_begun = False
    _initial_step = 0

    @abstractmethod
    def begin(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to write. Called once in a launch, on every rank."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self.has_begun = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._initial_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step > self._initial_step:
            self._begin_once(trainer, pl_module)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin_once(trainer, pl_module)  # an epoch may have no step
        super().on_train_epoch_end(trainer, pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not trainer.sanity_checking:
            self._begin_once(trainer, pl_module)
        super().on_validation_start(trainer, pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin_once(trainer, pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin_once(trainer, pl_module)

    def _begin_once(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self.has_begun:
            self.has_begun = True
            self.begin(trainer, pl_module)
