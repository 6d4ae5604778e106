"""What was trained, in one file of safetensors without pickle: weights by their names, and what they belong to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_spu.errors import UserError

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

WEIGHTS = "trained.safetensors"


def write(checkpoint: dict[str, Any], file: Path) -> None:
    """Write what a method says of itself (`described`): its trained weights, and the rest as JSON in the metadata."""
    from safetensors.torch import save_file

    rest = dict(checkpoint)
    weights = {name: tensor.contiguous() for name, tensor in rest.pop("state_dict").items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, file, metadata={"lit_spu": json.dumps(rest)})


def read(file: Path, weights: bool = True) -> dict[str, Any]:
    """The same as a checkpoint, with its weights or without.

    Raises:
        UserError: if the file was not written so.
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


def restore(method: LightningModule, file: Path) -> None:
    """Give a method the weights in a file so written, or in a checkpoint.

    Raises:
        UserError: if the file is neither, or belongs to another backbone or another method.
    """
    import torch

    if file.name == WEIGHTS:
        checkpoint = read(file)
    else:
        try:
            checkpoint = torch.load(file, map_location="cpu", weights_only=True)
            checkpoint["state_dict"]
        except Exception as error:  # whatever torch makes of a file that is something else
            raise UserError(f"{file} is not the checkpoint of a method of lit_spu.") from error
    method.on_load_checkpoint(checkpoint)
    try:
        method.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:  # of which torch says the shapes
        raise UserError(f"{file} does not fit these settings of {type(method).__name__}: {error}") from error
