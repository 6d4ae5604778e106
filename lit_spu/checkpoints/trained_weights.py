"""Files of trained weights: safetensors without pickle, with the rest of the checkpoint as JSON in the metadata."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_spu.errors import UserError

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

WEIGHTS = "trained.safetensors"
"""Name of such a file."""


def write_weights(checkpoint: dict[str, Any], file: Path) -> None:
    """Write a checkpoint: its `state_dict` as tensors, and its other entries, which JSON must hold, as metadata."""
    from safetensors.torch import save_file

    metadata = dict(checkpoint)
    weights = {name: tensor.contiguous() for name, tensor in metadata.pop("state_dict").items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, file, metadata={"lit_spu": json.dumps(metadata)})


def read_weights(file: Path, weights: bool = True) -> dict[str, Any]:
    """Read the checkpoint that `write_weights` wrote.

    Args:
        file: The file.
        weights: Read the tensors too; otherwise `state_dict` is empty.

    Raises:
        UserError: if the file is of another kind.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "pt") as opened:
            checkpoint: dict[str, Any] = json.loads(opened.metadata()["lit_spu"])
            names = opened.keys() if weights else ()
            checkpoint["state_dict"] = {name: opened.get_tensor(name) for name in names}
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file} was not written by lit-spu export: {error!r}") from error
    return checkpoint


def restore_weights(method: LightningModule, file: Path) -> None:
    """Load trained weights into a method, from a file of `write_weights` or a checkpoint of Lightning.

    Raises:
        UserError: if the file is of another kind, or belongs to another backbone or another method.
    """
    checkpoint = read_weights(file) if file.name == WEIGHTS else _read_lightning_checkpoint(file)
    method.on_load_checkpoint(checkpoint)
    try:
        method.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:  # torch lists the shapes that differ
        raise UserError(f"{file} does not fit these settings of {type(method).__name__}: {error}") from error


def _read_lightning_checkpoint(file: Path) -> dict[str, Any]:
    import torch

    try:
        checkpoint: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        checkpoint["state_dict"]
    except Exception as error:  # torch raises many kinds for a file of another format
        raise UserError(f"{file} is not the checkpoint of a method of lit_spu.") from error
    return checkpoint
