"""A loss, a score or a weight that is not finite stops a run, and no checkpoint holds one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_spu.__main__ import main
from lit_spu.callbacks.gradual_freezing import GradualFreezing
from lit_spu.callbacks.last_checkpoint import LastCheckpoint
from lit_spu.callbacks.policies import Always
from lit_spu.callbacks.selective_update import SelectiveUpdate
from lit_spu.data.glue import GLUE
from lit_spu.errors import NonFiniteError
from lit_spu.methods.finite import FiniteLosses, LossWatch, check_weights
from lit_spu.methods.full import FullFineTuning
from lit_spu.methods.head import HeadOnly
from lit_spu.methods.shared_trunk import SharedTrunk
from tests.runs import METHODS, made
from tests.runs import fit as fit_config

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches")

Data = Callable[..., GLUE]
Run = Callable[..., Trainer]
Tiny = Callable[[str], str]


class Break(Callback):
    """Makes the trained weights NaN after a number of steps."""

    def __init__(self, steps: int = 2) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step == self.steps:
            for parameter in pl_module.parameters():
                if parameter.requires_grad:
                    parameter.data.fill_(torch.nan)


FAST = ("lora", "mezo", "lst_distill", "mezo_lst")


@pytest.mark.parametrize("config", [c if c in FAST else pytest.param(c, marks=pytest.mark.slow) for c in METHODS])
def test_every_method_stops_at_the_first_loss_that_is_not_finite(tiny: Tiny, tmp_path: Path, config: str) -> None:
    with pytest.raises(NonFiniteError, match=r"at step 3, learning rate [\de.-]+( and [\de.-]+)*\. To go on, lower"):
        fit_config(made(config, tiny("bert")), tmp_path, Break(), max_steps=4)


@pytest.mark.parametrize("callback", [SelectiveUpdate(Always()), GradualFreezing()], ids=["s", "g"])
def test_so_do_callbacks_that_skip_or_freeze(tiny: Tiny, data: Data, fit: Run, callback: Callback) -> None:
    with pytest.raises(NonFiniteError, match="at step 3"):
        fit(FullFineTuning(backbone=tiny("bert")), data(), callback, Break())


def test_a_grid_names_the_sibling_without_a_score(tiny: Tiny, data: Data, fit: Run) -> None:
    method = SharedTrunk({"good": {}, "bad": {}}, backbone=tiny("bert"))
    for parameter in method.siblings["bad"].side.parameters():
        parameter.data.fill_(torch.nan)
    with pytest.raises(NonFiniteError, match="val/loss/bad is not finite"):
        fit(method, data(), limit_train_batches=0).validate(method, data(), verbose=False)


def test_a_loss_may_be_overwritten_by_the_next_step() -> None:
    """As the output of a CUDA graph, which is replayed."""
    watch, static = LossWatch(), torch.tensor(0.5)
    watch.add(static, 1, [])
    watch.add(static.fill_(torch.nan), 2, [])
    watch.add(static.fill_(0.25), 3, [])
    assert watch.read() == 0.25
    with pytest.raises(NonFiniteError, match="at step 2"):
        watch.check(str)


def test_the_first_bad_step_is_found_later() -> None:
    watch = LossWatch()
    for step, loss in enumerate([0.5, torch.inf, 0.3, torch.nan], 1):
        watch.add(torch.tensor(loss), step, [step / 10])
    with pytest.raises(NonFiniteError, match=r"at step 2, learning rate 0\.2\. Do this\."):
        watch.check(lambda step: "Do this.")


def only_add(method: Any) -> Any:
    """Let a method treat its losses as on an accelerator, which is not waited for at each step."""
    method.watch_loss = lambda loss: method._loss_watch.add(loss, method.trainer.global_step + 1, [])
    return method


def test_ranks_compare_their_losses_on_the_device_of_the_module() -> None:
    devices = []

    def reduce(first: torch.Tensor, reduce_op: str) -> torch.Tensor:
        devices.append(first.device.type)
        return torch.tensor(torch.inf)

    module: Any = FiniteLosses().to("meta")
    module._trainer = SimpleNamespace(strategy=SimpleNamespace(reduce=reduce), world_size=2)
    module._loss_watch.add(torch.tensor(0.5), 1, [0.1])  # on the CPU
    module.check_losses()
    assert devices == ["meta"]


def test_no_checkpoint_is_saved_after_a_bad_loss(tiny: Tiny, data: Data, fit: Run, tmp_path: Path) -> None:
    """Here a checkpoint is due after each step, sooner than the losses are checked."""
    saved = ModelCheckpoint(
        tmp_path / "checkpoints", "{step}", save_top_k=-1, every_n_train_steps=1, save_on_exception=True
    )
    late = {"enable_checkpointing": True, "log_every_n_steps": 50}
    callbacks = [Break(1), saved, LastCheckpoint(tmp_path / "checkpoints")]
    with pytest.raises(NonFiniteError):
        fit(only_add(HeadOnly(backbone=tiny("bert"))), data(), *callbacks, **late)
    assert not list(tmp_path.rglob("*.ckpt"))  # the weights of step 1 are broken right after it
    with pytest.raises(NonFiniteError):
        fit(only_add(HeadOnly(backbone=tiny("bert"))), data(), Break(2), saved, **late)
    assert [path.name for path in tmp_path.rglob("*.ckpt")] == ["step=1.ckpt"]


@pytest.mark.parametrize("where", ["interval", "epoch", "validation"])
def test_losses_on_an_accelerator_are_checked_now_and_then(tiny: Tiny, data: Data, fit: Run, where: str) -> None:
    settings = {
        "interval": {"log_every_n_steps": 3},
        "epoch": {"limit_val_batches": 0, "log_every_n_steps": 50},
        "validation": {"val_check_interval": 3, "log_every_n_steps": 4},
    }[where]
    with pytest.raises(NonFiniteError, match="at step 2, learning rate"):
        fit(only_add(HeadOnly(backbone=tiny("bert"))), data(), Break(1), **settings)


def test_a_score_that_is_not_finite_stops_the_run(tiny: Tiny, data: Data, fit: Run) -> None:
    with pytest.raises(NonFiniteError, match=r"val/loss is not finite.* lower --model.lr"):
        fit(HeadOnly(backbone=tiny("bert")), data(), Break(4))  # after the last step


def test_a_score_after_one_step_blames_the_training_not_the_backbone(tiny: Tiny, data: Data, fit: Run) -> None:
    with pytest.raises(NonFiniteError, match=r"val/loss is not finite.* lower --model.lr"):
        fit(HeadOnly(backbone=tiny("bert")), data(), Break(1), val_check_interval=1)


def test_an_infinite_logit_is_no_score(tiny: Tiny, data: Data, fit: Run) -> None:
    """Its loss may be finite: that of the label with all of the probability is 0."""
    method = HeadOnly(backbone=tiny("bert"))
    logits, labels = torch.tensor([[-torch.inf, 0.0]]), torch.tensor([1])
    assert method.backbone.loss(logits, {"labels": labels}) == 0
    method.update_metrics(logits, {"labels": labels}, "val/")
    assert method.compute_metrics()["val/loss"].isnan()
    method.backbone.model.classifier.bias.data[0] = -torch.inf
    trainer = fit(HeadOnly(backbone=tiny("bert")), data(), limit_train_batches=0)
    with pytest.raises(NonFiniteError, match="val/loss is not finite"):
        trainer.validate(method, data(), verbose=False)
    with pytest.raises(NonFiniteError, match="no prediction"):
        trainer.predict(method, data())


def test_weights_that_are_not_finite_are_named() -> None:
    check_weights({"a": torch.zeros(3), "b": torch.zeros(2, dtype=torch.long)}, "No")
    with pytest.raises(NonFiniteError, match=r"No: 1 of 2 weights .*\(b, …\)"):
        check_weights({"a": torch.zeros(3), "b": torch.tensor([0, torch.inf])}, "No")


@pytest.fixture(scope="module")
def small(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Flags of a short run on a tiny backbone."""
    sizes = ["--data.limit_train=64", "--data.limit_validation=16", "--data.limit_test=16", "--data.batch_size=8"]
    return [f"--model.backbone={tiny('bert')}", f"--data.cache={tmp_path_factory.mktemp('cache')}", *sizes]


