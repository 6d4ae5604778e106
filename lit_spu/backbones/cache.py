"""What a frozen backbone computes for a text, kept: its blocks run once for each text, and are read from then on.

The taps of a text follow from its tokens and the backbone, and these are what they are found by: nothing that is kept
can be stale, and runs of any task, method, seed or batch size share it.
"""

from __future__ import annotations

import math
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b, sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import psutil
import torch
from torch import Tensor
from torch.profiler import record_function
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from lit_spu.backbones.base import Backbone, Batch, HiddenStates, Precision
from lit_spu.errors import UserError

Record = np.ndarray[Any, np.dtype[np.uint8]]
"""The taps of one text, as bytes."""

_STORED = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
_LIKE = {torch.float32: np.float32, torch.bfloat16: np.int16, torch.int8: np.int8}  # numpy has no bfloat16
_MIB = 2**20


class Store(ABC):
    """Records by the digest of what they were made from."""

    @abstractmethod
    def find(self, keys: Sequence[bytes]) -> list[Record | None]:
        """The records that there are."""

    @abstractmethod
    def add(self, records: Mapping[bytes, Record]) -> None:
        """Keep these too."""

    @abstractmethod
    def free(self) -> int:
        """Bytes that there is room for."""


class InMemory(Store):
    """Records of this process alone."""

    def __init__(self) -> None:
        self.records: dict[bytes, Record] = {}

    def find(self, keys: Sequence[bytes]) -> list[Record | None]:
        return [self.records.get(key) for key in keys]

    def add(self, records: Mapping[bytes, Record]) -> None:
        self.records |= records

    def free(self) -> int:
        return int(psutil.virtual_memory().available)

    def __str__(self) -> str:
        return "memory"


class InFiles(Store):
    """Records in a folder, which any number of processes read and write at a time.

    A process that has something to add writes a pair of files of its own: `.taps`, records end to end, and `.index`, a
    line of 32 bytes for each (its key, where it starts and ends). A line is written when its record is: what a killed
    process left half written is not in the index, and is never read.
    """

    _LINE = np.dtype([("key", "V16"), ("start", "<u8"), ("end", "<u8")])

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.places: dict[bytes, tuple[Path, int, int]] = {}
        self._maps: dict[Path, Record] = {}
        self._lines: dict[Path, int] = {}  # of each index, those that were read
        self._own: Path | None = None
        self._end = 0

    def find(self, keys: Sequence[bytes]) -> list[Record | None]:
        if any(key not in self.places for key in keys):
            self._look()
        return [self._record(*self.places[key]) if key in self.places else None for key in keys]

    def _record(self, path: Path, start: int, end: int) -> Record:
        if path not in self._maps or end > len(self._maps[path]):
            self._maps[path] = np.memmap(path, np.uint8, "r")
        return self._maps[path][start:end]

    def add(self, records: Mapping[bytes, Record]) -> None:
        if self._own is None:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._own = self.folder / f"{uuid4().hex}.taps"
        lines = np.zeros(len(records), self._LINE)
        with self._own.open("ab") as data:
            for line, (key, record) in zip(lines, records.items(), strict=True):
                data.write(record.data)
                line["key"], line["start"], line["end"] = key, self._end, self._end + len(record)
                self._end += len(record)
        with self._own.with_suffix(".index").open("ab") as index:
            index.write(lines.tobytes())

    def free(self) -> int:
        there = next(folder for folder in (self.folder, *self.folder.absolute().parents) if folder.is_dir())
        return shutil.disk_usage(there).free

    def _look(self) -> None:
        """Read what this and other processes have added to the indices."""
        for path in self.folder.glob("*.index"):
            known = self._lines.get(path, 0)
            count = path.stat().st_size // self._LINE.itemsize - known
            if count:
                lines = np.fromfile(path, self._LINE, count, offset=known * self._LINE.itemsize)
                data = path.with_suffix(".taps")
                size = data.stat().st_size  # after a power cut, perhaps less than the index says
                self.places |= {key: (data, start, end) for key, start, end in lines.tolist() if end <= size}
                self._lines[path] = known + count

    def __str__(self) -> str:
        return str(self.folder)


