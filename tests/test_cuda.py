"""A GPU computes what a CPU computes: gradients, slopes along directions, trajectories, and counts of memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger

import lit_spu
from benchmarks.methods import growth
from lit_spu.data.glue import GLUE
from lit_spu.methods.base import Method
from lit_spu.methods.mezo import MeZO
from lit_spu.methods.zeroth_order import ZerothOrder
from lit_spu.optim.mezo import NOISES
from lit_spu.optim.noise import GaussianNoise
from lit_spu.study.steps import batch_of, live_bytes, training_step
from tests.conftest import encode
from tests.ddp import quiet_trainer
from tests.runs import METHODS, made

pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore:The number of training batches")]

CUDA = torch.device("cuda")


def learnt(method: Method, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """The gradient of a loss, or the slopes that MeZO finds, in one row."""
    if isinstance(method, ZerothOrder):
        step, (optimizer, *_) = training_step(method, batch)
        step()
        return torch.tensor(optimizer.history[1:])  # type: ignore[attr-defined]
    method.train()
    method.loss(batch).backward()
    return torch.cat([p.grad.flatten() for p in method.parameters() if p.grad is not None]).cpu()


@pytest.fixture
def same_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Draw MeZO's normal noise by the CPU's generator, in the same parts on every device."""

    def draw(noise: GaussianNoise, out: torch.Tensor, generator: torch.Generator) -> None:
        out.copy_(torch.randn(len(out), generator=torch.Generator().manual_seed(generator.initial_seed())))

    monkeypatch.setattr(GaussianNoise, "draw", draw)
    monkeypatch.setattr("lit_spu.optim.noise.SMALL_DRAWS", ())


@pytest.mark.usefixtures("same_noise")
@pytest.mark.parametrize("family", ["bert", "t5", "llama"])
@pytest.mark.parametrize("config", METHODS)
def test_a_step_is_that_of_the_cpu(tiny: Callable[[str], str], config: str, family: str) -> None:
    settings = {"noise": "gaussian", "epsilon": 1e-2, "hidden_state_dropout": 0.0}
    found = []
    for device in (torch.device("cpu"), CUDA):
        method = made(config, tiny(family), **settings).to(device)
        found.append(learnt(method, {name: tensor.to(device) for name, tensor in encode(method.backbone).items()}))
    scale = found[0].abs().max().item()
    torch.testing.assert_close(found[1], found[0], rtol=0.01, atol=max(1e-4, 0.01 * scale))


@pytest.mark.parametrize("noise", NOISES)
def test_a_trajectory_leads_to_the_weights(tmp_path: Path, noise: Any) -> None:
    torch.manual_seed(3)
    method = MeZO(noise=noise, lr=1e-3, directions=2)
    before = {name: tensor.clone() for name, tensor in method.state_dict().items()}
    data = GLUE(batch_size=8, limit_train=32, limit_validation=20, cache=str(tmp_path / "cache"))
    logger = CSVLogger(tmp_path / "run", name="", version="")
    quiet_trainer(max_epochs=2, accelerator="cuda", logger=logger).fit(method, data)
    replayed, trained = lit_spu.replay(tmp_path / "run").state_dict(), method.cpu().state_dict()
    assert all(torch.equal(tensor, replayed[name]) for name, tensor in trained.items())
    assert not all(torch.equal(tensor, before[name]) for name, tensor in trained.items())


class CountReplays(Callback):
    """Notes the number of replayed steps."""

    num_replays = 0
    obstacle: str | None = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if graphs := getattr(pl_module, "graphs", None):
            self.num_replays, self.obstacle = graphs.num_replays, graphs.obstacle


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize(
    "config", [name for name in METHODS if name not in ("mezo_side", "mezo_lst", "lr_distillation")]
)
def test_a_captured_step_is_the_eager_one(tmp_path: Path, config: str, precision: Any) -> None:
    found = []
    for cuda_graphs in (False, True):
        torch.manual_seed(3)
        method = made(config, "mini-bert", cuda_graphs=cuda_graphs, dropout=0.0, hidden_state_dropout=0.0)
        data = GLUE(batch_size=8, limit_train=64, limit_validation=20, cache=str(tmp_path / "cache"))
        replays = CountReplays()
        trainer = quiet_trainer(max_epochs=4, accelerator="cuda", precision=precision, callbacks=[replays])
        trainer.fit(method, data)
        assert (replays.num_replays > 16) is cuda_graphs, replays.obstacle
        found.append([parameter.detach().cpu() for parameter in method.parameters()])
    tolerance = 1e-3 if precision == "32-true" else 2e-2
    torch.testing.assert_close(found[1], found[0], rtol=tolerance, atol=tolerance)


class RecordLosses(Callback):
    """Records the losses of all steps. From the second epoch on, reading the cache may not wait for the device."""

    def __init__(self) -> None:
        self.losses: list[torch.Tensor] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        cache: Any = pl_module.cache
        if cache is None or trainer.current_epoch != 1:
            return

        def read(batch: dict[str, torch.Tensor]) -> Any:
            assert cache.is_prepared(batch)
            torch.cuda.set_sync_debug_mode("error")
            try:
                return cache(batch)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        pl_module.hidden_states = read  # type: ignore[assignment]

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self.losses.append(outputs["loss"])


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_losses_on_cached_states_are_those_without_a_cache(tmp_path: Path, precision: Any) -> None:
    """Resident by default; copied one batch ahead from the host's memory and from files without memory for them."""
    files = str(tmp_path / "states")
    found = []
    for cache, mib in ((None, None), ("memory", None), ("memory", 0), (files, 0), (files, None)):
        settings: dict[str, Any] = {"activation_cache": cache, "cache_device_mib": mib, "cache_precision": precision}
        torch.manual_seed(3)
        method = made("lst", "mini-bert", **settings)
        tokens = str(tmp_path / "tokens")
        data = GLUE(batch_size=64, limit_train=640, limit_validation=20, same_batches=True, cache=tokens)
        recorded = RecordLosses()
        quiet_trainer(max_epochs=4, accelerator="cuda", callbacks=[recorded]).fit(method, data)
        found.append(torch.stack(recorded.losses).cpu())
    tolerance = 1e-5 if precision == "fp32" else 0.05
    torch.testing.assert_close(found[1], found[0], rtol=tolerance, atol=tolerance)
    for losses in found[2:]:
        torch.testing.assert_close(losses, found[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("config", ["full", "lora", "lst", "mezo"])
def test_live_bytes_are_what_the_allocator_says(config: str) -> None:
    method = made(config, "mini-bert").to(CUDA)
    batch = {name: tensor.to(CUDA) for name, tensor in batch_of(64, 128, method.task).items()}
    step, optimizers = training_step(method, batch)
    counted = live_bytes(method, step, optimizers)  # which also makes the optimizer's state
    torch.cuda.synchronize()
    assert growth(step, CUDA) == pytest.approx(counted.above_bytes, rel=0.1)
