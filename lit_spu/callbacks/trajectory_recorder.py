"""Recording of a MeZO run's trajectory, from which its weights can be computed again."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer

from lit_spu.callbacks.first_step import FirstStep
from lit_spu.callbacks.output import run_directory
from lit_spu.optim.replay import trajectory_header
from lit_spu.optim.trajectory import Recorder


class TrajectoryRecorder(FirstStep):
    """Callback that writes `trajectory.mezo` into the run directory.

    It writes nothing if the Trainer has neither a logger nor checkpoints.
    """

    def __init__(self) -> None:
        self._recorder: Recorder | None = None

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        folder = run_directory(trainer)
        writes_files = trainer.loggers or trainer.checkpoint_callbacks
        self._recorder = None
        if writes_files and trainer.is_global_zero:
            optimizer: Any = trainer.optimizers[0]
            self._recorder = Recorder(folder, trajectory_header(pl_module.checkpoint_dict(), optimizer), optimizer)

    def begin(self, trainer: Trainer, pl_module: Any) -> None:
        if self._recorder:
            self._recorder.write()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        super().on_train_batch_end(trainer, pl_module, *args, **kwargs)
        if self._recorder and self.has_begun:
            self._recorder.append()
