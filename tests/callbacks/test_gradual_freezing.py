"""What is frozen stays, leaves the backward pass and comes back; and what cannot be frozen is refused."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn

from lit_spu.callbacks.gradual_freezing import GradualFreezing
from lit_spu.callbacks.memory import Memory
from lit_spu.data.glue import GLUE
from lit_spu.errors import UserError
from lit_spu.measure import saved
from tests import runs
from tests.callbacks.conftest import logged
from tests.conftest import encode
from tests.ddp import quiet_trainer, run
from tests.runs import METHODS, StopBehind, made, same

Tiny = Callable[[str], str]
FAMILIES = ("bert", "t5", "llama")
ADAPTED = ("lora", "ia3", "bitfit", "side_lora", "siva")

fit = partial(runs.fit, max_epochs=4)

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches")


class Watch(Callback):
    """After every step, which stages learn, and what all weights are."""

    def __init__(self) -> None:
        self.learn: list[list[bool]] = []
        self.weights: list[list[list[Tensor]]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        stages: Any = pl_module.parameters_by_depth
        self.learn.append([any(p.requires_grad for p in stage) for stage in stages])
        self.weights.append([[p.detach().clone() for p in stage] for stage in stages])


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("config", ["full", *ADAPTED])
def test_what_is_frozen_stays_to_the_bit(tiny: Tiny, tmp_path: Path, config: str, family: str) -> None:
    """Also under momentum and weight decay: four steps an epoch, a stage an epoch."""
    method, watch = made(config, tiny(family), weight_decay=0.1, lr=1e-2), Watch()
    learn = [number for number, stage in enumerate(method.parameters_by_depth) if any(p.requires_grad for p in stage)]
    fit(method, tmp_path, GradualFreezing(), watch)
    for step, (before, after) in enumerate(pairwise(watch.weights), start=1):
        frozen = learn[: step // 4]
        for number in learn:
            assert watch.learn[step][number] == (number not in frozen)
            assert same(before[number], after[number]) == (number in frozen), (step, number)
    assert [
        number for number, stage in enumerate(method.parameters_by_depth) if any(p.requires_grad for p in stage)
    ] == learn


def test_steps_may_be_counted_and_the_last_stages_kept(tiny: Tiny, tmp_path: Path) -> None:
    watch = Watch()
    fit(made("full", tiny("bert")), tmp_path, GradualFreezing(every=3, unit="step", keep=3), watch)
    assert [flags.count(False) for flags in watch.learn] == [0, 0, 0, 1, 1, 1, *[2] * 10]  # five stages


def test_thawing_goes_down_from_the_top(tiny: Tiny, tmp_path: Path) -> None:
    watch = Watch()
    fit(made("full", tiny("bert")), tmp_path, GradualFreezing(thaw=True, keep=2), watch)
    assert [flags.index(True) for flags in watch.learn[::4]] == [3, 2, 1, 0]
    assert all(same(stage, watch.weights[0][0]) for stage in (w[0] for w in watch.weights[:12]))
    assert not same(watch.weights[-1][0], watch.weights[0][0])


def test_nothing_frozen_is_plain_training_to_the_bit(tiny: Tiny, tmp_path: Path) -> None:
    plain, late = made("full", tiny("bert")), made("full", tiny("bert"))
    fit(plain, tmp_path)
    fit(late, tmp_path, GradualFreezing(every=5))
    assert same(list(plain.state_dict().values()), list(late.state_dict().values()))


@pytest.mark.parametrize("config", ["full", "lora", "side_lora"])
def test_what_is_frozen_leaves_the_backward_pass(tiny: Tiny, config: str) -> None:
    method = made(config, tiny("bert"))
    batch = {**encode(method.backbone), "labels": torch.ones(4, dtype=torch.long)}
    held = []
    for count in range(5):
        for stage in method.parameters_by_depth[:count]:
            for parameter in stage:
                parameter.requires_grad_(False)
        with saved.SavedForBackward() as counted:
            method.loss(batch)
        held.append(counted.nbytes)
    assert held[0] >= held[1]
    assert all(below < above for above, below in pairwise(held[1:])), held


@pytest.mark.parametrize("settings", [{}, {"unit": "step", "every": 3}, {"thaw": True}, {"settled": 0.5}])
def test_a_resumed_run_is_the_uninterrupted_one(tiny: Tiny, tmp_path: Path, settings: dict[str, Any]) -> None:
    whole = made("full", tiny("bert"))
    fit(whole, tmp_path, GradualFreezing(**settings))
    half = fit(made("full", tiny("bert")), tmp_path, GradualFreezing(**settings), StopBehind(1))
    half.save_checkpoint(tmp_path / "half.ckpt")
    rest = made("full", tiny("bert"))
    fit(rest, tmp_path, GradualFreezing(**settings), ckpt_path=tmp_path / "half.ckpt")
    assert same(list(whole.state_dict().values()), list(rest.state_dict().values()))


class Stages(LightningModule):
    """Three scalars whose gradients, step by step, are what they are told to be."""

    def __init__(self, gradients: list[tuple[float, float, float]]) -> None:
        super().__init__()
        self.weights = nn.ParameterList(nn.Parameter(torch.zeros(())) for _ in range(3))
        self.gradients = gradients

    @property
    def parameters_by_depth(self) -> list[list[nn.Parameter]]:
        return [[weight] for weight in self.weights]

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        factors = self.gradients[self.trainer.global_step]
        return torch.stack([f * w for f, w in zip(factors, self.weights, strict=True)]).sum()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)

    def train_dataloader(self) -> Any:
        return torch.utils.data.DataLoader([torch.zeros(1)] * len(self.gradients))  # type: ignore[arg-type]


def test_the_lowest_stages_that_have_settled_are_frozen() -> None:
    """Intervals of two steps. From the first to the second, norms change by 0, 1/2 and 1/4: the median is 1/4."""
    first, second, third = (2.0, 2.0, 4.0), (2.0, 3.0, 3.0), (9.0, 3.0, 1.0)
    method, watch = Stages([first, first, second, second, third, third, third]), Watch()
    quiet_trainer(callbacks=[GradualFreezing(every=2, unit="step", settled=0.5), watch], max_epochs=1).fit(method)
    # then the second stage changes by 0, and the last by 2/3: their median is 1/3
    assert [flags.count(False) for flags in watch.learn] == [0, 0, 0, 0, 1, 1, 2]


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ("lst", "trains 0"),
        ("head", "trains 0"),
        ("last_layers", "trains 2"),
        ("mezo", "takes its steps by itself"),
    ],
)
def test_what_has_nothing_to_freeze_is_refused(tiny: Tiny, tmp_path: Path, config: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        fit(made(config, tiny("bert")), tmp_path, GradualFreezing(keep=2))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"every": 0}, "every=0"),
        ({"keep": -1}, "keep=-1"),
        ({"settled": 1.5}, "settled=1.5"),
        ({"thaw": True, "settled": 0.5}, "thaw"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        GradualFreezing(**settings)


def test_plain_ddp_is_refused_for_it_would_wait(tiny: Tiny) -> None:
    method, callback = made("full", tiny("bert")), GradualFreezing()
    trainer: Any = type("Stub", (), {"strategy": DDPStrategy()})()
    with pytest.raises(UserError, match="ddp_find_unused_parameters_true"):
        callback.setup(trainer, method, "fit")
    trainer.strategy = DDPStrategy(find_unused_parameters=True)
    callback.setup(trainer, method, "fit")


def test_the_steps_of_memory_and_weights_are_logged(tmp_path: Path) -> None:
    method, logger = made("full", "mini-bert"), CSVLogger(tmp_path, name="run", version="0")
    trained = [sum(p.numel() for p in stage) for stage in method.parameters_by_depth]
    everything = sum(p.numel() for p in method.parameters())
    data = GLUE(batch_size=32, limit_train=64, limit_validation=16, cache=str(tmp_path), same_batches=True)
    trainer = quiet_trainer(callbacks=[GradualFreezing(), Memory()], max_epochs=4, logger=logger, log_every_n_steps=1)
    trainer.fit(method, data)
    assert logged(tmp_path, "params/trainable") == [everything - sum(trained[:n]) for n in range(4)]
    assert logged(tmp_path, "freezing/frozen") == [0, 1, 2, 3]
    activations = logged(tmp_path, "memory/activations_mib")
    assert activations[-1] < activations[-2] < max(activations)


@pytest.mark.slow
def test_two_processes_equal_one(tiny: Tiny, tmp_path: Path) -> None:
    how: dict[str, Any] = {"callbacks": ["GradualFreezing"], "strategy": "ddp_find_unused_parameters_true"}
    one, two = (run(METHODS["full"], tiny("bert"), tmp_path, devices, trainer=how) for devices in (1, 2))
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight, atol=1e-6, rtol=1e-5)
