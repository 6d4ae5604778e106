"""Files of trained weights: checkpoints of Lightning, and exports.

An export is in safetensors, without pickle, with the rest of the checkpoint as JSON in the metadata. Files are written
whole, and their checksums are checked on reading.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import ZipFile

from lit_spu.errors import UserError
from lit_spu.files import check_checksums, replace_path, system_error
from lit_spu.safe_yaml import parse_json

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule

WEIGHTS = "trained.safetensors"
"""Name of the file of an export."""


def write_checkpoint(checkpoint: Mapping[str, Any], file: Path) -> None:
    """Write a checkpoint of Lightning.

    Raises:
        UserError: if the place cannot be written, or the disk is full.
    """
    import torch

    with replace_path(file) as partial, partial.open("wb") as opened:
        torch.save(dict(checkpoint), opened)


def read_checkpoint(
    file: Path, mmap: bool = False, entries: Sequence[str] = ("state_dict", "hyper_parameters")
) -> dict[str, Any]:
    """Read a checkpoint of Lightning or the file of an export, onto the CPU.

    Args:
        file: The file.
        mmap: Leave the tensors of a checkpoint of Lightning on the disk until they are used.
        entries: Entries that it must have.

    Raises:
        UserError: if the file is damaged, incomplete, or not the checkpoint of a method.
    """
    import torch

    if file.name == WEIGHTS:
        return read_weights(file)
    try:
        with ZipFile(file) as archive:
            damaged = archive.testzip()
        checkpoint: Any = None if damaged else torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # zipfile and torch raise many kinds for a file of another format
        problem = system_error(error) or "it is incomplete, or of another kind"
        raise UserError(f"{file} is not the checkpoint of a method of lit_spu: {problem}. {_ADVICE}") from error
    if damaged:
        raise UserError(f"{file} is damaged: the checksum of {damaged} in it does not match. {_ADVICE}")
    if not isinstance(checkpoint, dict) or not checkpoint.keys() >= set(entries):
        raise UserError(f"{file} is not the checkpoint of a method of lit_spu. {_ADVICE}")
    return checkpoint


_ADVICE = "Give a run directory, or its best.ckpt or last.ckpt."


def write_weights(checkpoint: Mapping[str, Any], file: Path) -> None:
    """Write the file of an export, whose folder is written as a whole.

    The `state_dict` becomes tensors, and the other entries, which JSON must hold, metadata.
    """
    from safetensors.torch import save_file

    weights = {name: tensor.contiguous() for name, tensor in checkpoint["state_dict"].items()}
    text = json.dumps({name: value for name, value in checkpoint.items() if name != "state_dict"})
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file(weights, file, metadata={"lit_spu": text})


def read_weights(file: Path) -> dict[str, Any]:
    """Read the checkpoint that `write_weights` wrote.

    Raises:
        UserError: if the file is damaged or of another kind.
    """
    from safetensors import SafetensorError, safe_open

    check_checksums(file.parent)
    try:
        with safe_open(file, "pt") as opened:
            checkpoint: dict[str, Any] = parse_json(opened.metadata()["lit_spu"])
            names = opened.keys()
            checkpoint["state_dict"] = {name: opened.get_tensor(name) for name in names}
            _ = checkpoint["hyper_parameters"]  # is there
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{file} is damaged, or was not written by lit-spu export: {error!r}") from error
    return checkpoint


def restore_weights(method: LightningModule, file: Path) -> None:
    """Load trained weights into a method, from a checkpoint of Lightning or an export.

    Raises:
        UserError: if the file is damaged or of another kind, or belongs to another backbone or another method.
    """
    checkpoint = read_checkpoint(file)
    method.on_load_checkpoint(checkpoint)
    try:
        method.load_state_dict(checkpoint["state_dict"])
    except RuntimeError as error:  # torch lists the shapes that differ
        raise UserError(f"{file} does not fit these settings of {type(method).__name__}: {error}") from error
