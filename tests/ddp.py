"""Runs a method in processes of its own: on one device, or on two with half the batch each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer


def run_both(config: Path, backbone: str, folder: Path) -> list[dict[str, Any]]:
    """The trained weights and the metrics of both runs: one device, then two."""
    return [run(config, backbone, folder, devices) for devices in (1, 2)]


def run(
    config: Path, backbone: str, folder: Path, devices: int, trainer: dict[str, Any] | None = None, **changed: Any
) -> dict[str, Any]:
    """The trained weights and the metrics of a run in processes of its own, with these of the method's settings.

    The trainer's settings may name callbacks of lit_spu.
    """
    out = folder / f"{devices}.pt"
    settings = {
        "config": str(config),
        "method": {"backbone": backbone, "dropout": 0.0, **changed},
        "devices": devices,
        "trainer": trainer or {},
        "out": str(out),
        "cache": str(folder),
    }
    command = [sys.executable, "-m", "tests.ddp", json.dumps(settings)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    root = Path(__file__).parents[1]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    result: dict[str, Any] = torch.load(out)
    return result


def quiet_trainer(**settings: Any) -> Trainer:
    """A trainer on the CPU that writes and shows nothing, unless it is told otherwise.

    It logs every step, so that callbacks of tests can read the values.
    """
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 1,
    }
    return Trainer(**quiet | settings)


def main(settings: dict[str, Any]) -> None:
    """Train and validate; rank zero saves what came out."""
    from lightning.pytorch import seed_everything

    import lit_spu
    from lit_spu.data.glue import GLUE
    from lit_spu.study.grid import build

    devices = settings["devices"]
    seed_everything(0)
    method: Any = build(Path(settings["config"]), **settings["method"])  # without dropout
    method.check_every = 1  # of those that check that ranks are equal
    data = GLUE(batch_size=8 // devices, limit_train=40, limit_validation=21, cache=settings["cache"])
    own = {"strategy": "ddp", **settings["trainer"]}
    own["callbacks"] = [getattr(lit_spu, name)() for name in own.get("callbacks", ())]
    trainer = quiet_trainer(devices=devices, max_epochs=2, **own if devices > 1 else own | {"strategy": "auto"})
    trainer.fit(method, data)
    (metrics, *_) = trainer.validate(method, data, verbose=False)
    if trainer.is_global_zero:
        torch.save({"weights": method.state_dict(), "metrics": metrics}, settings["out"])


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
