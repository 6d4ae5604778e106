"""Settings of the Trainer that cannot work are refused in a line or two, before a model is loaded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from lit_spu.__main__ import main
from lit_spu.cli.user_errors import explain_error

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches")


@pytest.fixture
def fit(tiny: Callable[[str], str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a fit that is refused; gives its error."""

    def refused(*flags: str, config: str = "HeadOnly") -> str:
        small = ["--data.limit_train=32", "--data.limit_validation=16", "--data.batch_size=8", "--trainer.max_epochs=1"]
        places = [f"--model.backbone={tiny('bert')}", f"--data.cache={tmp_path}", f"--run_dir={tmp_path}/run"]
        with pytest.raises(SystemExit) as stop:
            main(["fit", f"--model={config}", "--trainer.callbacks=null", *places, *small, *flags])
        assert stop.value.code == 2
        lines = capsys.readouterr().err.strip().splitlines()
        message = lines[next(i for i, line in enumerate(lines) if line.startswith("error: ")) :]
        assert len(message) <= 2
        return "\n".join(message)

    return refused


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("accumulate_grad_batches=0", "a whole number from 1"),
        ("check_val_every_n_epoch=0", "a whole number from 1"),
        ("val_check_interval=0", "a whole number from 1"),
        ("val_check_interval=1.5", "a number above 0 to 1"),
        ("max_epochs=-2", "from -1"),
        ("max_steps=-2", "from -1"),
        ("min_epochs=-1", "from 0"),
        ("limit_train_batches=-1", "from 0"),
        ("limit_val_batches=1.5", "from 0"),
        ("num_sanity_val_steps=-2", "from -1"),
        ("log_every_n_steps=-1", "from 0"),
        ("gradient_clip_val=-1", "from 0"),
        ("num_nodes=0", "from 1"),
        ("barebones=true", "Give False"),
        ("gradient_clip_algorithm=value", "has no effect without --trainer.gradient_clip_val"),
        ("strategy=ddp_spawn", "Use --trainer.strategy=ddp,"),
        ("strategy=ddp_notebook_find_unused_parameters_true", "the processes cannot be started from within"),
        ("strategy=ddpp", "invalid strategy name"),
        ("devices=0", "is not a valid input using cpu"),
        ("accelerator=tpux", "invalid accelerator name"),
        ("profiler=simpel", "can only be one of"),
        ("precision=transformer-engine", "transformer_engine"),
        ("max_time=abc", "not a valid duration"),
    ],
)
def test_a_setting_is_refused_before_the_model_is_loaded(
    fit: Callable[..., str], monkeypatch: pytest.MonkeyPatch, setting: str, expected: str
) -> None:
    monkeypatch.setattr("lit_spu.methods.base.load_backbone", lambda *args: pytest.fail("the model was loaded"))
    message = fit(f"--trainer.{setting}")
    assert expected in message
    assert "--trainer" in message


@pytest.mark.parametrize("monitor", ["val_loss", "val/f1", "accuracy", "test/accuracy"])
@pytest.mark.parametrize("callback", ["EarlyStopping", "ModelCheckpoint"])
def test_an_unknown_metric_is_refused_before_training(
    fit: Callable[..., str], monkeypatch: pytest.MonkeyPatch, callback: str, monitor: str
) -> None:
    monkeypatch.setattr("lit_spu.methods.base.load_backbone", lambda *args: pytest.fail("the model was loaded"))
    message = fit(f"--trainer.callbacks+={callback}", f"--trainer.callbacks.monitor={monitor}")
    assert f"--trainer: {callback}: no metric {monitor!r}" in message
    assert "val/accuracy, val/loss" in message


@pytest.mark.parametrize("monitor", ["val/loss", "train/loss", "val/accuracy", "update/whole"])
def test_a_known_metric_is_monitored(fit: Callable[..., str], monitor: str) -> None:
    flags = ["--trainer.callbacks+=EarlyStopping", f"--trainer.callbacks.monitor={monitor}"]
    assert "no metric" not in fit(*flags, "--trainer.accelerator=tpux")


def test_what_lightning_finds_while_it_trains_is_a_line(fit: Callable[..., str]) -> None:
    assert "`val_check_interval` (100) must be less than or equal" in fit("--trainer.val_check_interval=100")


class FreezeAll(Callback):
    """Freezes every weight before the optimizer is made."""

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        pl_module.requires_grad_(False)


def test_a_method_without_weights_to_train_is_a_line(fit: Callable[..., str]) -> None:
    assert "has no weights to train" in fit("--trainer.callbacks+=tests.test_trainer_settings.FreezeAll")


class OutOfMemory(Callback):
    """Asks for more memory than there is."""

    def on_train_batch_start(self, *args: Any) -> None:
        torch.empty(2**60)


def test_want_of_memory_is_told_in_two_lines(fit: Callable[..., str]) -> None:
    message = fit("--trainer.callbacks+=tests.test_trainer_settings.OutOfMemory")
    assert message.startswith("error: Out of memory: another 4611686018427387904 bytes were needed. Lower --data.batch")
    cuda = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of …")
    assert "another 20.00 MiB were needed" in str(explain_error(cuda))
    assert explain_error(MemoryError()) is not None


def test_errors_of_the_program_keep_their_traceback() -> None:
    assert explain_error(RuntimeError("shape mismatch")) is None
