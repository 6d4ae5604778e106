"""A cache of a frozen backbone's hidden states: its blocks run once for each text.

The hidden states of a text depend on its tokens and on the backbone alone. A digest of both is their key, so no cached
record can be out of date. Runs of any task, seed or batch size share the cache, as do methods that read the same
states.

The record of a text holds for each stack the wanted states [states, tokens, width], then the scales of int8.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b, sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.profiler import record_function

from lit_spu.backbones.activation_store import FileStore, MemoryStore, Record, Store
from lit_spu.backbones.backbone import Backbone
from lit_spu.backbones.precision import Precision, is_quantized
from lit_spu.backbones.stacks import Batch, HiddenStates, StateIndices
from lit_spu.errors import UserError

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
_NUMPY_DTYPES = {torch.float32: np.float32, torch.bfloat16: np.int16, torch.int8: np.int8}  # numpy has no bfloat16
_SCALE_BYTES = 4
_MIB = 2**20


@dataclass(frozen=True)
class Plan:
    """The number of texts to cache, how many of them are new, and the bytes of the new ones."""

    num_texts: int
    num_new: int
    num_bytes: int


class ActivationCache:
    """A callable that returns what `Backbone.hidden_states` does, but computes no text twice.

    A record that is damaged is computed again.

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
        self.dtype = next(backbone.base_model.embeddings[0].parameters()).dtype
        name = f"{_digest_backbone(backbone, self.wanted)}-{precision}"
        self.store: Store = MemoryStore() if folder is None else FileStore(folder / name)

    def __call__(self, batch: Batch) -> tuple[HiddenStates, ...]:
        """Return the hidden states of all stacks, zero where a text is padded."""
        inputs = self.backbone.model_inputs(batch)
        counts = self._count_tokens(inputs)
        keys = _digest_texts(inputs, counts[0])
        records = self.store.find(keys)
        if any(record is None for record in records):  # new states are read back, for the same rounding each time
            states = self.backbone.hidden_states(batch, self.wanted)
            new_rows = {key: row for row, (key, record) in enumerate(zip(keys, records, strict=True)) if record is None}
            with record_function("cache"):
                self._save(states, counts, new_rows)
                records = self.store.find(keys)
            if any(record is None for record in records):
                raise UserError(
                    f"model.activation_cache: records in {self.store} are damaged right after they were written. Use"
                    " another folder, or --model.activation_cache=null."
                )
        with record_function("cache"):
            return self._read([record for record in records if record is not None], counts, inputs)

    def plan(self, batches: Iterable[Batch], num_processes: int = 1) -> Plan:
        """Count the texts and bytes to cache, and check that there is space for them.

        Args:
            batches: All texts that will be cached.
            num_processes: Number of training processes on this machine. Each has a separate cache if it is in memory.

        Raises:
            UserError: If the store has less space.
        """
        sizes: dict[bytes, int] = {}
        new: set[bytes] = set()
        for batch in batches:
            inputs = self.backbone.model_inputs(batch)
            counts = self._count_tokens(inputs)
            keys = _digest_texts(inputs, counts[0])
            for row, (key, is_cached) in enumerate(zip(keys, self.store.contains(keys), strict=True)):
                sizes[key] = sum(self._num_bytes(stack, int(count[row])) for stack, count in enumerate(counts))
                if not is_cached:
                    new.add(key)
        plan = Plan(len(sizes), len(new), sum(sizes[key] for key in new))
        needed = plan.num_bytes * (num_processes if isinstance(self.store, MemoryStore) else 1)
        if needed > (free := self.store.free_bytes()):
            raise self._space_error(plan, needed, free)
        return plan

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

    def _num_bytes(self, stack: int, num_tokens: int) -> int:
        scale = _SCALE_BYTES if self.cached_dtype is torch.int8 else 0
        state = self.backbone.stacks[stack].width * self.cached_dtype.itemsize + scale
        return len(self.wanted[stack]) * num_tokens * state

    def _count_tokens(self, inputs: Mapping[str, Tensor]) -> list[Tensor]:
        """Return for each stack the number of tokens of each text, [batch]."""
        ids = [tensor for name, tensor in inputs.items() if name.endswith("input_ids")]
        counts = [stack_ids.new_full((len(stack_ids),), stack_ids.shape[1]).cpu() for stack_ids in ids]
        if (mask := inputs.get("attention_mask")) is not None:
            if bool((mask[:, 1:] > mask[:, :-1]).any()):
                raise UserError(
                    "model.activation_cache needs texts that are padded on the right. Set it to null for this data set."
                )
            counts[0] = mask.sum(1).cpu()
        return counts

    def _save(self, states: Sequence[HiddenStates], counts: Sequence[Tensor], rows: Mapping[bytes, int]) -> None:
        """Save the states of some rows of a batch by their keys, without padding."""
        parts: dict[bytes, list[Record]] = {key: [] for key in rows}
        for stack_states, stack_counts, wanted in zip(states, counts, self.wanted, strict=True):
            if not wanted:
                continue
            every = (stack_states.embeddings, *stack_states.blocks)
            numbers = torch.stack([every[number] for number in wanted])
            scales = None
            if self.cached_dtype is torch.int8:
                scales = numbers.float().abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
                numbers = (numbers / scales).round()
                scales = scales.cpu()
            numbers = numbers.to(self.cached_dtype).cpu()
            for key, row in rows.items():
                parts[key].append(_to_bytes(numbers[:, row, : stack_counts[row]]))
                if scales is not None:
                    parts[key].append(_to_bytes(scales[:, row, : stack_counts[row]]))
        try:
            self.store.add({key: np.concatenate(part) for key, part in parts.items()})
        except OSError as error:
            raise UserError(
                f"model.activation_cache: {self.store} cannot be written ({error}). Use another folder, or"
                " --model.activation_cache=null."
            ) from error

    def _read(
        self, records: Sequence[Record], counts: Sequence[Tensor], inputs: Mapping[str, Tensor]
    ) -> tuple[HiddenStates, ...]:
        """Return the hidden states of a batch from the records of its rows."""
        rest = list(records)
        lengths = [ids.shape[1] for name, ids in inputs.items() if name.endswith("input_ids")]

        def take(row: int, dtype: Any, *shape: int) -> Any:
            """Remove and return the next numbers of a row's record."""
            end = math.prod(shape) * np.dtype(dtype).itemsize
            part, rest[row] = rest[row][:end], rest[row][end:]
            return part.view(dtype).reshape(shape)

        states = []
        for number, (stack, stack_counts, wanted) in enumerate(
            zip(self.backbone.stacks, counts, self.wanted, strict=True)
        ):
            mask = None if number else inputs.get("attention_mask")
            if not wanted:
                states.append(HiddenStates.select({}, stack.depth, mask))
                continue
            blocks, width, longest = len(wanted), stack.width, lengths[number]
            numbers = torch.empty(blocks, len(records), longest, width, dtype=self.cached_dtype)
            raw = (numbers.view(torch.int16) if self.cached_dtype is torch.bfloat16 else numbers).numpy()
            scales = torch.zeros(blocks, len(records), longest, 1) if self.cached_dtype is torch.int8 else None
            for row, count in enumerate(stack_counts.tolist()):
                raw[:, row, :count] = take(row, _NUMPY_DTYPES[self.cached_dtype], blocks, count, width)
                raw[:, row, count:] = 0
                if scales is not None:
                    scales.numpy()[:, row, :count] = take(row, np.float32, blocks, count, 1)
            unscaled = numbers if scales is None else map(torch.mul, numbers, scales)  # one block at a time
            found = (state.to(inputs["input_ids"].device, self.dtype) for state in unscaled)
            states.append(HiddenStates.select(dict(zip(wanted, found, strict=True)), stack.depth, mask))
        return tuple(states)


