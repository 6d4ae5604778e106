"""The Python interface: exported names and their types, ten lines that train, and loading."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.cli import LightningArgumentParser

import lit_spu
from lit_spu import GLUE
from lit_spu.errors import UserError
from lit_spu.public import public_classes
from tools import write_stub

CHECKOUT = Path(__file__).parents[1]


def test_exported_names_are_the_classes_themselves() -> None:
    from lit_spu import FullFineTuning, KLadder, Memory
    from lit_spu.callbacks.memory import Memory as memory
    from lit_spu.data.glue import GLUE as glue
    from lit_spu.methods.full import FullFineTuning as full
    from lit_spu.methods.kladder import KLadder as kladder

    assert (GLUE, FullFineTuning, KLadder, Memory) == (glue, full, kladder, memory)


def test_every_public_name_is_found_and_unique() -> None:
    names = [cls.__name__ for cls in public_classes()]
    assert {"GLUE", "KLadder", "Memory"} < set(names)
    assert len(names) == len(set(names))
    assert set(names) < set(dir(lit_spu))
    for cls in public_classes():
        assert getattr(lit_spu, cls.__name__) is cls


def test_only_concrete_methods_callbacks_and_glue_are_public() -> None:
    from lit_spu.methods.base import Method

    for cls in public_classes():
        assert issubclass(cls, Method | Callback | GLUE)
        assert not inspect.isabstract(cls)


@pytest.mark.parametrize(
    ("name", "message"), [("Kladdr", r"'Kladdr'. Did you mean KLadder\?"), ("kladder_", "kladder")]
)
def test_a_mistyped_name_is_explained(name: str, message: str) -> None:
    with pytest.raises(AttributeError, match=message):
        getattr(lit_spu, name)
    with pytest.raises(ImportError, match="Lader"):
        from lit_spu import Lader  # type: ignore[attr-defined]  # noqa: F401


def test_the_stub_is_up_to_date_and_shipped() -> None:
    assert write_stub.STUB.read_text() == write_stub.write_stub(), "run `make stub`"
    tool = tomllib.loads((CHECKOUT / "pyproject.toml").read_text())["tool"]
    assert {"__init__.pyi", "py.typed"} <= set(tool["setuptools"]["package-data"]["lit_spu"])


@pytest.mark.parametrize("cls", [cls for cls in public_classes() if write_stub.has_hidden_settings(cls)])
def test_the_stub_has_the_settings_of_the_command_line(cls: type) -> None:
    parser = LightningArgumentParser()
    expected = parser.add_class_arguments(cls)
    assert [argument.partition(":")[0] for argument in write_stub.arguments(cls) if argument != "*"] == expected


TYPED = """from lit_spu import GLUE, KLadder, LinearReadOut, Memory, load
from lit_spu.methods.base import Method

method: Method = KLadder(2, fusion="additive", reduction=4, lr=1e-3, backbone="mini-t5")
ladder: LinearReadOut = KLadder(k=3)
loaded: Method = load("runs")
data, memory = GLUE(task="rte"), Memory(live=False)
"""
"""Uses of the interface that mypy accepts."""

MISTYPED = """
KLadder(kk=3)  # error: Unexpected keyword argument "kk"
KLadder(k="3")  # error: Argument "k" to "KLadder" has incompatible type "str"
KLadder(fusion="gate")  # error: Argument "fusion" to "KLadder" has incompatible type
KLadder(lr="high")  # error: Argument "lr" to "KLadder" has incompatible type "str"
Memory(alive=False)  # error: Unexpected keyword argument "alive"
load(1)  # error: Argument 1 to "load" has incompatible type "int"
reveal_type(KLadder)  # note: Revealed type is "def (k: int =
"""
"""Uses that mypy reports, each with the beginning of the report."""


@pytest.mark.slow
def test_mypy_checks_the_settings_of_methods(tmp_path: Path) -> None:
    file = tmp_path / "uses.py"
    file.write_text(TYPED + MISTYPED)
    command = [sys.executable, "-m", "mypy", "--strict", str(file)]
    environment = {**os.environ, "MYPYPATH": str(CHECKOUT)}
    done = subprocess.run(command, cwd=CHECKOUT, env=environment, capture_output=True, text=True, check=False)
    # without the path, which mypy may take from its cache
    found = [line.partition("uses.py:")[2] for line in done.stdout.splitlines()]
    reports = [line for line in found if line and "defined in" not in line]
    first = len(TYPED.splitlines()) + 2
    expected = [line.partition("  # ")[2] for line in MISTYPED.splitlines()[1:]]
    assert len(reports) == len(expected), done.stdout
    for number, (report, text) in enumerate(zip(reports, expected, strict=True), start=first):
        assert report.startswith(f"{number}: {text}")


@pytest.mark.filterwarnings("ignore:The number of training batches")  # a run of two steps
def test_ten_lines_train(tiny: Callable[[str], str], tmp_path: Path) -> None:
    from lit_spu import KLadder

    method = KLadder(backbone=tiny("bert"), reduction=2, k=1, lr=0.01)
    before = {name: weight.clone() for name, weight in method.state_dict().items()}
    data = GLUE(task="sst2", limit_train=64, limit_validation=16, cache=str(tmp_path / "cache"))
    trainer = Trainer(
        max_epochs=1, default_root_dir=tmp_path, logger=False, enable_progress_bar=False, accelerator="cpu"
    )
    trainer.fit(method, data)
    assert trainer.global_step == 2
    assert 0 <= trainer.callback_metrics["val/accuracy"] <= 1
    changed = {name for name, weight in method.state_dict().items() if not torch.equal(weight, before[name])}
    assert changed
    assert changed <= {name for name, weight in method.named_parameters() if weight.requires_grad}

    # the checkpoint holds the trained weights
    (file,) = (tmp_path / "checkpoints").glob("*.ckpt")
    again = KLadder.load_from_checkpoint(file, weights_only=True)
    unread = {f"backbone.model.{path}" for path in ("bert.pooler.dense", "classifier")}  # the backbone's own new head
    for name, weight in method.state_dict().items():
        if name.rpartition(".")[0] not in unread:
            torch.testing.assert_close(again.state_dict()[name], weight, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_load_returns_the_best_checkpoint_in_evaluation_mode(tiny: Callable[[str], str], tmp_path: Path) -> None:
    from lit_spu.__main__ import main

    run = tmp_path / "run"
    flags = [
        "--data.limit_train=64",
        "--data.limit_validation=16",
        f"--data.cache={tmp_path}/cache",
        f"--run_dir={run}",
    ]
    main(["fit", "--model=KLadder", f"--model.backbone={tiny('bert')}", "--model.reduction=2", *flags])
    method = lit_spu.load(run)
    assert type(method) is lit_spu.KLadder
    assert not method.training
    best = torch.load(run / "checkpoints" / "best.ckpt", weights_only=True)["state_dict"]
    assert best
    for name, weight in best.items():
        torch.testing.assert_close(method.state_dict()[name], weight, rtol=0, atol=0)


def test_loading_another_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="absent"):
        lit_spu.load(tmp_path / "absent")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match="not the checkpoint of a method"):
        lit_spu.load(tmp_path / "other.ckpt")
