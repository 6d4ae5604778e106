"""Batches whose cached hidden states were found beforehand: the same states, in few operators and without a wait."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lit_spu.backbones import Batch, HiddenStates, activation_cache, copy_ahead
from lit_spu.backbones.activation_cache import ActivationCache
from lit_spu.backbones.activation_store import MemoryStore
from lit_spu.backbones.cached_texts import CachedTexts
from lit_spu.errors import UserError
from lit_spu.measure import Launches
from tests.backbones.test_activation_cache import forbid, frozen
from tests.conftest import SENTENCES, encode

Tiny = Callable[[str], str]

PLENTY = 2**30


def all_states(stacks: tuple[HiddenStates, ...]) -> list[Tensor]:
    return [state for stack in stacks for state in (stack.embeddings, *stack.blocks) if state is not None]


def assert_equal(found: tuple[HiddenStates, ...], expected: tuple[HiddenStates, ...]) -> None:
    assert len(all_states(found)) == len(all_states(expected)) > 0
    assert all(torch.equal(a, b) for a, b in zip(all_states(found), all_states(expected), strict=True))


def prepare(cache: ActivationCache, batch: Batch) -> Batch:
    (prepared,) = cache.prepare([batch])
    return prepared


@contextmanager
def no_host_reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    """Context manager that counts operators, and in which no tensor may be read by the host, as if on a device."""

    def refuse(*_: Any) -> Any:
        raise AssertionError("a tensor is read by the host")

    with monkeypatch.context() as patch, Launches() as counted:
        for name in ("cpu", "numpy", "tolist", "item"):
            patch.setattr(Tensor, name, refuse)
        patch.setattr(activation_cache, "_is_on_host", lambda _: False)
        yield counted


@pytest.mark.parametrize(
    ("family", "precision"),
    [("bert", "fp32"), ("t5", "int8"), *(pytest.param(f, "bf16", marks=pytest.mark.slow) for f in ("bert", "t5"))],
)
@pytest.mark.parametrize("source", ["memory", "files", "files, read once"])
def test_prepared_batches_have_the_same_states(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, family: str, precision: Any
) -> None:
    backbone = frozen(tiny(family))
    cache = ActivationCache(backbone, None if source == "memory" else tmp_path, precision)
    batch = encode(backbone, (*SENTENCES, SENTENCES[0]))
    cache.plan([batch], device_bytes=PLENTY if source == "files, read once" else 0)
    first = prepare(cache, batch)
    assert not cache.is_prepared(first)  # nothing is cached yet
    with torch.no_grad():
        expected = ActivationCache(backbone, precision=precision)(batch)
        with monkeypatch.context() as patch:
            patch.setattr(activation_cache, "digest_texts", None)  # the rows are known
            assert_equal(cache(first), expected)
        forbid(backbone, monkeypatch)
        prepared = prepare(cache, batch)
        assert cache.is_prepared(prepared)
        assert all(not t.is_floating_point() for name, t in prepared.items() if name not in batch)
        with no_host_reads(monkeypatch) as counted:
            found = cache(prepared)
        reversed_rows = {name: tensor.flip(0) for name, tensor in prepared.items()}
        for state, other in zip(all_states(cache(reversed_rows)), all_states(expected), strict=True):
            assert torch.equal(state.flip(0), other)
    assert_equal(found, expected)
    assert len({len(tensor) for tensor in prepared.values()}) == 1  # rows first, in every tensor
    gathers = 0 if source == "files" else 2 if precision == "int8" else 1
    conversions = int(precision != "fp32")
    assert counted.total == len(backbone.stacks) * (gathers + conversions)
    assert not counted.waits
    assert not counted.host_copies


def test_the_first_step_waits_for_nothing(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """It computes the states of a batch and fills the table on the device."""
    backbone = frozen(tiny("t5"))
    cache, batch = ActivationCache(backbone), encode(backbone)
    cache.plan([batch], device_bytes=PLENTY)
    with torch.no_grad():
        expected = ActivationCache(backbone)(batch)
        computed = backbone.hidden_states(batch)
        monkeypatch.setattr(backbone, "hidden_states", lambda *_: computed)
        first = prepare(cache, batch)
        with no_host_reads(monkeypatch) as counted:
            found = cache(first)
    assert_equal(found, expected)
    assert not counted.waits


def test_states_of_a_stack_are_views_of_one_tensor(tiny: Tiny) -> None:
    cache = ActivationCache(frozen(tiny("bert")))
    (states,) = cache(encode(cache.backbone))
    every = [states.embeddings, *states.blocks]
    step = every[0].numel() * every[0].itemsize
    assert [state.data_ptr() - every[0].data_ptr() for state in every] == [n * step for n in range(len(every))]


def test_an_index_of_another_data_set_is_not_trusted(tiny: Tiny) -> None:
    """Every data set numbers its examples from 0."""
    backbone = frozen(tiny("bert"))
    cache = ActivationCache(backbone)
    train, validation = encode(backbone, SENTENCES[:2]), encode(backbone, SENTENCES[1:])  # which has more texts
    cache.plan([train], [validation])
    with torch.no_grad():
        for batch in (train, validation):
            expected = cache(batch)
            prepared = prepare(cache, batch)
            assert cache.is_prepared(prepared)
            assert_equal(cache(prepared), expected)
    word = {**train, "input_ids": train["input_ids"].clone()}
    word["input_ids"][1, 1] += 1
    longer = {**train, "attention_mask": torch.ones_like(train["attention_mask"])}
    others = [
        word,  # another text
        longer,  # its padding is text
        {**train, "index": torch.tensor([0, 7])},  # unknown
        {name: t for name, t in train.items() if name != "index"},
        {name: t[:, :-1] if t.dim() > 1 else t for name, t in train.items()},  # cut
    ]
    with torch.no_grad():
        for other in others:
            assert not cache.is_prepared(prepare(cache, other))
            assert_equal(cache(other), ActivationCache(backbone)(other))
        cache.plan([train], [validation])
        for _ in range(2):  # the first computes the states, the second reads them
            changed = {**prepare(cache, train), "input_ids": word["input_ids"]}  # by a callback
            assert_equal(cache(changed), ActivationCache(backbone)(word))
            assert_equal(cache(train), ActivationCache(backbone)(train))
        padded = encode(backbone, SENTENCES[:2], pad_to=20)
        assert cache.is_prepared(prepare(cache, padded))
        repadded = {**prepare(cache, train), **padded}  # padded after it was prepared
        assert_equal(cache(repadded), cache(padded))


def test_what_another_cache_prepared_is_not_read(tiny: Tiny) -> None:
    backbone = frozen(tiny("bert"))
    one, other = ActivationCache(backbone), ActivationCache(backbone)
    batch = encode(backbone)
    flipped = {name: tensor.flip(0) for name, tensor in batch.items()}
    with torch.no_grad():
        for cache, texts in ((one, batch), (other, flipped)):  # which number the texts differently
            cache.plan([texts])
            cache(texts)
        prepared = prepare(one, batch)
        assert not other.is_prepared(prepared)
        expected = one(batch)
        assert_equal(other(prepared), expected)
        other.plan([batch])
        assert_equal(other(prepare(one, batch)), expected)


def test_texts_that_were_not_planned_are_cached_too(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    backbone = frozen(tiny("bert"))
    cache = ActivationCache(backbone)
    cache.plan([encode(backbone, SENTENCES[:2])])
    batch = encode(backbone, SENTENCES[1:])
    with torch.no_grad():
        expected = cache(batch)
        forbid(backbone, monkeypatch)
        assert_equal(cache(batch), expected)


def test_a_text_keeps_its_first_states(tiny: Tiny) -> None:
    """In another batch its states may differ in the last bits."""
    backbone = frozen(tiny("bert"))
    cache = ActivationCache(backbone)
    batches = [encode(backbone, SENTENCES[:2]), encode(backbone, SENTENCES)]
    cache.plan(batches)
    with torch.no_grad():
        first = cache(batches[0])
        with torch.inference_mode():  # as in validation
            backbone.blocks[0].register_forward_hook(lambda *args: args[2] + 1)
            cache(batches[1])
        assert_equal(cache(batches[0]), first)


class Queue:
    """A stream that records what is done in which order."""

    log: list[str]

    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        self.log.append(f"{self.name}: copy")

    def __exit__(self, *_: Any) -> None:
        pass

    def record_event(self) -> int:
        return sum("copy" in line for line in self.log)

    def wait_event(self, event: int) -> None:
        self.log.append(f"{self.name}: wait for {event}")


def test_a_batch_is_copied_while_the_one_before_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    Queue.log = log = []
    monkeypatch.setattr(torch, "Stream", lambda device: Queue("side"))
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: Queue("main"))
    monkeypatch.setattr(
        Tensor, "record_stream", lambda tensor, stream: log.append(f"{stream.name}: uses {int(tensor)}")
    )
    for batch in copy_ahead.copy_ahead(({"x": torch.tensor(n)} for n in range(3)), torch.device("cpu")):
        log.append(f"step {int(batch['x'])}")
    copy, *rest = log
    assert copy == "side: copy"
    assert rest == [
        *("side: copy", "main: wait for 1", "main: uses 0", "step 0"),
        *("side: copy", "main: wait for 2", "main: uses 1", "step 1"),
        *("main: wait for 3", "main: uses 2", "step 2"),
    ]


def test_a_device_without_room_is_told(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(activation_cache, "StateTables", fail)
    cache = ActivationCache(frozen(tiny("bert")))
    cache.device = torch.device("cuda")
    with pytest.raises(UserError, match=r"model.cache_device_mib: cuda has no room"):
        cache.plan([encode(cache.backbone)], device_bytes=PLENTY)


def test_tables_in_memory_need_room_there(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU a cache in files may have them as well."""
    cache = ActivationCache(frozen(tiny("bert")), tmp_path)
    batch = encode(cache.backbone)
    need = cache.plan([batch]).num_bytes_of_all
    monkeypatch.setattr(MemoryStore, "free_bytes", lambda self: 2 * need)
    cache.plan([batch], device_bytes=need, num_processes=2)
    with pytest.raises(UserError, match=r"memory has room .* --model.cache_device_mib=0"):
        cache.plan([batch], device_bytes=need, num_processes=3)
    cache.plan([batch], num_processes=3)


def test_texts_without_an_index_have_no_rows(tiny: Tiny) -> None:
    assert CachedTexts(()).find(encode(frozen(tiny("bert")))) is None
