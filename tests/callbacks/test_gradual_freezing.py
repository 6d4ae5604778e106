"""Gradual freezing: frozen weights do not change, nothing below is stored, and what cannot be frozen is refused."""

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
from lit_spu.methods.base import Method
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
    """Records after every step which layers are trainable, and all their weights."""

    def __init__(self) -> None:
        self.trainable: list[list[bool]] = []
        self.weights: list[list[list[Tensor]]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        layers: Any = pl_module.parameters_by_depth
        self.trainable.append([any(p.requires_grad for p in layer) for layer in layers])
        self.weights.append([[p.detach().clone() for p in layer] for layer in layers])


def trainable_layers(method: Method) -> list[int]:
    return [number for number, layer in enumerate(method.parameters_by_depth) if any(p.requires_grad for p in layer)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("config", ["full", *ADAPTED])
def test_frozen_layers_do_not_change(tiny: Tiny, tmp_path: Path, config: str, family: str) -> None:
    """Despite momentum and weight decay, with four steps in an epoch and one layer frozen after each epoch."""
    method, watch = made(config, tiny(family), weight_decay=0.1, lr=1e-2), Watch()
    trainable = trainable_layers(method)
    fit(method, tmp_path, GradualFreezing(), watch)
    for step, (before, after) in enumerate(pairwise(watch.weights), start=1):
        frozen = trainable[: step // 4]
        for number in trainable:
            assert watch.trainable[step][number] == (number not in frozen)
            assert same(before[number], after[number]) == (number in frozen), (step, number)
    assert trainable_layers(method) == trainable


def test_freezing_by_steps_keeps_the_top_layers_trainable(tiny: Tiny, tmp_path: Path) -> None:
    watch = Watch()
    fit(made("full", tiny("bert")), tmp_path, GradualFreezing(every=3, unit="step", keep=3), watch)
    assert [flags.count(False) for flags in watch.trainable] == [0, 0, 0, 1, 1, 1, *[2] * 10]  # of five layers


def test_thawing_unfreezes_from_the_top_down(tiny: Tiny, tmp_path: Path) -> None:
    watch = Watch()
    fit(made("full", tiny("bert")), tmp_path, GradualFreezing(thaw=True, keep=2), watch)
    assert [flags.index(True) for flags in watch.trainable[::4]] == [3, 2, 1, 0]
    assert all(same(layer, watch.weights[0][0]) for layer in (w[0] for w in watch.weights[:12]))
    assert not same(watch.weights[-1][0], watch.weights[0][0])


def test_nothing_frozen_is_plain_training_bit_for_bit(tiny: Tiny, tmp_path: Path) -> None:
    plain, late = made("full", tiny("bert")), made("full", tiny("bert"))
    fit(plain, tmp_path)
    fit(late, tmp_path, GradualFreezing(every=5))
    assert same(list(plain.state_dict().values()), list(late.state_dict().values()))


@pytest.mark.parametrize("config", ["full", "lora", "side_lora"])
def test_nothing_is_stored_below_the_lowest_trainable_layer(tiny: Tiny, config: str) -> None:
    method = made(config, tiny("bert"))
    batch = {**encode(method.backbone), "labels": torch.ones(4, dtype=torch.long)}
    stored = []
    for count in range(5):
        for layer in method.parameters_by_depth[:count]:
            for parameter in layer:
                parameter.requires_grad_(False)
        with saved.SavedForBackward() as counted:
            method.loss(batch)
        stored.append(counted.nbytes)
    assert stored[0] >= stored[1]
    assert all(less < more for more, less in pairwise(stored[1:])), stored


@pytest.mark.parametrize("settings", [{}, {"unit": "step", "every": 3}, {"thaw": True}, {"settled": 0.5}])
def test_a_resumed_run_equals_the_uninterrupted_one(tiny: Tiny, tmp_path: Path, settings: dict[str, Any]) -> None:
    whole = made("full", tiny("bert"))
    fit(whole, tmp_path, GradualFreezing(**settings))
    half = fit(made("full", tiny("bert")), tmp_path, GradualFreezing(**settings), StopBehind(1))
    half.save_checkpoint(tmp_path / "half.ckpt")
    rest = made("full", tiny("bert"))
    fit(rest, tmp_path, GradualFreezing(**settings), ckpt_path=tmp_path / "half.ckpt")
    assert same(list(whole.state_dict().values()), list(rest.state_dict().values()))


class ThreeLayers(LightningModule):
    """Three scalar weights with given gradients in each step."""

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


def test_the_lowest_settled_layers_are_frozen() -> None:
    """From the first interval of two steps to the second, norms change by 0, 1/2 and 1/4: the median is 1/4."""
    first, second, third = (2.0, 2.0, 4.0), (2.0, 3.0, 3.0), (9.0, 3.0, 1.0)
    method, watch = ThreeLayers([first, first, second, second, third, third, third]), Watch()
    quiet_trainer(callbacks=[GradualFreezing(every=2, unit="step", settled=0.5), watch], max_epochs=1).fit(method)
    # then the second layer changes by 0, and the last by 2/3: their median is 1/3
    assert [flags.count(False) for flags in watch.trainable] == [0, 0, 0, 0, 1, 1, 2]


def test_layers_settle_by_all_gradients_of_an_interval() -> None:
    """The lowest layer's norms swap within the interval, so their mean is the same; those of the others grow."""
    gradients = [(3.0, 2.0, 2.0), (1.0, 2.0, 2.0), (1.0, 4.0, 3.0), (3.0, 4.0, 3.0), (1.0, 1.0, 1.0)]
    watch = Watch()
    freezing = GradualFreezing(every=2, unit="step", settled=0.5)
    quiet_trainer(callbacks=[freezing, watch], max_epochs=1).fit(ThreeLayers(gradients))
    assert [flags.count(False) for flags in watch.trainable] == [0, 0, 0, 0, 1]


class Fail(Callback):
    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        if trainer.current_epoch == 2:
            raise RuntimeError("step failed")


def test_a_failing_run_unfreezes_all_layers(tiny: Tiny, tmp_path: Path) -> None:
    method, watch = made("full", tiny("bert")), Watch()
    with pytest.raises(RuntimeError, match="step failed"):
        fit(method, tmp_path, GradualFreezing(), watch, Fail())
    assert not all(watch.trainable[-1])
    assert trainable_layers(method) == list(range(len(method.parameters_by_depth)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("lst", "trains 0"),
        ("head", "trains 0"),
        ("last_layers", "trains 2"),
        ("mezo", "takes its steps by itself"),
    ],
)
def test_methods_with_nothing_to_freeze_are_refused(tiny: Tiny, tmp_path: Path, config: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        fit(made(config, tiny("bert")), tmp_path, GradualFreezing(keep=2))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"every": 0}, "every: 0"),
        ({"keep": -1}, "keep: -1"),
        ({"settled": 1.5}, "settled: 1.5"),
        ({"thaw": True, "settled": 0.5}, "thaw"),
    ],
)
def test_wrong_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        GradualFreezing(**settings)


