"""Recording of a MeZO run's trajectory, from which its weights can be computed again."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Trainer

from lit_spu.callbacks.first_step import FirstStep
from lit_spu.callbacks.output import read_interval, run_directory
from lit_spu.optim.replay import trajectory_header
from lit_spu.optim.trajectory import Recorder


class TrajectoryRecorder(FirstStep):
    """Callback that writes `trajectory.mezo` into the run directory.

    Steps are written every `log_every_n_steps` steps, with each checkpoint and at the end. Nothing is written if the
    Trainer has neither a logger nor checkpoints.
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

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if trainer.global_step % read_interval(trainer) == 0:
            self._append()

    def on_save_checkpoint(self, trainer: Trainer, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        self._append()

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self._append()

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        try:
            self._append()
        except Exception as error:  # such as that of a device that has failed, which is the exception already
            exception.add_note(f"The last steps are missing in the trajectory: {error!r}")

    def _append(self) -> None:
        """Append the steps since the last call. Their slopes are read from the device, which waits for it."""
        if self._recorder and self.has_begun:
            self._recorder.append()
