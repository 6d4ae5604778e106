"""Stores of the activation cache: records of bytes by key, a digest of what they were computed from."""

from __future__ import annotations

import shutil
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar
from uuid import uuid4

import numpy as np
import psutil

Record = np.ndarray[Any, np.dtype[np.uint8]]
"""The hidden states of one text as bytes."""


class Store(ABC):
    """Base class of stores.

    Attributes:
        in_memory: Whether the records end with the process.
    """

    in_memory: ClassVar[bool] = False

    @abstractmethod
    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        """Return for each key whether it has a record, without reading the record."""

    @abstractmethod
    def find(self, keys: Sequence[bytes]) -> list[Record | None]:
        """Return the record of each key, None where there is none, or where it is damaged."""

    @abstractmethod
    def add(self, records: Mapping[bytes, Record]) -> None:
        """Save records of keys that have none."""

    @abstractmethod
    def free_bytes(self) -> int:
        """Return the number of bytes that can still be saved."""


class MemoryStore(Store):
    """Records in the memory of this process."""

    in_memory = True

    def __init__(self) -> None:
        self.records: dict[bytes, Record] = {}

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        return [key in self.records for key in keys]

    def find(self, keys: Sequence[bytes]) -> list[Record | None]:
        return [self.records.get(key) for key in keys]

    def add(self, records: Mapping[bytes, Record]) -> None:
        for key, record in records.items():
            self.records.setdefault(key, record)

    def free_bytes(self) -> int:
        return int(psutil.virtual_memory().available)

    def __str__(self) -> str:
        return "memory"


@dataclass
class _Place:
    """Position of a record in a file, and its checksum."""

    path: Path
    start: int
    end: int
    checksum: int
    is_checked: bool = False


class FileStore(Store):
    """Records in a folder that any number of processes read and write at the same time.

    Each process that adds records writes two files: `.taps` holds its records end to end, and `.index` a line of 36
    bytes for each record (key, start, end, and the CRC-32 of key and record). A line is written after its record. So a
    record that a killed process left incomplete is in no index, and is never read. A process compares a record with its
    checksum when it reads it for the first time. A damaged one counts as absent.
    """

    _LINE = np.dtype([("key", "V16"), ("start", "<u8"), ("end", "<u8"), ("checksum", "<u4")])

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._places: dict[bytes, list[_Place]] = {}
        self._maps: dict[Path, Record] = {}
        self._num_lines_read: dict[Path, int] = {}  # by index file
        self._own_file: Path | None = None
        self._end = 0

    def contains(self, keys: Sequence[bytes]) -> list[bool]:
        if any(key not in self._places for key in keys):
            self._read_indices()
        return [key in self._places for key in keys]

    def find(self, keys: Sequence[bytes]) -> list[Record | None]:
        self.contains(keys)
        return [self._read_record(key) for key in keys]

    def _read_record(self, key: bytes) -> Record | None:
        """Return the record of a key, and forget its places that are damaged."""
        places = self._places.get(key, [])
        while places:
            place = places[-1]
            record = self._map(place)
            if record is not None and (place.is_checked or _checksum(key, record) == place.checksum):
                place.is_checked = True
                return record
            places.pop()
        self._places.pop(key, None)
        return None

    def _map(self, place: _Place) -> Record | None:
        """Return the bytes at a place, or None if the file does not have them."""
        try:
            if place.path not in self._maps or place.end > len(self._maps[place.path]):
                self._maps[place.path] = np.memmap(place.path, np.uint8, "r")
        except (OSError, ValueError):  # not there, or empty
            return None
        record = self._maps[place.path][place.start : place.end]
        return record if len(record) == place.end - place.start else None

    def add(self, records: Mapping[bytes, Record]) -> None:
        self._read_indices()
        # other processes may have been faster, above all those that train on the same texts
        records = {key: record for key, record in records.items() if self._read_record(key) is None}
        if not records:
            return
        if self._own_file is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._own_file = self.folder / f"{uuid4().hex}.taps"
        lines = np.zeros(len(records), self._LINE)
        with self._own_file.open("ab") as data:
            for line, (key, record) in zip(lines, records.items(), strict=True):
                data.write(record.data)
                line["key"], line["checksum"] = key, _checksum(key, record)
                line["start"], line["end"] = self._end, self._end + len(record)
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
            if count > 0:
                lines = np.fromfile(path, self._LINE, count, offset=known * self._LINE.itemsize)
                data = path.with_suffix(".taps")
                size = data.stat().st_size if data.exists() else 0  # after a power cut, less than the index says
                for key, start, end, checksum in lines.tolist():
                    if start <= end <= size:
                        self._places.setdefault(key, []).append(_Place(data, start, end, checksum))
                self._num_lines_read[path] = known + count

    def __str__(self) -> str:
        return str(self.folder)


def _checksum(key: bytes, record: Record) -> int:
    return zlib.crc32(record.data, zlib.crc32(key))
