"""Trajectory of a MeZO run: a few bytes per step, from which the trained weights can be computed again.

The file is a line of JSON (the header), followed by one row of little-endian fp32 per step: the learning rate of every
parameter group and the slope along every direction. 20,000 steps of one group and one direction take 160 kB.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

from lit_spu.checkpoints.run_dir import checkpoint_config
from lit_spu.errors import UserError
from lit_spu.files import replace_path
from lit_spu.optim.mezo import MeZOOptimizer
from lit_spu.optim.noise import VERSION
from lit_spu.safe_yaml import parse_json

NAME = "trajectory.mezo"

_TYPES = {
    **dict.fromkeys(("version", "groups", "directions", "seed"), int),
    **dict.fromkeys(("method", "noise", "initial_fingerprint", "dtype", "device", "device_name", "torch"), str),
    **dict.fromkeys(("backbone", "hyper_parameters", "data"), dict),
}
"""Entries of the header that a replay reads, and their types."""


@dataclass(frozen=True)
class Trajectory:
    """A trajectory read from a file: its header and one row per step."""

    file: Path
    header: dict[str, Any]
    rows: list[list[float]]

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read a trajectory from its file or from a run directory. An incomplete last row is ignored.

        Raises:
            UserError: If the file does not exist or is not a trajectory.
        """
        file = Path(path, NAME) if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise UserError(f"trajectory: {file} does not exist. Give the directory of a run by MeZO, or its {NAME}.")
        line, _, data = file.read_bytes().partition(b"\n")
        try:
            header = {"data": {}, "version": 1} | parse_json(line)
            if header["version"] != VERSION:  # older ones have neither
                header = {"dtype": "float32", "device_name": ""} | header
            if wrong := [name for name, kind in _TYPES.items() if type(header[name]) is not kind]:
                raise TypeError(", ".join(wrong))
            _ = checkpoint_config(header), header["backbone"]["fingerprint"], header["backbone"]["name"]  # are there
            _ = torch.finfo(getattr(torch, header["dtype"]))  # is one of real numbers
            width = header["groups"] + header["directions"]
            rows = np.frombuffer(data[: len(data) // (4 * width) * (4 * width)], "<f4").reshape(-1, width)
        except (ValueError, TypeError, KeyError, AttributeError, ZeroDivisionError) as error:
            raise UserError(
                f"trajectory: {file} was not written by a run of MeZO: {error!r}. Give the directory of a run by MeZO,"
                f" or its {NAME}."
            ) from error
        if header["version"] != VERSION:
            raise UserError(
                f"trajectory: {file} has version {header['version']}, and this lit_spu replays version {VERSION} alone,"
                " whose noise is drawn differently. Replay it with the lit_spu that wrote it, and give the result as"
                " --model.weights."
            )
        return cls(file, header, rows.tolist())

    def first(self, steps: int | None) -> list[list[float]]:
        """Return the rows of the first `steps` steps, or all rows for None.

        Raises:
            UserError: If the trajectory has fewer steps.
        """
        if steps is not None and not 0 <= steps <= len(self.rows):
            raise UserError(f"step={steps}: {self.file} has {len(self.rows):,} steps. Give 0 to {len(self.rows)}.")
        return self.rows[:steps]


class Recorder:
    """Writer of an optimizer's trajectory."""

    def __init__(self, folder: Path, header: Mapping[str, Any], optimizer: MeZOOptimizer) -> None:
        self.header, self.optimizer, self.file, self.num_written = header, optimizer, folder / NAME, 0

    def write(self) -> None:
        """Write the file as a whole: the header and the steps that the optimizer has taken so far."""
        with replace_path(self.file) as partial:
            partial.write_bytes(json.dumps(self.header).encode() + b"\n" + self._new_rows())

    def append(self) -> None:
        """Append the steps taken since the last call."""
        with self.file.open("ab") as file:
            file.write(self._new_rows())

    def _new_rows(self) -> bytes:
        history = self.optimizer.history
        rows = np.asarray(history[self.num_written :], "<f4").tobytes()
        self.num_written = len(history)
        return rows
