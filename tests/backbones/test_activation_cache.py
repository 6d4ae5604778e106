"""The activation cache: it returns the backbone's own hidden states, and never those of another."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from lit_spu.backbones import Backbone, Batch, HiddenStates, load_backbone
from lit_spu.backbones.activation_cache import ActivationCache
from lit_spu.backbones.activation_store import FileStore, MemoryStore
from lit_spu.errors import UserError
from lit_spu.tasks import load_task
from tests.conftest import FAMILIES, SENTENCES, encode

Tiny = Callable[[str], str]


def frozen(folder: str) -> Backbone:
    backbone = load_backbone(folder, load_task("sst2"))
    backbone.freeze()
    return backbone.eval()


def states(taps: tuple[HiddenStates, ...], batch: Batch) -> Iterator[Tensor]:
    """All tokens of all taps that are real: the decoder's are, as none of its is padded."""
    for number, tap in enumerate(taps):
        for state in (tap.embeddings, *tap.blocks):
            yield state if number else state[batch["attention_mask"].bool()]


def same(found: tuple[HiddenStates, ...], wanted: tuple[HiddenStates, ...], batch: Batch) -> bool:
    return all(torch.equal(a, b) for a, b in zip(states(found, batch), states(wanted, batch), strict=True))


def forbid(backbone: Backbone, monkeypatch: pytest.MonkeyPatch) -> None:
    def hidden_states(batch: Batch) -> Any:
        raise AssertionError("the backbone ran")

    monkeypatch.setattr(backbone, "hidden_states", hidden_states)


