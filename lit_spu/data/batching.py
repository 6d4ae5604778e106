"""Batches of texts of like length, the same whatever the number of devices, that an interrupted run finds again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from lit_spu.data.text import Tokens
from lit_spu.errors import UserError

Batch = dict[str, Tensor]
Indices = np.ndarray[Any, np.dtype[np.int64]]

_BUCKET = 50  # global batches among which lengths are sorted: 5 % of padding is left, and most of the shuffle


class Examples(Dataset[Batch]):
    """Tokenised examples of which any list of indices makes a batch.

    Args:
        tokens: The texts.
        labels: Their labels' numbers or scores.
        pad_id: Token that fills up shorter texts, on the right; the attention mask is 0 there.
    """

    def __init__(self, tokens: Tokens, labels: Sequence[int] | Sequence[float], pad_id: int) -> None:
        self.tokens = tokens
        self.labels = torch.tensor(labels)  # long of labels, float32 of scores
        self.pad_id = pad_id

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, indices: Sequence[int]) -> Batch:
        """The batch: `input_ids`, `attention_mask` (and `token_type_ids`) long [batch, longest], `labels`, `index`."""
        index = np.asarray(indices, np.int64)
        starts, ends = self.tokens.starts[index], self.tokens.starts[index + 1]
        steps = np.arange((ends - starts).max())
        real = steps < (ends - starts)[:, None]
        places = np.where(real, starts[:, None] + steps, 0)
        batch = {
            "input_ids": torch.from_numpy(np.where(real, self.tokens.ids[places], self.pad_id).astype(np.int64)),
            "attention_mask": torch.from_numpy(real.astype(np.int64)),
            "labels": self.labels[index],
            "index": torch.from_numpy(index),
        }
        if self.tokens.types is not None:
            batch["token_type_ids"] = torch.from_numpy(np.where(real, self.tokens.types[places], 0).astype(np.int64))
        return batch


class BucketSampler(DistributedSampler[list[int]]):
    """Batches of examples of like length.

    Shuffled, the examples are drawn anew each epoch, sorted by length within buckets of 50 global batches, and cut into
    global batches of `batch_size` for each device, whose order is drawn too; each device takes its stride of every
    global batch. So two devices with 16 each train on the very batches of one device with 32. The last, short batch
    loses what does not divide by the number of devices.

    Not shuffled, the longest come first (memory runs out at once or never), every example comes once over all devices,
    and all devices have equally many batches, for they meet at each of them.

    It is a DistributedSampler so that Lightning tells it the epoch and puts no other in its place.

    Args:
        lengths: Tokens of each example.
        batch_size: Examples of a batch on one device.
        shuffle: Whether to train on them.
        same_batches: Draw the batches in the first epoch alone, and only their order in each.
        num_replicas: Number of devices.
        rank: This device's number.
        seed: With the epoch, decides the shuffle.

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
        self.position = 0  # batches of this epoch that were given out; the next pass goes on behind them

    def __len__(self) -> int:
        """Batches of an epoch, on each device."""
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
        """Shuffle for `epoch`, whose batches begin anew if it is another one."""
        if epoch != self.epoch:
            self.position = 0
        super().set_epoch(epoch)

    def _training_batches(self) -> list[Indices]:
        size = self.batch_size * self.num_replicas
        rng = np.random.default_rng((self.seed, self.epoch))
        drawn = np.random.default_rng((self.seed, 0)) if self.same_batches else rng
        shuffled = drawn.permutation(len(self.lengths))
        buckets = np.split(shuffled, range(_BUCKET * size, len(shuffled), _BUCKET * size))
        order = np.concatenate([bucket[np.argsort(self.lengths[bucket], kind="stable")] for bucket in buckets])
        order = order[: len(order) // self.num_replicas * self.num_replicas]
        batches = np.split(order, range(size, len(order), size))
        return [batches[i][self.rank :: self.num_replicas] for i in rng.permutation(len(batches))]

    def _evaluation_batches(self) -> list[Indices]:
        order = np.argsort(-self.lengths, kind="stable")
        return np.array_split(order, len(self) * self.num_replicas)[self.rank :: self.num_replicas]


class Loader(DataLoader[Batch]):
    """A DataLoader whose state is its place in the epoch: Lightning keeps it in checkpoints, and goes on from there.

    The state holds with any number of workers, for it counts the batches given out, not those read ahead; or, where
    `taken` tells, those that were trained on, of which there may be one less at an interruption.
    """

    sampler: BucketSampler
    taken: Callable[[], int] | None = None
    _resumed = False
    _batches = 0

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # a plain iterator will do
        if not self._resumed:
            self.sampler.position = 0
        self._resumed = False
        return self._count()

    def _count(self) -> Iterator[Batch]:
        # Begins with the first batch asked for, and so after Lightning has told the epoch.
        if self.sampler.position and self._batches != len(self.sampler):
            raise UserError(
                f"The checkpoint was written amid an epoch of {self._batches} batches, but now it has"
                f" {len(self.sampler)}: resume with the same data, data.batch_size and number of devices."
            )
        for batch in super().__iter__():
            self.sampler.position += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """The epoch, the seed of its shuffle, and the batches that are behind of all."""
        sampler = self.sampler
        behind = self.taken() if self.taken else sampler.position
        return {"seed": sampler.seed, "epoch": sampler.epoch, "position": behind, "batches": len(sampler)}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state` was taken; a UserError follows if the epoch is then found to have other batches."""
        self.sampler.seed, self.sampler.epoch, self.sampler.position = state["seed"], state["epoch"], state["position"]
        self._batches = state["batches"]
        self._resumed = True
