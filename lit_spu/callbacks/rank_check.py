"""Check that all ranks hold the same weights, where each takes its own step."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, Trainer

from lit_spu.checkpoints.fingerprint import checksum
from lit_spu.ranges import Checked, Count


class RankCheck(Checked, Callback):
    """Callback that compares the weights that a method perturbs between the ranks.

    Args:
        every: Number of steps between two checks.

    Raises:
        RuntimeError: during training, if the weights differ.
    """

    def __init__(self, every: Count = 100) -> None:
        self.every = every

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any, **kwargs: Any) -> None:
        if trainer.world_size == 1 or trainer.global_step % self.every:
            return
        sums: Any = pl_module.all_gather(checksum(p for _, p in pl_module.perturbed_parameters()))
        if (sums != sums[0]).any():
            raise RuntimeError(
                f"The weights differ between the ranks after step {trainer.global_step}: did something other than the"
                " optimizer change them on one rank?"
            )