def _to_bytes(tensor: Tensor) -> Record:
    record: Record = tensor.contiguous().view(torch.uint8).numpy().reshape(-1)
    return record


def _digest_texts(inputs: Mapping[str, Tensor], counts: Tensor) -> list[bytes]:
    """Return a digest of the backbone's inputs for each text, without padding."""
    padded = inputs["input_ids"].shape
    arrays = [(t.cpu().numpy(), t.shape == padded) for name, t in inputs.items() if not name.endswith("mask")]
    return [
        blake2b(b"".join((t[row, :count] if cut else t[row]).tobytes() for t, cut in arrays), digest_size=16).digest()
        for row, count in enumerate(counts.tolist())
    ]


def _digest_backbone(backbone: Backbone, wanted: StateIndices) -> str:
    """Return a digest of all that determines the wanted hidden states: weights of the blocks, settings and code."""
    model, digest = backbone.base_model.model, sha256()
    config = {
        name: value
        for name, value in model.config.to_diff_dict().items()
        if name not in ("id2label", "label2id") and not name.startswith("_")  # labels and paths change no state
    }
    device = next(model.parameters()).device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    packages = [f"{package} {version(package)}" for package in ("torch", "transformers")]
    code = [path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py"))]
    digest.update(repr((code, config, device, autocast, packages, wanted)).encode())
    above = nn.ModuleList([*backbone.head_modules, *backbone.base_model.blocks_above(wanted)])
    unread = set(above.parameters())  # a BERT's pooler reads the hidden states and does not change them
    for name, parameter in model.named_parameters():
        if parameter not in unread:
            plain = parameter.dequantize() if is_quantized(parameter) else parameter
            digest.update(f"{name} {plain.dtype} {tuple(plain.shape)}".encode())
            digest.update(plain.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:32]
