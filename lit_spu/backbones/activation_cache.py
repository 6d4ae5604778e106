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
from typing import Any, cast
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
from lit_spu.backbones.state_tables import StateTables, to_device
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

    A record that is damaged is computed again. Planned texts are found by their `index`. Their states are read from a
    table on the device if they have room there. Otherwise `prepare` copies them from the host without a wait.

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
        self.wanted = [sorted(indices) for indices in wanted or backbone.base_model.all_states()]
        parameter = next(backbone.base_model.embeddings[0].parameters())
        self.dtype, self.device = parameter.dtype, parameter.device
        name = f"{digest_backbone(backbone, self.wanted)}-{precision}"
        self.store: Store = MemoryStore() if folder is None else FileStore(folder / name)
        self.texts = CachedTexts(())
        self.tables: StateTables | None = None
        self._stacks = [stack for stack, indices in enumerate(self.wanted) if indices]
        self._prefix = _new_prefix()

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
        """Yield batches with added entries, so that `__call__` reads or saves their states without a wait.

        If all texts of a batch are cached, the entries are the positions of their states in tables on the device. If
        there are no such tables, they are the states, which are copied to the device one batch ahead. If all texts are
        planned but not all are cached, the entry is their text ids. A batch with other texts gets no entry.

        Args:
            batches: Batches in the memory of the host.
        """
        originals, copies = tee((batch, self.texts.find(batch)) for batch in batches)
        found = (self._find_states(batch, text_ids) for batch, text_ids in copies)
        ahead = copy_ahead(found, self.device) if self._copies_pinned else found
        for (batch, text_ids), states in zip(originals, ahead, strict=True):
            # the ids are an array, which the Trainer leaves on the host
            ids: dict[str, Any] = {} if text_ids is None or states else {self._name("text_ids"): text_ids}
            yield {**batch, **states, **ids}

    @property
    def _is_resident(self) -> bool:
        return self.tables is not None and self.tables.device == self.device

    @property
    def _copies_pinned(self) -> bool:
        """True if states are copied from pinned memory, while the device computes."""
        return self.device.type == "cuda" and not self._is_resident

    def is_prepared(self, batch: Batch) -> bool:
        """Return whether `prepare` has found the states of this batch."""
        return any(self._name(name, stack) in batch for name in ("positions", "numbers") for stack in self._stacks)

    def _find_texts(self, batch: Batch) -> Array | None:
        """Return the ids of a batch's texts, on a device those that `prepare` has found, or None if one is unknown."""
        return self.texts.find(batch) if _is_on_host(batch) else cast("Array | None", batch.get(self._name("text_ids")))

    def _find_states(self, batch: Batch, text_ids: Array | None) -> dict[str, Tensor]:
        """Return the positions of a batch's states, or the states, as entries of a batch; {} if one is not cached."""
        if text_ids is None:
            return {}
        longest = batch["input_ids"].shape[1]
        if self.tables is None:
            states = self._read_records(*self._describe(text_ids), longest) or {}
        elif not self.tables.are_filled(text_ids):
            return {}
        else:
            positions = self.tables.positions(text_ids, longest)
            if self._is_resident:
                return {self._name("positions", stack): to_device(p, self.device) for stack, p in positions.items()}
            states = self.tables.read(positions, self._copies_pinned)
        return {
            self._name(name, stack): _pack(tensor)
            for stack, encoded in states.items()
            for name, tensor in encoded._asdict().items()
            if tensor is not None
        }

    def _name(self, entry: str, stack: int = 0) -> str:
        return f"{self._prefix}_{entry}_{stack}"

    def _read_prepared(self, batch: Batch, inputs: Mapping[str, Tensor]) -> Stacks | None:
        """Return the states of a prepared batch.

        Return None if it is not prepared, or was padded to another length since. On the host, also if its tokens were
        changed since. On a device that check would wait.
        """
        if self.is_prepared(batch) and _is_on_host(batch) and self._find_texts(batch) is None:
            return None
        positions, states = {}, {}
        for stack, ids in enumerate(_input_ids(inputs)):
            shape = (len(ids), len(self.wanted[stack]), ids.shape[1])
            if (found := batch.get(self._name("positions", stack))) is not None and found.shape == ids.shape:
                positions[stack] = found
            elif (found := batch.get(self._name("numbers", stack))) is not None and found.shape[:3] == shape:
                scales = batch.get(self._name("scales", stack))
                numbers = _unpack(found, self.cached_dtype)
                states[stack] = Encoded(numbers, None if scales is None else _unpack(scales, torch.float32))
            elif self.wanted[stack]:
                return None
        if positions and self.tables is not None:
            with record_function("cache"):
                return self.tables.read(positions)
        return states

    # -- all batches --------------------------------------------------------------------------------------------------

    def _find_or_compute(self, batch: Batch, inputs: Mapping[str, Tensor]) -> Stacks:
        """Return the states of a batch, which are computed and cached where they are not."""
        text_ids = self._find_texts(batch)
        if text_ids is not None:
            keys, counts = self._describe(text_ids)
        else:
            counts = self._count_tokens(inputs)
            keys = digest_texts(inputs, counts[0])
            text_ids = self.texts.find_keys(keys)
        longest = inputs["input_ids"].shape[1]
        if self.tables is None or text_ids is None:
            states = self._read_or_add_records(batch, keys, counts, longest)
        else:
            if not self.tables.are_filled(text_ids):
                if self.store.in_memory:  # the tables are the store
                    states = self._compute(batch)
                else:
                    states = self._read_or_add_records(batch, keys, counts, longest)
                self.tables.fill(text_ids, states)
            states = self.tables.read(self.tables.positions(text_ids, longest), self._copies_pinned)
        return {stack: encoded.to(inputs["input_ids"].device) for stack, encoded in states.items()}

    def _describe(self, text_ids: Array) -> tuple[list[bytes], list[Array]]:
        """Return the keys of planned texts, and for each stack their numbers of tokens."""
        return [self.texts.keys[text_id] for text_id in text_ids], [counts[text_ids] for counts in self.texts.counts]

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

    def _read_or_add_records(
        self, batch: Batch, keys: Sequence[bytes], counts: Sequence[Array], longest: int
    ) -> Stacks:
        """Return the states of a batch from records. New ones are read back, for the same rounding each time."""
        states = self._read_records(keys, counts, longest)
        if states is None:
            computed = {stack: encoded.map(Tensor.cpu) for stack, encoded in self._compute(batch).items()}
            with record_function("cache"):
                self._add_records({key: to_record(computed, keys.index(key), counts) for key in dict.fromkeys(keys)})
            states = self._read_records(keys, counts, longest)
        if states is None:
            raise UserError(
                f"model.activation_cache: records in {self.store} are damaged right after they were written. Use"
                " another folder, or --model.activation_cache=null."
            )
        return states

    def _read_records(self, keys: Sequence[bytes], counts: Sequence[Array], longest: int) -> Stacks | None:
        """Return the states of a batch from the records of its texts, padded, or None if one has none."""
        with record_function("cache"):
            records = self.store.find(keys)
            known = [record for record in records if record is not None]
            if len(known) < len(records):
                return None
            reader = RecordReader(known, self.cached_dtype, self._copies_pinned)
            return {
                stack: reader.read(len(wanted), counts[stack], int(counts[stack].max()) if stack else longest, width)
                for stack, (wanted, width) in enumerate(zip(self.wanted, self._widths, strict=True))
                if wanted
            }

    def _add_records(self, records: Mapping[bytes, Record]) -> None:
        try:
            self.store.add(records)
        except OSError as error:
            raise UserError(
                f"model.activation_cache: {self.store} cannot be written ({error}). Use another folder, or"
                " --model.activation_cache=null."
            ) from error

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

    def plan(self, *data_sets: Iterable[Batch], num_processes: int = 1, device_bytes: int = 0) -> Plan:
        """Number the texts to cache, check that there is space for them, and reserve it.

        States that were cached in memory before are forgotten.

        Args:
            data_sets: All texts that will be cached, in batches in the memory of the host. Within a data set, an
                `index` stands for one text.
            num_processes: Number of training processes on this machine. Each has a separate cache if it is in memory.
            device_bytes: Memory of the device that the cached states may take. If they need more, they stay in files,
                or in the memory of the host.

        Raises:
            UserError: If the store, the memory of the host or the device has less space.
        """
        self.texts = CachedTexts(map(self._with_keys, data_sets))
        self.tables = None
        self._prefix = _new_prefix()
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
        device = self.device if is_resident else torch.device("cpu")
        has_tables = is_resident or self.store.in_memory
        if not self.store.in_memory:
            self._check_space(self.store, plan.num_new, plan.num_bytes)
        if has_tables and device.type == "cpu":
            self._check_space(MemoryStore(), plan.num_texts, plan.num_bytes_of_all * num_processes)
        if has_tables:
            try:
                self.tables = StateTables(self.texts, self.wanted, self._widths, self.cached_dtype, device)
            except torch.OutOfMemoryError as error:  # of an accelerator
                raise UserError(
                    f"model.cache_device_mib: {device} has no room for all {plan.num_bytes_of_all / _MIB:,.0f} MiB of"
                    " cached states. Give it less than that, such as 0: then they are copied from the host."
                ) from error
        return plan

    def describe_source(self) -> str:
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

    def _check_space(self, store: Store, num_texts: int, needed: int) -> None:
        """Raise a UserError if a store has less space than these bytes."""
        if needed <= (free := store.free_bytes()):
            return
        size = self.cached_dtype.itemsize
        smaller = [
            f"--model.cache_precision={name} ({needed * dtype.itemsize / size / _MIB:,.0f} MiB)"
            for name, dtype in _DTYPES.items()
            if dtype.itemsize < size
        ]
        # tables in memory are an option of a cache in files
        elsewhere = "another folder" if type(store) is type(self.store) else "--model.cache_device_mib=0"
        raise UserError(
            f"model.activation_cache: the hidden states of {num_texts:,} texts take {needed / _MIB:,.0f} MiB, and"
            f" {store} has room for {free / _MIB:,.0f} MiB. Use"
            f" {', '.join([*smaller, elsewhere, 'fewer texts (--data.limit_train)'])} or"
            " --model.activation_cache=null."
        )


def _new_prefix() -> str:
    """Return a prefix of names in batches. No other cache, and no other plan, may read what was prepared for one."""
    return f"cached_{uuid4().hex[:8]}"


def _pack(tensor: Tensor) -> Tensor:
    """Return a tensor [states, batch, …] as an entry of a batch: [batch, …], of integers, which no Trainer converts."""
    return tensor.view({1: torch.int8, 2: torch.int16, 4: torch.int32}[tensor.itemsize]).transpose(0, 1)


def _unpack(entry: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the tensor [states, batch, …] of a packed entry."""
    return entry.transpose(0, 1).view(dtype)


def _is_on_host(batch: Batch) -> bool:
    return batch["input_ids"].device.type == "cpu"


def _input_ids(inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Return the token ids of each stack."""
    return [ids for name, ids in inputs.items() if name.endswith("input_ids")]
