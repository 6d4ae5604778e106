from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from lit_spu.data.batching import Batch, BucketSampler, Examples, Loader
from lit_spu.data.sources import load_split
from lit_spu.data.text import Tokens, encode
from lit_spu.errors import UserError
from lit_spu.tasks import TASKS, Encoding

LENGTHS = st.lists(st.integers(1, 60), min_size=1, max_size=400).map(np.array)


def sampler(
    lengths: np.ndarray,
    batch_size: int,
    devices: int = 1,
    rank: int = 0,
    epoch: int = 0,
    seed: int = 0,
    shuffle: bool = True,
) -> BucketSampler:
    made = BucketSampler(lengths, batch_size, shuffle=shuffle, num_replicas=devices, rank=rank, seed=seed)
    made.set_epoch(epoch)
    return made


def examples(lengths: list[int], types: bool = False) -> Examples:
    """Examples whose token ids encode the row and the position in it."""
    ids = [1000 * (row + 1) + place for row, length in enumerate(lengths) for place in range(length)]
    tokens = Tokens(
        np.array(ids, np.int32),
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        np.ones(len(ids), np.uint8) if types else None,
    )
    return Examples(tokens, list(range(len(lengths))), pad_id=7)


# --- Batches ---------------------------------------------------------------------------------------------------------


def test_a_batch_is_padded_on_the_right() -> None:
    batch = examples([1, 3, 2], types=True)[[2, 0]]
    assert {name: tensor.tolist() for name, tensor in batch.items()} == {
        "input_ids": [[3000, 3001], [1000, 7]],
        "attention_mask": [[1, 1], [1, 0]],
        "token_type_ids": [[1, 1], [1, 0]],
        "labels": [2, 0],
        "index": [2, 0],
    }
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}
    assert "token_type_ids" not in examples([1])[[0]]


def test_scores_are_float32() -> None:
    tokens = examples([1, 1]).tokens
    labels = Examples(tokens, [2.5, -1.0], 0)[[1, 0]]["labels"]
    assert labels.dtype == torch.float32
    assert labels.tolist() == [-1.0, 2.5]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=20), st.data())
def test_every_row_has_its_own_tokens(lengths: list[int], data: st.DataObject) -> None:
    rows = data.draw(st.lists(st.integers(0, len(lengths) - 1), min_size=1, max_size=8))
    batch = examples(lengths)[rows]
    for i, row in enumerate(rows):
        real = batch["input_ids"][i][batch["attention_mask"][i].bool()]
        assert real.tolist() == [1000 * (row + 1) + place for place in range(lengths[row])]
    assert batch["input_ids"].shape[1] == max(lengths[row] for row in rows)


# --- Training --------------------------------------------------------------------------------------------------------


@given(LENGTHS, st.integers(1, 8), st.integers(1, 4), st.integers(0, 3), st.integers(0, 3))
def test_training_sees_every_example_once_an_epoch(
    lengths: np.ndarray,
    batch_size: int,
    devices: int,
    epoch: int,
    seed: int,
) -> None:
    assume(len(lengths) >= devices)
    ranks = [sampler(lengths, batch_size, devices, rank, epoch, seed) for rank in range(devices)]
    drawn = [list(rank) for rank in ranks]
    seen = list(chain.from_iterable(chain.from_iterable(drawn)))
    assert len(seen) == len(set(seen)) == len(lengths) // devices * devices
    assert [len(batches) for batches in drawn] == [len(rank) for rank in ranks]
    for step in zip(
        *drawn, strict=True
    ):  # equal batches on all devices, so that their mean is that of the global batch
        assert len({len(batch) for batch in step}) == 1
        assert 1 <= len(step[0]) <= batch_size
    sizes = sorted(len(batch) for batch in drawn[0])
    assert all(size == batch_size for size in sizes[1:])  # one is short at most
    assert drawn == [list(sampler(lengths, batch_size, devices, rank, epoch, seed)) for rank in range(devices)]


