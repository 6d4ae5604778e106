"""A cache of a frozen backbone's hidden states: its blocks run once for each text.

The hidden states of a text depend on its tokens and on the backbone alone. A digest of both is their key, so no cached
record can be out of date. Runs of any task, seed or batch size share the cache, as do methods that read the same
states.

The record of a text holds for each stack the wanted states [states, tokens, width], then the scales of int8.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import tee
from pathlib import Path
from uuid import uuid4

import numpy as np
import torch
from torch import Tensor
from torch.profiler import record_function

from lit_spu.backbones.activation_store import FileStore, MemoryStore, Record, Store
from lit_spu.backbones.backbone import Backbone
from lit_spu.backbones.cache_keys import digest_backbone, digest_texts
from lit_spu.backbones.cached_states import Array, Encoded, RecordReader, Stacks, num_bytes, to_record
from lit_spu.backbones.cached_texts import CachedTexts
from lit_spu.backbones.copy_ahead import copy_ahead
from lit_spu.backbones.precision import Precision
from lit_spu.backbones.stacks import Batch, HiddenStates, StateIndices
from lit_spu.backbones.state_tables import StateTables
from lit_spu.errors import UserError

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
_MIB = 2**20


@dataclass(frozen=True)
class Plan:
    """The number of texts to cache, how many of them are new, the bytes of the new ones, and those of all."""

    num_texts: int
    num_new: int
    num_bytes: int
    num_bytes_of_all: int


class ActivationCache:
    """A callable that returns what `Backbone.hidden_states` does, but computes no text twice.

    A record that is damaged is computed again. Texts that were planned are read by their `index`: from a table on the
    device if they have room there, else from the host, from where `prepare` copies them without a wait.

    Args:
        backbone: A backbone whose blocks are frozen, at least those that the wanted states depend on.
        folder: The folder of the cache, which all runs share; None caches in the memory of this process.
        precision: The format of cached states. With fp32 (or bf16 for a backbone in bf16) they equal to the bit the
            states that were computed when the text was first cached. Computed in another batch, where the padding has
            another length, they may differ in the last bits. So may the last block's state at the answer's position,
            which a pass without a cache computes alone. int8 has one scale for each token of each block.
        wanted: The hidden states to cache; None caches all.
    """

    def __init__(
        self,
        backbone: Backbone,
        folder: Path | None = None,
        precision: Precision = "fp32",
        wanted: StateIndices | None = None,
    ) -> None:
        self.backbone = backbone
        self.cached_dtype = _DTYPES[precision]
        self.wanted = [sorted(numbers) for numbers in wanted or backbone.base_model.all_states()]
        parameter = next(backbone.base_model.embeddings[0].parameters())
        self.dtype, self.device = parameter.dtype, parameter.device
        name = f"{digest_backbone(backbone, self.wanted)}-{precision}"
        self.store: Store = MemoryStore() if folder is None else FileStore(folder / name)
        self.texts = CachedTexts(())
        self.tables: StateTables | None = None
        self._stacks = [number for number, numbers in enumerate(self.wanted) if numbers]
        self._key = _new_key()

    def __call__(self, batch: Batch) -> tuple[HiddenStates, ...]:
        """Return the hidden states of all stacks, zero where a text is padded.

        The states of a stack are views of one tensor, [states, batch, tokens, width].
        """
        inputs = self.backbone.model_inputs(batch)
        states = self._read_prepared(batch, inputs)
        if states is None:
            states = self._find_or_compute(batch, inputs)
        found = []
        with record_function("cache"):
            for number, (stack, wanted) in enumerate(zip(self.backbone.stacks, self.wanted, strict=True)):
                blocks = states[number].decode(self.dtype).unbind() if wanted else ()
                mask = None if number else inputs.get("attention_mask")
                found.append(HiddenStates.select(dict(zip(wanted, blocks, strict=True)), stack.depth, mask))
        return tuple(found)

    # -- batches of planned texts -------------------------------------------------------------------------------------

    def prepare(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        """Yield batches with what `__call__` needs to read their states without a wait, if all of them are cached.

        These are the positions of the states in the tables on the device, or else the states themselves. They are
        copied to the device one batch ahead.

        Args:
            batches: Batches in the memory of the host. Any other is yielded as it is.
        """
        own, copied = tee(batches)
        parts = map(self._find_parts, copied)
        is_copied = self._can_overlap and not self._is_resident
        for batch, part in zip(own, copy_ahead(parts, self.device) if is_copied else parts, strict=True):
            yield {**batch, **part}

    @property
    def _is_resident(self) -> bool:
        return self.tables is not None and self.tables.device == self.device

    @property
    def _can_overlap(self) -> bool:
        """Whether copies from pinned memory run while the device computes."""
        return self.device.type == "cuda"

    def is_prepared(self, batch: Batch) -> bool:
        """Return whether `prepare` has found the states of this batch."""
        return any(self._name(part, stack) in batch for part in ("positions", "numbers") for stack in self._stacks)

    def _find_parts(self, batch: Batch) -> dict[str, Tensor]:
        """Return what is added to a batch: nothing if a text is not planned, and its rows if one is not cached yet."""
        rows = self.texts.find(batch) if batch["input_ids"].device.type == "cpu" else None
        if rows is None:
            return {}
        states = None
        if self.tables is None:
            states = self._find_records(rows, batch["input_ids"].shape[1])
        elif self.tables.are_filled(rows):
            positions = self.tables.positions(rows, batch["input_ids"].shape[1])
            if self._is_resident:
                return {self._name("positions", stack): self._pin(part) for stack, part in positions.items()}
            states = self.tables.read(positions, self._can_overlap)
        if states is None:
            return {self._name("rows"): self._pin(torch.from_numpy(rows))}
        return {
            self._name(name, stack): _pack(part)
            for stack, encoded in states.items()
            for name, part in encoded._asdict().items()
            if part is not None
        }

    def _find_records(self, rows: Array, longest: int) -> Stacks | None:
        """Return the states of planned texts from their records, or None if one has none."""
        records = self.store.find([self.texts.keys[row] for row in rows])
        known = [record for record in records if record is not None]
        if len(known) < len(records):
            return None
        return self._decode_records(known, self._planned_counts(rows), longest, self._can_overlap)

    def _planned_counts(self, rows: Array) -> list[Array]:
        return [counts[rows] for counts in self.texts.counts]

    def _pin(self, tensor: Tensor) -> Tensor:
        return tensor.pin_memory() if self._can_overlap else tensor

    def _name(self, part: str, stack: int = 0) -> str:
        return f"{self._key}_{part}_{stack}"

    def _read_prepared(self, batch: Batch, inputs: Mapping[str, Tensor]) -> Stacks | None:
        """Return the states of a batch from what `prepare` has added to it, or None if it has not."""
        positions, states = {}, {}
        for stack, ids in enumerate(_input_ids(inputs)):
            shape = (len(ids), len(self.wanted[stack]), ids.shape[1])
            if (found := batch.get(self._name("positions", stack))) is not None and found.shape == ids.shape:
                positions[stack] = found
            elif (found := batch.get(self._name("numbers", stack))) is not None and found.shape[:3] == shape:
                scales = batch.get(self._name("scales", stack))
                numbers = _unpack(found, self.cached_dtype)
                states[stack] = Encoded(numbers, None if scales is None else _unpack(scales, torch.float32))
            elif self.wanted[stack]:  # not prepared, or padded to another length since
                return None
        if positions and self.tables is not None:
            with record_function("cache"):
                return self.tables.read(positions)
        return states

    # -- all batches --------------------------------------------------------------------------------------------------

    def _find_or_compute(self, batch: Batch, inputs: Mapping[str, Tensor]) -> Stacks:
        """Return the states of a batch, which are computed and cached where they are not."""
        rows, keys, counts = self._identify(batch, inputs)
        longest = inputs["input_ids"].shape[1]
        if self.tables is None or rows is None:
            records = self._find_or_add_records(batch, keys, counts)
            states = self._decode_records(records, counts, longest)
        else:
            if not self.tables.are_filled(rows):
                if self.store.in_memory:  # the tables are the store
                    states = self._compute(batch)
                else:
                    records = self._find_or_add_records(batch, keys, counts)
                    states = self._decode_records(records, counts, longest)
                self.tables.fill(rows, states)
            states = self.tables.read(self.tables.positions(rows, longest))
        return {stack: encoded.to(inputs["input_ids"].device) for stack, encoded in states.items()}

    def _identify(self, batch: Batch, inputs: Mapping[str, Tensor]) -> tuple[Array | None, list[bytes], list[Array]]:
        """Return the rows of the texts, or None if one is not planned, their keys, and their tokens for each stack."""
        if (found := batch.get(self._name("rows"))) is not None:
            rows = found.cpu().numpy()
            return rows, [self.texts.keys[row] for row in rows], self._planned_counts(rows)
        counts = self._count_tokens(inputs)
        keys = digest_texts(inputs, counts[0])
        return self.texts.find_keys(keys), keys, counts

    def _compute(self, batch: Batch) -> Stacks:
        """Compute the wanted states of a batch, in the format of the cache."""
        found = self.backbone.hidden_states(batch, self.wanted)
        every = [(states.embeddings, *states.blocks) for states in found]
        with record_function("cache"):
            return {
                stack: Encoded.round(torch.stack([every[stack][number] for number in wanted]), self.cached_dtype)
                for stack, wanted in enumerate(self.wanted)
                if wanted
            }

    def _find_or_add_records(self, batch: Batch, keys: Sequence[bytes], counts: Sequence[Array]) -> list[Record]:
        """Return the record of each text of a batch. New states are read back, for the same rounding each time."""
        records = self.store.find(keys)
        if any(record is None for record in records):
            new_rows = {key: row for row, (key, record) in enumerate(zip(keys, records, strict=True)) if record is None}
            states = {stack: encoded.map(Tensor.cpu) for stack, encoded in self._compute(batch).items()}
            with record_function("cache"):
                self._add_records({key: to_record(states, row, counts) for key, row in new_rows.items()})
                records = self.store.find(keys)
        known = [record for record in records if record is not None]
        if len(known) < len(records):
            raise UserError(
                f"model.activation_cache: records in {self.store} are damaged right after they were written. Use"
                " another folder, or --model.activation_cache=null."
            )
        return known

    def _add_records(self, records: Mapping[bytes, Record]) -> None:
        try:
            self.store.add(records)
        except OSError as error:
            raise UserError(
                f"model.activation_cache: {self.store} cannot be written ({error}). Use another folder, or"
                " --model.activation_cache=null."
            ) from error

    def _decode_records(
        self, records: Sequence[Record], counts: Sequence[Array], longest: int, pinned: bool = False
    ) -> Stacks:
        """Return the states of a batch from the records of its texts, padded."""
        reader = RecordReader(records, self.cached_dtype, pinned)
        with record_function("cache"):
            return {
                stack: reader.read(len(wanted), counts[stack], int(counts[stack].max()) if stack else longest, width)
                for stack, (wanted, width) in enumerate(zip(self.wanted, self._widths, strict=True))
                if wanted
            }

    def _count_tokens(self, inputs: Mapping[str, Tensor]) -> list[Array]:
        """Return for each stack the number of tokens of each text, [batch]."""
        counts = [np.full(len(ids), ids.shape[1]) for ids in _input_ids(inputs)]
        if (mask := inputs.get("attention_mask")) is not None:
            mask = mask.cpu()
            if bool((mask[:, 1:] > mask[:, :-1]).any()):
                raise UserError(
                    "model.activation_cache needs texts that are padded on the right. Set it to null for this data set."
                )
            counts[0] = mask.sum(1).numpy()
        return counts

    # -- before training ----------------------------------------------------------------------------------------------

    def plan(self, batches: Iterable[Batch], num_processes: int = 1, device_bytes: int = 0) -> Plan:
        """Number the texts to cache, check that there is space for them, and reserve it.

        States that were cached in memory before are forgotten.

        Args:
            batches: All texts that will be cached, in the memory of the host.
            num_processes: Number of training processes on this machine. Each has a separate cache if it is in memory.
            device_bytes: Memory of the device that the cached states may take. If they need more, they stay in files,
                or in the memory of the host.

        Raises:
            UserError: If the store has less space.
        """
        self.texts = CachedTexts(self._with_keys(batches))
        self.tables = None
        self._key = _new_key()
        sizes = sum(
            (
                num_bytes(len(wanted), 1, width, self.cached_dtype) * counts
                for wanted, width, counts in zip(self.wanted, self._widths, self.texts.counts, strict=False)
            ),
            start=np.zeros(len(self.texts), np.int64),
        )
        is_new = ~np.array(self.store.contains(self.texts.keys), np.bool_)
        plan = Plan(len(sizes), int(is_new.sum()), int(sizes[is_new].sum()), int(sizes.sum()))
        is_resident = plan.num_bytes_of_all <= device_bytes
        needed = plan.num_bytes
        if self.store.in_memory:
            needed = 0 if is_resident and self.device.type != "cpu" else plan.num_bytes_of_all * num_processes
        if needed > (free := self.store.free_bytes()):
            raise self._space_error(plan, needed, free)
        if is_resident or self.store.in_memory:
            device = self.device if is_resident else torch.device("cpu")
            try:
                self.tables = StateTables(self.texts, self.wanted, self._widths, self.cached_dtype, device)
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"model.cache_device_mib: {device} has no room for all {plan.num_bytes_of_all / _MIB:,.0f} MiB of"
                    " cached states. Give it less than that, such as 0: then they are copied from the host."
                ) from error
        return plan

    def describe_place(self) -> str:
        """Return a sentence on where a step reads the states of planned texts."""
        if self.tables is None:
            return f"A step reads them from {self.store}."
        where = "the memory of this process" if self.tables.device.type == "cpu" else str(self.tables.device)
        return f"A step reads them from {where} ({self.tables.num_bytes / _MIB:,.0f} MiB)."

    def _with_keys(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, list[bytes], list[Array]]]:
        for batch in batches:
            inputs = self.backbone.model_inputs(batch)
            counts = self._count_tokens(inputs)
            yield batch, digest_texts(inputs, counts[0]), counts

    @property
    def _widths(self) -> list[int]:
        return [stack.width for stack in self.backbone.stacks]

    def _space_error(self, plan: Plan, needed: int, free: int) -> UserError:
        size = self.cached_dtype.itemsize
        smaller = [
            f"--model.cache_precision={name} ({needed * dtype.itemsize / size / _MIB:,.0f} MiB)"
            for name, dtype in _DTYPES.items()
            if dtype.itemsize < size
        ]
        return UserError(
            f"model.activation_cache: the hidden states of {plan.num_new:,} texts take {needed / _MIB:,.0f} MiB, and"
            f" {self.store} has room for {free / _MIB:,.0f} MiB. Use"
            f" {', '.join([*smaller, 'another folder', 'fewer texts (--data.limit_train)'])} or"
            " --model.activation_cache=null."
        )


def _new_key() -> str:
    """Return a prefix of names in batches. No other cache, and no other plan, may read what was prepared for one."""
    return f"cached_{uuid4().hex[:8]}"


def _pack(part: Tensor) -> Tensor:
    """Return a part [states, batch, …] for a batch: its rows first, as integers, which no Trainer converts."""
    return part.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[part.itemsize]).transpose(0, 1)


def _unpack(part: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a part [states, batch, …] as it was packed."""
    return part.transpose(0, 1).view(dtype)


def _input_ids(inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the token ids of each stack."""
    return [ids for name, ids in inputs.items() if name.endswith("input_ids")]
