"""Runs with an activation cache equal those without, and runs that cannot have one are refused before they write."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from lit_spu.callbacks.gradual_freezing import GradualFreezing
from lit_spu.callbacks.policies import DropBackward, Random
from lit_spu.callbacks.selective_update import SelectiveUpdate
from lit_spu.data.glue import GLUE
from lit_spu.errors import UserError
from lit_spu.methods.head import HeadOnly
from lit_spu.methods.last_layers import LastLayers
from lit_spu.methods.lora import LoRA
from lit_spu.methods.mezo_lora import MeZOLoRA
from tests.backbones.test_partial_pass import count_runs
from tests.runs import StopBehind, refusal

Run = Callable[..., Trainer]
Data = Callable[..., GLUE]

METHODS: dict[str, Callable[..., Any]] = {
    "head": HeadOnly,
    "last 1": lambda **given: LastLayers(layers=1, **given),
    "last 2": lambda **given: LastLayers(layers=2, **given),
    "lora 2, norms": lambda **given: LoRA(layers=2, norms=True, **given),
    "mezo lora 2": lambda **given: MeZOLoRA(layers=2, **given),
}
SMALL = {"limit_train": 40, "limit_validation": 20, "batch_size": 8, "same_batches": True}

pytestmark = [
    pytest.mark.filterwarnings("ignore:Before training, accuracy"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
]


class Watch(Callback):
    """Records all training losses and validation scores, and which blocks run in each epoch after the first."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []
        self.ran: list[int] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.seen.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seen.append({name: float(value) for name, value in trainer.callback_metrics.items()})

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == 1:
            self.ran = count_runs(pl_module.backbone)


def make(method: str, backbone: str = "mini-bert", cache: str | None = None, **settings: Any) -> Any:
    torch.manual_seed(0)
    return METHODS[method](backbone=backbone, activation_cache=cache, **settings)


def trained(method: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in method.named_parameters() if p.requires_grad}


def compare_runs(fit: Run, data: Data, method: str, backbone: str, *callbacks: Any, **trainer: Any) -> list[Watch]:
    """Train with each kind of cache and compare: to the bit, except for the head alone."""
    watches, weights = [], []
    for cache in (None, "memory", str(trainer.pop("folder", "")) or "memory"):
        made, watch = make(method, backbone, cache), Watch()
        fit(made, data(**SMALL), watch, *(callback() for callback in callbacks), max_epochs=2, **trainer)
        watches.append(watch)
        weights.append(trained(made))
    tolerance = 1e-4 if method == "head" else 0.0
    for watch, found in zip(watches[1:], weights[1:], strict=True):
        assert len(watch.seen) > 10
        torch.testing.assert_close(watch.seen, watches[0].seen, atol=tolerance, rtol=tolerance)
        torch.testing.assert_close(found, weights[0], atol=tolerance, rtol=tolerance)
    return watches


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("backbone", "method"),
    [
        ("mini-bert", "last 1"),
        pytest.param("mini-bert", "head", marks=SLOW),
        pytest.param("mini-bert", "last 2", marks=SLOW),
        pytest.param("mini-bert", "lora 2, norms", marks=SLOW),
        pytest.param("mini-bert", "mezo lora 2", marks=SLOW),
        pytest.param("mini-t5", "head", marks=SLOW),
        pytest.param("mini-t5", "last 2", marks=SLOW),
        pytest.param("mini-t5", "lora 2, norms", marks=SLOW),
    ],
)
def test_losses_scores_and_weights_are_those_without_a_cache(
    fit: Run, data: Data, tmp_path: Path, backbone: str, method: str
) -> None:
    """From the second epoch on the trained blocks run alone. A T5's decoder also makes its position bias."""
    plain, *cached = compare_runs(fit, data, method, backbone, folder=tmp_path / "states")
    depth = len(make(method, backbone).backbone.blocks)
    num_trained = 0 if method == "head" else int(method.partition(",")[0][-1])
    expected = {*range(depth - num_trained, depth), *([4] if backbone == "mini-t5" and num_trained else [])}
    assert set(plain.ran) == set(range(depth))
    assert all(set(watch.ran) == expected for watch in cached)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "precision"),
    [
        ("last 2", "bf16-mixed"),
        ("last 2", "bf16-true"),
        ("lora 2, norms", "bf16-mixed"),
        ("lora 2, norms", "bf16-true"),
        ("mezo lora 2", "16-true"),  # AdamW overflows in it
    ],
)
@pytest.mark.parametrize("backbone", ["mini-bert", "mini-t5"])
def test_every_precision_is_that_without_a_cache(
    fit: Run, data: Data, method: str, backbone: str, precision: str
) -> None:
    compare_runs(fit, data, method, backbone, precision=precision)


@pytest.mark.slow
@pytest.mark.parametrize(
    "callback",
    [
        GradualFreezing,
        lambda: GradualFreezing(thaw=True),
        lambda: GradualFreezing(unit="step", every=2),
        lambda: SelectiveUpdate(Random(0.5), otherwise="biases"),
        lambda: SelectiveUpdate(Random(0.5), otherwise="biases", depth=4),
        lambda: SelectiveUpdate(DropBackward()),
    ],
)
def test_callbacks_that_freeze_trained_blocks_leave_the_cache_right(fit: Run, data: Data, callback: Any) -> None:
    compare_runs(fit, data, "last 2", "mini-bert", callback)


@pytest.mark.slow
@pytest.mark.parametrize("cache", ["memory", "files"])
def test_a_resumed_run_equals_the_uninterrupted_one(fit: Run, data: Data, tmp_path: Path, cache: str) -> None:
    given = "memory" if cache == "memory" else str(tmp_path / "states")
    whole = make("last 2")
    fit(whole, data(**SMALL), max_epochs=3)
    half = fit(make("last 2", cache=given), data(**SMALL), StopBehind(0), max_epochs=3)
    half.save_checkpoint(tmp_path / "half.ckpt")
    rest = make("last 2", cache=given)
    fit(rest, data(**SMALL), max_epochs=3, ckpt_path=tmp_path / "half.ckpt")
    torch.testing.assert_close(trained(rest), trained(whole), atol=0, rtol=0)


class TrainLater(Callback):
    """Trains all blocks from an epoch on."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_start(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == self.epoch:
            pl_module.backbone.requires_grad_(True)


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_callback_that_trains_cached_blocks_is_refused(fit: Run, data: Data, epoch: int) -> None:
    with pytest.raises(UserError, match="a callback trains blocks that are cached"):
        fit(make("last 1", cache="memory"), data(**SMALL), TrainLater(epoch), max_epochs=3)


@pytest.mark.parametrize(
    "method",
    [
        ["LastLayers", "--model.layers=5"],
        ["BitFit"],
        *(
            pytest.param(method, marks=SLOW)
            for method in (["LoRA"], ["IA3"], ["SideLoRA"], ["LoRA", "--model.layers=5"], ["FullFineTuning"])
        ),
    ],
    ids=str,
)
def test_methods_that_train_the_lowest_block_have_no_cache(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], method: list[str]
) -> None:
    run, states = tmp_path / "run", tmp_path / "states"
    small = ["--data.limit_train=8", "--data.limit_validation=8", f"--data.cache={tmp_path}/cache", f"--run_dir={run}"]
    flags = [f"--model={method[0]}", *method[1:], f"--model.activation_cache={states}"]
    message = refusal(["fit", *flags, *small], capsys)
    assert "--model.activation_cache" in message
    assert ("--model.layers=2" in message) == (method[0] in ("LastLayers", "LoRA", "IA3"))  # which have the setting
    assert not run.exists()
    assert not states.exists()