@given(LENGTHS, st.integers(1, 8), st.integers(2, 4), st.integers(0, 3))
def test_several_devices_share_the_batches_of_one(
    lengths: np.ndarray,
    batch_size: int,
    devices: int,
    epoch: int,
) -> None:
    lengths = np.resize(lengths, max(1, len(lengths) // devices) * devices)  # nothing is dropped
    one = list(sampler(lengths, batch_size * devices, epoch=epoch))
    ranks = [list(sampler(lengths, batch_size, devices, rank, epoch)) for rank in range(devices)]
    for whole, *shares in zip(one, *ranks, strict=True):
        assert [whole[rank::devices] for rank in range(devices)] == shares


def test_epochs_and_seeds_have_different_batches() -> None:
    lengths = np.arange(500) % 40 + 1
    orders = [list(sampler(lengths, 8, epoch=epoch, seed=seed)) for epoch in range(3) for seed in range(3)]
    assert len({str(order) for order in orders}) == 9
    neighbours = [{frozenset(batch) for batch in order} for order in orders[:2]]
    assert not neighbours[0] & neighbours[1]  # other batches, not the same in another order


def test_the_order_of_batches_does_not_depend_on_their_lengths() -> None:
    lengths = np.arange(6400) % 64 + 1
    means = [lengths[batch].mean() for batch in sampler(lengths, 32)]
    assert abs(np.corrcoef(np.arange(len(means)), means)[0, 1]) < 0.2


def test_padding_is_at_most_a_tenth_on_real_sentences(shared: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(shared / "models" / "all-MiniLM-L6-v2")
    rows = load_split(TASKS["sst2"], str(shared / "glue"), "train")[""]
    lengths = encode(rows, TASKS["sst2"], Encoding(tokenizer, "pair", "[MASK]"), None, 128).lengths
    for devices in (1, 2):
        batches = list(sampler(lengths, 32, devices))
        padded = sum(len(batch) * lengths[batch].max() for batch in batches)
        assert padded / sum(lengths[batch].sum() for batch in batches) <= 1.10


# --- Evaluation ------------------------------------------------------------------------------------------------------


@given(LENGTHS, st.integers(1, 8), st.integers(1, 5))
def test_evaluation_has_every_example_once_and_equally_many_batches_on_each_device(
    lengths: np.ndarray, batch_size: int, devices: int
) -> None:
    assume(len(lengths) >= devices)
    ranks = [sampler(lengths, batch_size, devices, rank, shuffle=False) for rank in range(devices)]
    drawn = [list(rank) for rank in ranks]
    seen = chain.from_iterable(chain.from_iterable(drawn))
    assert sorted(seen) == list(range(len(lengths)))
    assert {len(batches) for batches in drawn} == {len(ranks[0])}
    assert all(batch for batches in drawn for batch in batches)
    # With too few examples for more batches, the batches are larger.
    assert all(len(batch) <= batch_size for batches in drawn for batch in batches) or batch_size == 1
    longest = [lengths[batch].max() for step in zip(*drawn, strict=True) for batch in step]
    assert longest == sorted(longest, reverse=True)


@pytest.mark.parametrize("shuffle", [True, False])
def test_too_few_examples_for_the_devices_are_refused(shuffle: bool) -> None:
    with pytest.raises(UserError, match=r"2 examples cannot be shared by 3 devices: set --trainer\.devices=2"):
        sampler(np.array([1, 2]), 4, devices=3, shuffle=shuffle)


# --- Resuming --------------------------------------------------------------------------------------------------------


def loader(count: int = 90, num_workers: int = 0, batch_size: int = 8) -> Loader:
    lengths = (np.arange(count) % 13 + 1).tolist()
    return Loader(
        examples(lengths),
        batch_size=None,
        sampler=sampler(np.array(lengths), batch_size),
        num_workers=num_workers,
        generator=torch.Generator(),
    )


def rows(batches: list[Batch]) -> list[list[int]]:
    return [batch["index"].tolist() for batch in batches]


@pytest.mark.parametrize(("before", "after"), [(0, 0), (2, 2), (2, 0)])  # the number of workers may change
def test_a_loader_resumes_with_the_next_batch(before: int, after: int) -> None:
    whole = loader()
    whole.sampler.set_epoch(3)
    expected = rows(list(whole))
    stops = range(1, len(expected)) if before == 0 else (5,)  # workers are slow to start
    for stop in stops:
        first = loader(num_workers=before)
        first.sampler.set_epoch(3)
        passing = iter(first)
        begun = [next(passing) for _ in range(stop)]
        second = loader(num_workers=after)
        second.load_state_dict(first.state_dict())
        passing = iter(second)
        second.sampler.set_epoch(3)  # Lightning sets the epoch after it has made the iterator
        assert rows(begun) + rows(list(passing)) == expected
        assert rows(list(second)) == expected  # and only once


@pytest.mark.parametrize("stop", [4, 12])  # within the epoch, as with limit_train_batches, or at its end
def test_another_epoch_begins_with_its_first_batch(stop: int) -> None:
    first = loader()
    passing = iter(first)
    for _ in range(stop):
        next(passing)
    second = loader()
    second.load_state_dict(first.state_dict())
    passing = iter(second)
    second.sampler.set_epoch(1)
    expected = loader()
    expected.sampler.set_epoch(1)
    assert rows(list(passing)) == rows(list(expected))


def test_a_resumed_shuffle_has_its_old_seed() -> None:
    first, second = loader(), loader()
    first.sampler.seed = 5
    begun = next(iter(first))
    second.load_state_dict(first.state_dict())
    assert rows([begun, *second]) == rows(list(first))


def test_another_number_of_batches_is_refused() -> None:
    first = loader()
    next(iter(first))
    second = loader(batch_size=9)
    second.load_state_dict(first.state_dict())
    with pytest.raises(UserError, match=r"during an epoch of 12 batches, but now an epoch has 10: resume"):
        next(iter(second))


def test_a_loader_does_not_use_the_global_random_numbers() -> None:
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    list(loader(num_workers=0))
    assert torch.equal(torch.rand(1), expected)