@dataclass(frozen=True)
class Plan:
    """What texts will take: how many they are, how many of them are new, and the bytes of these."""

    texts: int
    new: int
    nbytes: int


class ActivationCache:
    """`Backbone.trunk` that computes no text twice.

    Args:
        backbone: A frozen one.
        folder: Where to keep taps for all runs; without one they are kept in memory for this process.
        precision: What they are kept in. fp32 (and bf16 of a backbone in bf16) gives back what was computed, to the
            bit; int8 has a scale for each token of each block.
    """

    def __init__(self, backbone: Backbone, folder: Path | None = None, precision: Precision = "fp32") -> None:
        self.backbone = backbone
        self.stored = _STORED[precision]
        self.shapes = [(stream.depth + 1, stream.width) for stream in backbone.streams]
        self.dtype = next(backbone.base_model.embeddings[0].parameters()).dtype
        self.store: Store = InMemory() if folder is None else InFiles(folder / f"{_digest(backbone)}-{precision}")

    def __call__(self, batch: Batch) -> tuple[HiddenStates, ...]:
        """What every block computed, per stream; zeros where a text is padded."""
        inputs = self.backbone.inputs(batch)
        tokens = self._tokens(inputs)
        keys = _keys(inputs, tokens[0])
        records = self.store.find(keys)
        if any(record is None for record in records):  # what is given is what was kept, also now
            taps = self.backbone.trunk(batch)
            rows = {key: row for row, (key, record) in enumerate(zip(keys, records, strict=True)) if record is None}
            with record_function("cache"):
                self._keep(taps, tokens, rows)
                records = self.store.find(keys)
        with record_function("cache"):
            return self._read([record for record in records if record is not None], tokens, inputs)

    def plan(self, batches: Iterable[Batch], processes: int = 1) -> Plan:
        """What it will keep of these texts, on a machine with that many processes that train.

        Raises:
            UserError: if there is no room for it.
        """
        sizes: dict[bytes, int] = {}
        new: set[bytes] = set()
        for batch in batches:
            inputs = self.backbone.inputs(batch)
            tokens = self._tokens(inputs)
            keys = _keys(inputs, tokens[0])
            for row, (key, record) in enumerate(zip(keys, self.store.find(keys), strict=True)):
                sizes[key] = sum(self._size(stream, int(count[row])) for stream, count in enumerate(tokens))
                if record is None:
                    new.add(key)
        plan = Plan(len(sizes), len(new), sum(sizes[key] for key in new))
        need = plan.nbytes * (processes if isinstance(self.store, InMemory) else 1)
        free, size = self.store.free(), self.stored.itemsize
        if need > free:
            less = [
                f"--model.cache_precision={name} ({need * kind.itemsize / size / _MIB:,.0f} MiB)"
                for name, kind in _STORED.items()
                if kind.itemsize < size
            ]
            raise UserError(
                f"model.activation_cache: what the backbone computes for {plan.new:,} texts takes"
                f" {need / _MIB:,.0f} MiB, and {self.store} has room for {free / _MIB:,.0f}. Give"
                f" {', '.join([*less, 'another folder', 'fewer texts (--data.limit_train)'])} or"
                " --model.activation_cache=null."
            )
        return plan

    # -- one text's bytes: for each stream the numbers [blocks + 1, tokens, width], then the scales of int8 -----------

    def _size(self, stream: int, tokens: int) -> int:
        blocks, width = self.shapes[stream]
        return blocks * tokens * (width * self.stored.itemsize + (4 if self.stored is torch.int8 else 0))

    def _tokens(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """How many tokens each text [texts] has in each stream."""
        ids = [tensor for name, tensor in inputs.items() if name.endswith("input_ids")]
        counts = [ids_of.new_full((len(ids_of),), ids_of.shape[1]).cpu() for ids_of in ids]
        if (mask := inputs.get("attention_mask")) is not None:
            if bool((mask[:, 1:] > mask[:, :-1]).any()):
                raise UserError(
                    "model.activation_cache wants texts that are padded on the right: set it to null for these data."
                )
            counts[0] = mask.sum(1).cpu()
        return counts

    def _keep(self, taps: Sequence[HiddenStates], tokens: Sequence[Tensor], rows: Mapping[bytes, int]) -> None:
        parts: dict[bytes, list[Record]] = {key: [] for key in rows}
        for tap, counts in zip(taps, tokens, strict=True):
            numbers = torch.stack([tap.embeddings, *tap.blocks])
            scales = None
            if self.stored is torch.int8:
                scales = numbers.float().abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
                numbers = (numbers / scales).round()
                scales = scales.cpu()
            numbers = numbers.to(self.stored).cpu()
            for key, row in rows.items():
                part = numbers[:, row, : counts[row]].contiguous()
                parts[key].append(part.view(torch.uint8).numpy().reshape(-1))
                if scales is not None:
                    parts[key].append(scales[:, row, : counts[row]].contiguous().view(torch.uint8).numpy().reshape(-1))
        try:
            self.store.add({key: np.concatenate(part) for key, part in parts.items()})
        except OSError as error:
            raise UserError(
                f"model.activation_cache: {self.store} cannot be written ({error}). Give another folder, or"
                " --model.activation_cache=null."
            ) from error

    def _read(
        self, records: Sequence[Record], tokens: Sequence[Tensor], inputs: Mapping[str, Tensor]
    ) -> tuple[HiddenStates, ...]:
        left = list(records)

        def take(row: int, like: Any, *shape: int) -> Any:
            """The next numbers of a record."""
            end = math.prod(shape) * np.dtype(like).itemsize
            part, left[row] = left[row][:end], left[row][end:]
            return part.view(like).reshape(shape)

        taps = []
        for stream, counts in enumerate(tokens):
            (blocks, width), longest = self.shapes[stream], int(counts.max())
            numbers = torch.empty(blocks, len(records), longest, width, dtype=self.stored)
            raw = (numbers.view(torch.int16) if self.stored is torch.bfloat16 else numbers).numpy()
            scales = torch.zeros(blocks, len(records), longest, 1) if self.stored is torch.int8 else None
            for row, count in enumerate(counts.tolist()):
                raw[:, row, :count] = take(row, _LIKE[self.stored], blocks, count, width)
                raw[:, row, count:] = 0
                if scales is not None:
                    scales.numpy()[:, row, :count] = take(row, np.float32, blocks, count, 1)
            states = (
                numbers if scales is None else (block * scale for block, scale in zip(numbers, scales, strict=True))
            )
            first, *others = (state.to(inputs["input_ids"].device, self.dtype) for state in states)
            taps.append(HiddenStates(first, tuple(others), None if stream else inputs.get("attention_mask")))
        return tuple(taps)


def _keys(inputs: Mapping[str, Tensor], tokens: Tensor) -> list[bytes]:
    """A digest of what the backbone reads of each text, without padding."""
    padded = inputs["input_ids"].shape
    read = [(t.cpu().numpy(), t.shape == padded) for name, t in inputs.items() if not name.endswith("mask")]
    return [
        blake2b(b"".join((t[row, :count] if cut else t[row]).tobytes() for t, cut in read), digest_size=16).digest()
        for row, count in enumerate(tokens.tolist())
    ]


def _digest(backbone: Backbone) -> str:
    """All that decides what a frozen backbone computes for a text: weights to the last bit, settings, and what runs."""
    model, digest = backbone.base_model.model, sha256()
    config = {
        name: value
        for name, value in model.config.to_diff_dict().items()
        if name not in ("id2label", "label2id") and not name.startswith("_")  # the task's, and where it was found
    }
    device = next(model.parameters()).device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    packages = [f"{package} {version(package)}" for package in ("torch", "transformers")]
    code = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]
    digest.update(repr((code, config, device, autocast, packages)).encode())
    head = set(backbone.head_modules.parameters())  # a BERT's pooler, which no tap is behind
    for name, parameter in model.named_parameters():
        if parameter not in head:
            plain = parameter.dequantize() if is_traceable_wrapper_subclass(parameter.data) else parameter
            digest.update(f"{name} {plain.dtype} {tuple(plain.shape)}".encode())
            digest.update(plain.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]
