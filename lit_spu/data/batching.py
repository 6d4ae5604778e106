"""Batches of texts of similar length, reproducible on any number of devices and after an interruption."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from hashlib import sha256
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lit_spu.data.text import Tokens
from lit_spu.errors import UserError

Batch = dict[str, Tensor]
"""Input tensors by name; the first dimension of each is the batch."""

Indices = np.ndarray[Any, np.dtype[np.int64]]

_BUCKET = 50  # global batches that are sorted by length together: leaves 5 % of padding and most of the shuffle


class Examples(Dataset[Batch]):
    """Dataset of tokenised examples that returns a padded batch for a list of indices.

    Args:
        tokens: Tokens of the examples.
        labels: Label positions, or scores.
        pad_id: Token id that fills up shorter texts on the right, where the attention mask is 0.
        length_multiple: Pad batches to a multiple of this length, or to the longest of all texts.
    """

    def __init__(
        self, tokens: Tokens, labels: Sequence[int] | Sequence[float], pad_id: int, length_multiple: int = 1
    ) -> None:
        self.length_multiple, self.longest = length_multiple, int(tokens.lengths.max(initial=0))
        self.tokens = tokens
        self.labels = torch.tensor(labels)  # int64 for labels, float32 for scores
        self.pad_id = pad_id

    @cached_property
    def digest(self) -> str:
        """Hash of the tokens and labels of all examples in their order, 16 hexadecimal digits."""
        tokens, found = self.tokens, sha256()
        for array in (tokens.ids, tokens.starts, tokens.types, self.labels.numpy()):
            found.update(b"none" if array is None else np.ascontiguousarray(array).data)
        return found.hexdigest()[:16]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, indices: Sequence[int]) -> Batch:
        """Return a batch of examples.

        It holds `input_ids`, `attention_mask` and, with some tokenizers, `token_type_ids`, int64 [batch, longest], and
        `labels` and `index` [batch].
        """
        index = np.asarray(indices, np.int64)
        starts, ends = self.tokens.starts[index], self.tokens.starts[index + 1]
        multiples = -(-(ends - starts).max() // self.length_multiple)
        positions = np.arange(min(multiples * self.length_multiple, self.longest))
        real = positions < (ends - starts)[:, None]
        offsets = np.where(real, starts[:, None] + positions, 0)
        batch = {
            "input_ids": torch.from_numpy(np.where(real, self.tokens.ids[offsets], self.pad_id).astype(np.int64)),
            "attention_mask": torch.from_numpy(real.astype(np.int64)),
            "labels": torch.from_numpy(self.labels.numpy()[index]),  # torch would take as long as all of the rest
            "index": torch.from_numpy(index),
        }
        if self.tokens.types is not None:
            batch["token_type_ids"] = torch.from_numpy(np.where(real, self.tokens.types[offsets], 0).astype(np.int64))
        return batch


class BucketSampler(DistributedSampler[list[int]]):
    """Sampler of batches of examples of similar length.

    For training (`shuffle`), each epoch shuffles the examples, sorts them by length within buckets of 50 global
    batches, and cuts them into global batches in random order. A global batch has `batch_size` examples for each
    device, and each device takes its share of it. Two devices with 16 examples each therefore train on the same
    global batches as one device with 32. If the size of the last batch is not a multiple of the number of devices,
    its remaining examples are dropped.

    For evaluation, the longest examples come first, so that a lack of memory shows at once. Each example is on one
    device. All devices have the same number of batches, because they synchronise at each one.

    The class is a DistributedSampler so that Lightning sets its epoch and does not replace it.

    Args:
        lengths: Number of tokens of each example.
        batch_size: Examples of a batch on one device.
        shuffle: Make batches for training.
        same_batches: Use the batches of the first epoch in every epoch, in a new order.
        num_replicas: Number of devices.
        rank: Index of this device.
        seed: Random seed; it decides the shuffle together with the epoch.

    Raises:
        UserError: if there are fewer examples than devices.
    """

    def __init__(
        self,
        lengths: Indices,
        batch_size: int,
        *,
        shuffle: bool,
        same_batches: bool = False,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(cast(Any, lengths), num_replicas, rank, shuffle, seed)
        if len(lengths) < num_replicas:
            raise UserError(
                f"{len(lengths)} examples cannot be shared by {num_replicas} devices:"
                f" set --trainer.devices={len(lengths)} or fewer, or use more data."
            )
        self.lengths = lengths
        self.batch_size = batch_size
        self.same_batches = same_batches
        self.position = 0  # batches of this epoch that were already delivered; the next iteration skips them

    def __len__(self) -> int:
        """Return the number of batches of an epoch on each device."""
        count, size, devices = len(self.lengths), self.batch_size, self.num_replicas
        if self.shuffle:
            full, rest = divmod(count, size * devices)
            return full + (rest >= devices)
        batches = -(-count // size)
        return min(-(-batches // devices), count // devices)

    def __iter__(self) -> Iterator[list[int]]:
        batches = self._training_batches() if self.shuffle else self._evaluation_batches()
        return iter([batch.tolist() for batch in batches[self.position :]])

    def set_epoch(self, epoch: int) -> None:
        """Shuffle for `epoch`; if it is a new epoch, begin with its first batch."""
        if epoch != self.epoch:
            self.position = 0
        super().set_epoch(epoch)

    def _training_batches(self) -> list[Indices]:
        size = self.batch_size * self.num_replicas
        rng = np.random.default_rng((self.seed, self.epoch))
        example_rng = np.random.default_rng((self.seed, 0)) if self.same_batches else rng
        shuffled = example_rng.permutation(len(self.lengths))
        buckets = np.split(shuffled, range(_BUCKET * size, len(shuffled), _BUCKET * size))
        order = np.concatenate([bucket[np.argsort(self.lengths[bucket], kind="stable")] for bucket in buckets])
        order = order[: len(order) // self.num_replicas * self.num_replicas]
        batches = np.split(order, range(size, len(order), size))
        return [batches[i][self.rank :: self.num_replicas] for i in rng.permutation(len(batches))]

    def _evaluation_batches(self) -> list[Indices]:
        order = np.argsort(-self.lengths, kind="stable")
        return np.array_split(order, len(self) * self.num_replicas)[self.rank :: self.num_replicas]


class Loader(DataLoader[Batch]):
    """DataLoader with a state: its position in the epoch, so that training resumes at the next batch.

    The state counts delivered batches, not those that workers have read ahead, so it is valid for any number of
    workers. `num_trained` may be set to a function that returns the number of batches that were trained on, which is
    one less if training was interrupted within a step. `transform` may be set to a function that all batches pass.
    """

    sampler: BucketSampler
    num_trained: Callable[[], int] | None = None
    transform: Callable[[Iterator[Batch]], Iterator[Batch]] | None = None
    _resumed = False
    _num_batches = 0

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # a plain iterator is enough
        if not self._resumed:
            self.sampler.position = 0
        self._resumed = False
        return self._count_batches()

    def _count_batches(self) -> Iterator[Batch]:
        # A generator's body runs only once the first batch is requested. By then Lightning has set the epoch.
        if self.sampler.position and self._num_batches != len(self.sampler):
            raise UserError(
                f"The checkpoint was written during an epoch of {self._num_batches} batches, but now an epoch has"
                f" {len(self.sampler)}: resume with the same data, data.batch_size and number of devices."
            )
        batches = super().__iter__()
        for batch in self.transform(batches) if self.transform else batches:
            self.sampler.position += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return the epoch, the seed of its shuffle, the position in it and the number of its batches."""
        sampler = self.sampler
        position = self.num_trained() if self.num_trained else sampler.position
        return {"seed": sampler.seed, "epoch": sampler.epoch, "position": position, "batches": len(sampler)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resume at the position in `state`.

        If the epoch has another number of batches than then, the next iteration raises a UserError.
        """
        self.sampler.seed, self.sampler.epoch, self.sampler.position = state["seed"], state["epoch"], state["position"]
        self._num_batches = state["batches"]
        self._resumed = True