@pytest.fixture(scope="module")
def failed(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a run whose weights are broken in its second epoch."""
    run = tmp_path_factory.mktemp("failed") / "run"
    flags = ["--trainer.callbacks+=tests.methods.test_finite.Break", "--trainer.callbacks.steps=12"]
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--model=HeadOnly", f"--run_dir={run}", *flags, *small])
    assert stop.value.code == 2
    return run


def test_a_failed_run_says_so_and_keeps_its_checkpoints(failed: Path) -> None:
    summary = json.loads((failed / "summary.json").read_text())
    assert summary["status"] == "failed"
    assert "the loss is not finite (NaN or infinite) at step 13" in summary["error"]
    for name in ("best", "last"):
        checkpoint = torch.load(failed / "checkpoints" / f"{name}.ckpt", weights_only=True)
        assert checkpoint["global_step"] == 8
        assert all(tensor.isfinite().all() for tensor in checkpoint["state_dict"].values())


@pytest.mark.parametrize("command", ["validate", "test", "predict", "export", "fit"])
def test_a_broken_checkpoint_is_refused(
    failed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    run = tmp_path / "run"
    shutil.copytree(failed, run)
    for file in (run / "checkpoints").iterdir():
        checkpoint = torch.load(file, weights_only=True)
        next(iter(checkpoint["state_dict"].values())).fill_(torch.nan)
        torch.save(checkpoint, file)
    more = [f"--output={tmp_path}/out"] if command == "export" else []
    with pytest.raises(SystemExit) as stop:
        main([command, f"--ckpt_path={run}", *more])
    assert stop.value.code == 2
    assert "weights hold NaN or infinity" in capsys.readouterr().err.splitlines()[-1]
    assert not list(run.glob("predictions*"))