def test_plain_ddp_is_refused(tiny: Tiny) -> None:
    method, callback = made("full", tiny("bert")), GradualFreezing()
    trainer: Any = type("Stub", (), {"strategy": DDPStrategy()})()
    with pytest.raises(UserError, match="ddp_find_unused_parameters_true"):
        callback.setup(trainer, method, "fit")
    trainer.strategy = DDPStrategy(find_unused_parameters=True)
    callback.setup(trainer, method, "fit")


def test_memory_and_trainable_parameters_fall_in_the_log(tmp_path: Path) -> None:
    method, logger = made("full", "mini-bert"), CSVLogger(tmp_path, name="run", version="0")
    trained = [sum(p.numel() for p in layer) for layer in method.parameters_by_depth]
    total = sum(p.numel() for p in method.parameters())
    data = GLUE(batch_size=32, limit_train=64, limit_validation=16, cache=str(tmp_path), same_batches=True)
    trainer = quiet_trainer(callbacks=[GradualFreezing(), Memory()], max_epochs=4, logger=logger, log_every_n_steps=1)
    trainer.fit(method, data)
    assert logged(tmp_path, "params/trainable") == [total - sum(trained[:n]) for n in range(4)]
    assert logged(tmp_path, "freezing/frozen") == [0, 1, 2, 3]
    activations = logged(tmp_path, "memory/activations_mib")
    assert activations[-1] < activations[-2] < max(activations)


@pytest.mark.xdist_group("two processes")  # two such tests at once may pick the same port
@pytest.mark.slow
def test_two_processes_train_the_weights_of_one(tiny: Tiny, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"callbacks": ["GradualFreezing"], "strategy": "ddp_find_unused_parameters_true"}
    one, two = (run(METHODS["full"], tiny("bert"), tmp_path, devices, trainer=settings) for devices in (1, 2))
    for name, weight in one["weights"].items():
        torch.testing.assert_close(two["weights"][name], weight, atol=1e-6, rtol=1e-5)
