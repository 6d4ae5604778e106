"""What a run by MeZO did, in a few bytes a step, from which its weights can be made again.

The file is a line of JSON and then rows of little-endian fp32, one a step: the learning rate of every group of weights,
and the slope along every direction. 20,000 steps of one group and one direction are 160 kB.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from lit_spu.errors import UserError
from lit_spu.optim.mezo import MeZO

NAME = "trajectory.mezo"


@dataclass(frozen=True)
class Trajectory:
    """A trajectory as read: what it says of its run, and a row a step."""

    file: Path
    header: dict[str, Any]
    rows: list[list[float]]

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read a trajectory, or that of a run directory; of a row that was cut short, nothing.

        Raises:
            UserError: if there is none.
        """
        file = Path(path, NAME) if Path(path).is_dir() else Path(path)
        if not file.is_file():
            raise UserError(f"trajectory: {file} does not exist. Give the directory of a run by MeZO, or its {NAME}.")
        line, _, rest = file.read_bytes().partition(b"\n")
        try:
            header = json.loads(line)
            width = header["groups"] + header["directions"]
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"trajectory: {file} was not written by a run of MeZO: {error!r}.") from error
        whole = len(rest) // (4 * width) * (4 * width)
        return cls(file, header, np.frombuffer(rest[:whole], "<f4").reshape(-1, width).tolist())

    def first(self, steps: int | None) -> list[list[float]]:
        """The rows of the first steps, or all.

        Raises:
            UserError: if there are not so many.
        """
        if steps is not None and not 0 <= steps <= len(self.rows):
            raise UserError(f"step={steps}: {self.file} has {len(self.rows):,} steps. Give 0 to {len(self.rows)}.")
        return self.rows[:steps]


class Recorder:
    """Writes the trajectory of an optimizer into a folder, at first what it has done already."""

    def __init__(self, folder: Path, header: Mapping[str, Any], optimizer: MeZO) -> None:
        self.optimizer, self.file, self.written = optimizer, folder / NAME, 0
        folder.mkdir(parents=True, exist_ok=True)
        self.file.write_bytes(json.dumps(header).encode() + b"\n")
        self.append()

    def append(self) -> None:
        """Write what was done since."""
        history = self.optimizer.history
        with self.file.open("ab") as file:
            file.write(np.asarray(history[self.written :], "<f4").tobytes())
        self.written = len(history)
