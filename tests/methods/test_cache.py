"""Training on what is kept of the backbone is training on the backbone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_spu.backbones.activation_store import FileStore
from lit_spu.data.glue import GLUE
from lit_spu.errors import UserError
from lit_spu.methods.frozen import HiddenStateReader
from lit_spu.methods.kladder import KLadder
from lit_spu.methods.ladder import LadderSideTuning
from tests.ddp import run

LST = Path(__file__).parents[2] / "configs" / "lst.yaml"
Run = Callable[..., Trainer]

# the mini models tell all of these texts apart, which the tiny ones' few words do not
WIDE = {"limit_train": 40, "limit_validation": 20, "batch_size": 8}


class Watch(Callback):
    """Every training loss, and how often the backbone's first block ran in each epoch."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.ran: list[int] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, HiddenStateReader)
        pl_module.backbone.blocks[0].register_forward_hook(lambda *_: self._count())

    def _count(self) -> None:
        self.ran[-1] += 1

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.ran.append(0)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:
        self.losses.append(float(outputs["loss"]))

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.ran.append(0)


METHODS: dict[str, Callable[..., HiddenStateReader]] = {
    "lst": LadderSideTuning,
    "windows": lambda **kwargs: LadderSideTuning(k=1, fusion="dynamic", **kwargs),
    "attention": lambda **kwargs: KLadder(k=2, fusion="attention", **kwargs),
}


@pytest.mark.parametrize(
    ("backbone", "kind"),
    [
        ("mini-bert", "lst"),
        pytest.param("mini-t5", "lst", marks=pytest.mark.slow),
        ("mini-bert", "windows"),
        pytest.param("mini-t5", "attention", marks=pytest.mark.slow),
    ],
)
def test_the_losses_are_equal_to_the_bit(
    data: Callable[..., GLUE], fit: Run, tmp_path: Path, backbone: str, kind: str
) -> None:
    losses = []
    folder = str(tmp_path / "taps")
    for cache, mib in ((None, None), ("memory", None), (folder, None), (folder, 100)):
        torch.manual_seed(0)
        settings = {"activation_cache": cache, "cache_device_mib": mib}
        method = METHODS[kind](backbone=backbone, reduction=4, lr=1e-2, **settings)
        watch = Watch()
        fit(method, data(same_batches=True, **WIDE), watch, max_epochs=3)
        losses.append(watch.losses)
        steps, validations = 5, 3
        assert watch.ran[0] > 0 or len(losses) == 4  # the sanity check runs it, unless a run before has
        if cache is None:
            assert watch.ran[1:] == [steps + validations] * 3
        else:  # nothing runs twice, and nothing at all that another run has kept
            assert watch.ran[2:] == [0, 0]
            assert (watch.ran[1] == 0) == (len(losses) == 4)
    assert len(losses[0]) == 15
    assert all(other == losses[0] for other in losses[1:])


def test_other_batches_change_the_last_bits_alone(data: Callable[..., GLUE], fit: Run) -> None:
    losses = []
    for cache in (None, "memory"):
        torch.manual_seed(0)
        watch = Watch()
        fit(LadderSideTuning(reduction=4, activation_cache=cache), data(**WIDE), watch, max_epochs=3)
        losses.append(torch.tensor(watch.losses))
    assert torch.equal(losses[0][:5], losses[1][:5])  # the first epoch's were computed
    torch.testing.assert_close(losses[0], losses[1], atol=1e-5, rtol=1e-5)


class Fail(Callback):
    """Fails in the first step of the second epoch, in which all batches are prepared."""

    num_prepared = 0

    def _count(self, cache: Any, batch: Any) -> None:
        self.num_prepared += cache.is_prepared(batch)

    def on_validation_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, *_: Any) -> None:
        self._count(pl_module.cache, batch)

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, *_: Any) -> None:
        self._count(pl_module.cache, batch)
        if trainer.current_epoch == 1:
            raise ArithmeticError


def test_after_a_run_nothing_is_cached(data: Callable[..., GLUE], fit: Run) -> None:
    method, texts = LadderSideTuning(reduction=4, activation_cache="memory"), data(**WIDE)
    assert method.cache is None
    fit(method, texts)
    assert method.cache is None
    assert texts.transform_batches is None


def test_after_a_failed_run_nothing_is_cached(data: Callable[..., GLUE], fit: Run) -> None:
    method, fail = LadderSideTuning(reduction=4, activation_cache="memory"), Fail()
    texts = data(limit_train=8, limit_validation=20)
    with pytest.raises(ArithmeticError):
        fit(method, texts, fail, max_epochs=2, num_sanity_val_steps=-1)
    assert fail.num_prepared == 3 + 1  # of validation after the first epoch, of training in the second
    assert texts.transform_batches is None
    method.setup("test")
    assert method.cache is None


def test_what_has_no_room_is_refused_before_training(
    data: Callable[..., GLUE], fit: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_spu.backbones.activation_cache.MemoryStore.free_bytes", lambda self: 1000)
    method = LadderSideTuning(reduction=4, activation_cache="memory")
    with pytest.raises(UserError, match=r"model.activation_cache: the hidden states of \d+ texts take"):
        fit(method, data(**WIDE))


def test_the_size_is_told_before(
    data: Callable[..., GLUE], fit: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = str(tmp_path / "taps")
    for new, mib, source in (("60", 0, folder), ("0", 100, "the memory of this process")):
        caplog.clear()
        with caplog.at_level("INFO"):
            fit(LadderSideTuning(reduction=4, activation_cache=folder, cache_device_mib=mib), data(**WIDE))
        assert f"60 texts, {new} of them new" in caplog.text
        assert f"A step reads them from {source}" in caplog.text


@pytest.mark.xdist_group("two processes")  # two such tests at once may pick the same port
@pytest.mark.slow
def test_two_ranks_share_a_folder(tmp_path: Path) -> None:
    """Each trains in later epochs on what the other kept, and all comes out as without a cache."""
    plain = run(LST, "mini-bert", tmp_path, 2)
    taps = tmp_path / "taps"
    kept = run(LST, "mini-bert", tmp_path, 2, activation_cache=str(taps))
    for name, tensor in plain["weights"].items():
        torch.testing.assert_close(kept["weights"][name], tensor, atol=2e-5, rtol=1e-4, msg=name)
    assert kept["metrics"]["val/loss"] == pytest.approx(plain["metrics"]["val/loss"], abs=1e-5)
    indices = sorted(taps.glob("*/*.index"))
    assert len(indices) == 2  # a file of each rank
    texts = [{key for key, *_ in np.fromfile(path, FileStore._LINE).tolist()} for path in indices]
    assert all(texts)
    assert len(set.union(*texts)) == 61
    again = run(LST, "mini-bert", tmp_path, 2, activation_cache=str(taps))
    assert sorted(taps.glob("*/*.index")) == indices  # nothing new
    assert all(torch.equal(again["weights"][name], tensor) for name, tensor in kept["weights"].items())
