"""Stores of the activation cache: records of bytes by key, a digest of what they were computed from."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import psutil

Record = np.ndarray[Any, np.dtype[np.uint8]]
"""The hidden states of one text as bytes."""


class Store(ABC):
    """Base class of stores."""

    @abstractmethod
    def find(self, keys: Sequence[bytes]) -> list[Record | None]:
        """Return the record of each key, None where there is none."""

    @abstractmethod
    def add(self, records: Mapping[bytes, Record]) -> None:
        """Save records."""

    @abstractmethod
    def free_bytes(self) -> int:
        """Return the number of bytes that can still be saved."""


class MemoryStore(Store):
    """Records in the memory of this process."""

    def __init__(self) -> None:
        self.records: dict[bytes, Record] = {}

    def find(self, keys: Sequence[bytes]) -> list[Record | None]:
        return [self.records.get(key) for key in keys]

    def add(self, records: Mapping[bytes, Record]) -> None:
        self.records |= records

    def free_bytes(self) -> int:
        return int(psutil.virtual_memory().available)

    def __str__(self) -> str:
        return "memory"


class FileStore(Store):
    """Records in a folder that any number of processes read and write at the same time.

    Each process that adds records writes two files: `.taps` holds its records end to end, and `.index` a line of 32
    bytes for each record (key, start, end). A line is written after its record. So a record that a killed process left
    incomplete is in no index, and is never read.
    """

    _LINE = np.dtype([("key", "V16"), ("start", "<u8"), ("end", "<u8")])

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._places: dict[bytes, tuple[Path, int, int]] = {}
        self._maps: dict[Path, Record] = {}
        self._num_lines_read: dict[Path, int] = {}  # by index file
        self._own_file: Path | None = None
        self._end = 0

    def find(self, keys: Sequence[bytes]) -> list[Record | None]:
        if any(key not in self._places for key in keys):
            self._read_indices()
        return [self._record(*self._places[key]) if key in self._places else None for key in keys]

    def _record(self, path: Path, start: int, end: int) -> Record:
        if path not in self._maps or end > len(self._maps[path]):
            self._maps[path] = np.memmap(path, np.uint8, "r")
        return self._maps[path][start:end]

    def add(self, records: Mapping[bytes, Record]) -> None:
        if self._own_file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._own_file = self.folder / f"{uuid4().hex}.taps"
        lines = np.zeros(len(records), self._LINE)
        with self._own_file.open("ab") as data:
            for line, (key, record) in zip(lines, records.items(), strict=True):
                data.write(record.data)
                line["key"], line["start"], line["end"] = key, self._end, self._end + len(record)
                self._end += len(record)
        with self._own_file.with_suffix(".index").open("ab") as index:
            index.write(lines.tobytes())

    def free_bytes(self) -> int:
        existing = next(folder for folder in (self.folder, *self.folder.absolute().parents) if folder.is_dir())
        return shutil.disk_usage(existing).free

    def _read_indices(self) -> None:
        """Read the lines that this and other processes have added since the last time."""
        for path in self.folder.glob("*.index"):
            known = self._num_lines_read.get(path, 0)
            count = path.stat().st_size // self._LINE.itemsize - known
            if count:
                lines = np.fromfile(path, self._LINE, count, offset=known * self._LINE.itemsize)
                data = path.with_suffix(".taps")
                size = data.stat().st_size  # after a power cut it may be less than the index says
                self._places |= {key: (data, start, end) for key, start, end in lines.tolist() if end <= size}
                self._num_lines_read[path] = known + count

    def __str__(self) -> str:
        return str(self.folder)
