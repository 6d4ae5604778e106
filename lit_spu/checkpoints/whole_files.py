"""Lightning's reading and writing of checkpoints, through whole files with checksums."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.fabric.plugins import CheckpointIO

from lit_spu.checkpoints import trained_weights


class WholeFiles(CheckpointIO):
    """Checkpoints that replace the old file only when they are on the disk, beside it on the same filesystem.

    Lightning's own plugin writes into the folder of temporary files and moves the result. To another filesystem that is
    a copy onto the old file, so that a kill or a full disk leaves neither.
    """

    def save_checkpoint(self, checkpoint: Mapping[str, Any], path: str | Path, storage_options: Any = None) -> None:
        trained_weights.write_checkpoint(checkpoint, Path(path))

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return trained_weights.read_checkpoint(Path(path))

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)
