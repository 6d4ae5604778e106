"""Methods as their configs set them, runs of seconds, and what became of their weights."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from lit_spu.__main__ import main
from lit_spu.data.glue import GLUE
from lit_spu.measure.saved import SavedForBackward
from lit_spu.methods.base import Method
from lit_spu.study.grid import build, method_configs
from tests.conftest import encode
from tests.ddp import quiet_trainer

METHODS = method_configs([f"{Path(__file__).parents[1]}/configs/*.yaml"])


def made(config: str, backbone: str, **settings: Any) -> Method:
    """The method as its config sets it, on another backbone."""
    torch.manual_seed(0)
    return build(METHODS[config], backbone=backbone, **settings)


def fit(method: Method, folder: Path, *callbacks: Callback, ckpt_path: Path | None = None, **settings: Any) -> Trainer:
    """Train it on sample data, four steps an epoch."""
    torch.manual_seed(5)
    data = GLUE(batch_size=8, limit_train=32, limit_validation=16, cache=str(folder))
    trainer = quiet_trainer(callbacks=list(callbacks), **settings)
    trainer.fit(method, data, ckpt_path=ckpt_path)
    return trainer


def gradient_step(method: Any) -> tuple[Tensor, int, list[Tensor | None]]:
    """The loss of a batch, the bytes saved for the backward pass, and the gradients of all parameters."""
    batch = encode(method.backbone)
    with SavedForBackward(method.parameters()) as counter:
        loss = method.loss(batch)
    loss.backward()
    return loss.detach(), counter.nbytes, [parameter.grad for parameter in method.parameters()]


def refusal(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return the error that a refused command line prints, of at most two lines."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit_:
        main(args)
    assert exit_.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    message = "\n".join(lines[next(i for i, line in enumerate(lines) if line.startswith("error: ")) :])
    assert message.count("\n") <= 1
    return message


class StopBehind(Callback):
    """Ends a run behind an epoch (0 is the first), as though it were not its end."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch == self.epoch


def weights(module: torch.nn.Module) -> list[Tensor]:
    """All that a module holds now."""
    return [tensor.clone() for tensor in module.state_dict().values()]


def same(one: Iterable[Tensor], other: Iterable[Tensor]) -> bool:
    """Return whether they are equal to the bit."""
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