@pytest.mark.parametrize("files", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_gives_what_the_backbone_computed_and_then_runs_it_no_more(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str, files: bool
) -> None:
    backbone = frozen(tiny(family))
    cache = ActivationCache(backbone, tmp_path if files else None)
    batch = encode(backbone)
    with torch.no_grad():
        wanted = backbone.hidden_states(batch)
        first = cache(batch)
        forbid(backbone, monkeypatch)
        second = cache(batch)
        longer = cache(encode(backbone, SENTENCES[::-1], pad_to=20 if "input_ids" in batch else None))
    assert same(first, wanted, batch)
    assert same(second, wanted, batch)
    for tap, other in zip(wanted, longer, strict=True):
        width = min(tap.blocks[-1].shape[1], other.blocks[-1].shape[1])
        shortest = int(batch["attention_mask"].sum(1).min()) if tap.mask is not None else width
        assert torch.equal(tap.blocks[-1][:, :shortest].flip(0), other.blocks[-1][:, :shortest])
    assert all((tap.mask is None) == (want.mask is None) for tap, want in zip(second, wanted, strict=True))
    pads = second[0].blocks[0][~batch["attention_mask"].bool()]
    assert bool((pads == 0).all())


def test_half_and_quarter_of_the_bytes_are_as_exact_as_their_formats(tiny: Tiny) -> None:
    backbone = frozen(tiny("bert"))
    batch = encode(backbone)
    with torch.no_grad():
        exact = list(states(backbone.hidden_states(batch), batch))
        for kept, state in zip(states(ActivationCache(backbone, precision="bf16")(batch), batch), exact, strict=True):
            assert torch.equal(kept, state.bfloat16().float())
        for kept, state in zip(states(ActivationCache(backbone, precision="int8")(batch), batch), exact, strict=True):
            step = state.abs().amax(-1, keepdim=True) / 127
            assert bool(((kept - state).abs() <= 0.5001 * step).all())
            assert not torch.equal(kept, state)


def test_a_backbone_in_bf16_is_given_back_in_bf16(tiny: Tiny) -> None:
    backbone = frozen(tiny("bert"))
    backbone.freeze("bf16")
    batch = encode(backbone)
    with torch.no_grad():
        wanted, found = backbone.hidden_states(batch), ActivationCache(backbone, precision="bf16")(batch)
    assert found[0].blocks[0].dtype is torch.bfloat16
    assert same(found, wanted, batch)


def test_runs_share_a_folder_while_they_write(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backbones = [frozen(tiny("bert")) for _ in range(2)]
    one, other = (ActivationCache(backbone, tmp_path) for backbone in backbones)
    batches = [encode(backbones[0], texts) for texts in (SENTENCES[:2], SENTENCES[2:], ("bright story",))]
    with torch.no_grad():
        one(batches[0])
        other(batches[1])
        one(batches[2])
        wanted = [backbones[0].hidden_states(batch) for batch in batches]
        for cache, backbone in zip((one, other), backbones, strict=True):
            forbid(backbone, monkeypatch)
            for batch, want in zip(batches, wanted, strict=True):
                assert same(cache(batch), want, batch)
    assert len(list(tmp_path.glob("*/*.taps"))) == 2  # each wrote into its own


@pytest.mark.parametrize("damage", ["index", "taps"])
def test_what_a_killed_run_left_half_written_is_computed_again(tiny: Tiny, tmp_path: Path, damage: str) -> None:
    backbone = frozen(tiny("bert"))
    batch = encode(backbone)
    with torch.no_grad():
        wanted = ActivationCache(backbone, tmp_path)(batch)
        (file,) = tmp_path.glob(f"*/*.{damage}")
        file.write_bytes(file.read_bytes()[:-5])
        again = ActivationCache(backbone, tmp_path)
        kept = again.plan([batch])
        found = again(batch)
    assert (kept.num_texts, kept.num_new) == (4, 1)
    assert same(found, wanted, batch)


@pytest.mark.parametrize("damage", ["flip", "nan", "shift", "swap", "missing", "empty", "noise", "index"])
def test_damage_is_noticed_and_computed_again(tiny: Tiny, tmp_path: Path, damage: str) -> None:
    backbone = frozen(tiny("bert"))
    batch = encode(backbone)
    with torch.no_grad():
        wanted = ActivationCache(backbone, tmp_path)(batch)
        (data,), (index,) = (list(tmp_path.glob(f"*/*.{suffix}")) for suffix in ("taps", "index"))
        raw = np.fromfile(data, np.uint8)
        lines = np.fromfile(index, FileStore._LINE)
        if damage == "flip":
            raw[len(raw) // 2] ^= 4
        elif damage == "nan":
            raw[:400] = 255  # NaN in fp32
        elif damage == "shift":
            lines["start"] += 4
        elif damage == "swap":
            lines["key"][:2] = lines["key"][1::-1]
        elif damage == "noise":
            raw = np.random.default_rng(0).integers(0, 256, len(raw), dtype=np.uint8)
        raw.tofile(data)
        lines.tofile(index)
        if damage == "missing":
            data.unlink()
        elif damage == "empty":
            data.write_bytes(b"")
        elif damage == "index":
            index.write_bytes(b"not an index, but as long as a few lines of one" * 3)
        assert same(ActivationCache(backbone, tmp_path)(batch), wanted, batch)
        again = ActivationCache(backbone, tmp_path)  # what was computed again was saved beside the damaged records
        assert same(again(batch), wanted, batch)
    assert len(list(tmp_path.glob("*/*.index"))) == 2


def test_a_record_that_another_process_added_meanwhile_is_not_added_again(tiny: Tiny, tmp_path: Path) -> None:
    backbone = frozen(tiny("bert"))
    batch = encode(backbone)
    one, other = (ActivationCache(backbone, tmp_path) for _ in range(2))
    compute = backbone.hidden_states

    def overtaken(*args: Any) -> Any:
        backbone.hidden_states = compute  # type: ignore[method-assign]
        other(batch)
        return compute(*args)

    backbone.hidden_states = overtaken  # type: ignore[method-assign, assignment]
    with torch.no_grad():
        one(batch)
    assert len(list(tmp_path.glob("*/*.taps"))) == 1


def test_another_backbone_finds_nothing(tiny: Tiny, tmp_path: Path) -> None:
    backbone = frozen(tiny("bert"))
    batch = encode(backbone)
    ActivationCache(backbone, tmp_path)(batch)
    assert ActivationCache(backbone, tmp_path).plan([batch]).num_new == 0
    assert ActivationCache(backbone, tmp_path, "int8").plan([batch]).num_new == 4
    weight = backbone.blocks[2].get_parameter("output.dense.weight")
    with torch.no_grad():
        weight.view(torch.int32)[3, 5] ^= 1  # one bit
    assert ActivationCache(backbone, tmp_path).plan([batch]).num_new == 4
    with torch.no_grad():
        weight.view(torch.int32)[3, 5] ^= 1
    with torch.autocast("cpu", torch.bfloat16):
        assert ActivationCache(backbone, tmp_path).plan([batch]).num_new == 4
    backbone.base_model.model.config.layer_norm_eps *= 2
    assert ActivationCache(backbone, tmp_path).plan([batch]).num_new == 4


def test_the_head_of_a_task_is_not_part_of_what_is_kept(tiny: Tiny, tmp_path: Path) -> None:
    """A new pooler is random, and the number of labels is the task's: neither reaches a tap."""
    folders = set()
    for task, seed in (("sst2", 0), ("mnli", 1)):
        torch.manual_seed(seed)
        backbone = load_backbone(tiny("bert"), load_task(task))
        backbone.freeze()
        store = ActivationCache(backbone, tmp_path).store
        assert isinstance(store, FileStore)
        folders.add(store.folder)
    assert len(folders) == 1


@pytest.mark.parametrize("precision", ["fp32", "bf16", "int8"])
@pytest.mark.parametrize("family", ["bert", "t5"])
def test_the_plan_is_what_is_written(tiny: Tiny, tmp_path: Path, family: str, precision: Any) -> None:
    backbone = frozen(tiny(family))
    cache = ActivationCache(backbone, tmp_path, precision)
    batch = encode(backbone, (*SENTENCES, SENTENCES[0]))  # one comes twice
    plan = cache.plan([batch, batch])
    cache(batch)
    (file,) = tmp_path.glob("*/*.taps")
    assert plan.num_bytes == file.stat().st_size
    assert (plan.num_texts, plan.num_new) == (4, 4)
    again = cache.plan([batch])
    assert (again.num_texts, again.num_new, again.num_bytes) == (4, 0, 0)


@pytest.mark.parametrize("store", [MemoryStore, FileStore])
def test_what_does_not_fit_is_refused_with_what_would(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: type
) -> None:
    backbone = frozen(tiny("bert"))
    cache = ActivationCache(backbone, tmp_path if store is FileStore else None)
    batch = encode(backbone)
    need = cache.plan([batch]).num_bytes
    monkeypatch.setattr(store, "free_bytes", lambda self: 2 * need)
    cache.plan([batch], num_processes=2)
    if store is MemoryStore:  # which each process has for itself
        with pytest.raises(UserError, match="has room for"):
            cache.plan([batch], num_processes=3)
    else:
        cache.plan([batch], num_processes=3)
    monkeypatch.setattr(store, "free_bytes", lambda self: need - 1)
    with pytest.raises(UserError, match=r"4 texts take .* --model.cache_precision=bf16 .*int8"):
        cache.plan([batch])
    assert not list(tmp_path.rglob("*.taps"))


def test_texts_that_are_padded_on_the_left_are_refused(tiny: Tiny) -> None:
    backbone = frozen(tiny("bert"))
    batch = {name: tensor.flip(-1) if tensor.ndim == 2 else tensor for name, tensor in encode(backbone).items()}
    with pytest.raises(UserError, match="padded on the right"):
        ActivationCache(backbone)(batch)


def test_a_folder_that_cannot_be_written_is_told(tiny: Tiny, tmp_path: Path) -> None:
    backbone = frozen(tiny("bert"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written"):
        ActivationCache(backbone, tmp_path / "file")(encode(backbone))
