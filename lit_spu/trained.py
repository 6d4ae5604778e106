"""What was trained, in one file of safetensors without pickle: weights by their names, and what they belong to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_spu.errors import UserError

if TYPE_CHECKING:
    from lit_spu.methods.base import Method

WEIGHTS = "trained.safetensors"


def write(method: Method, file: Path) -> None:
    """Write what a checkpoint of the method would hold: its trained weights, and the rest as JSON in the metadata."""
    from safetensors.torch import save_file

    method.setup("export")
    checkpoint: dict[str, Any] = {"state_dict": method.state_dict(), "hyper_parameters": dict(method.hparams)}
    method.on_save_checkpoint(checkpoint)
    weights = {name: tensor.contiguous() for name, tensor in checkpoint.pop("state_dict").items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, file, metadata={"lit_spu": json.dumps(checkpoint)})


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


def restore(method: Method, file: Path) -> None:
    """Give a method the weights in a file.

    Raises:
        UserError: if the file was not written so, or belongs to another backbone or another method.
    """
    checkpoint = read(file)
    method.on_load_checkpoint(checkpoint)
    method.load_state_dict(checkpoint["state_dict"])
