"""Files that are data run no code: what a checkpoint, an export or a run directory names is not imported."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import lit_spu
from lit_spu.__main__ import main
from lit_spu.checkpoints import trained_weights
from lit_spu.errors import UserError
from tests.runs import refusal

pytestmark = [
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:This run is resumed with"),
]

EVIL = """from pathlib import Path
from lightning.pytorch import Callback
Path("ran").touch()
class Evil(Callback):
    pass
class HeadOnly:
    pass
def evil(*args, **kwargs):
    return Evil()
"""
CLASS = {"class_path": "evil_module.Evil", "init_args": {}}
TAMPERED = {
    "callback": {"callbacks": [CLASS]},
    "one": {"callbacks": CLASS},
    "text": {"callbacks": r'{"class_path": "\u0065vil_module.Evil"}'},
    "file": {"callbacks": "evil.json"},
    "logger": {"logger": CLASS},
    "plugins": {"plugins": [CLASS]},
    "strategy": {"strategy": CLASS},
    "profiler": {"profiler": CLASS},
    "function": {
        "callbacks": {
            "class_path": "lightning.pytorch.callbacks.LambdaCallback",
            "init_args": {"on_fit_start": "evil_module.evil"},
        }
    },
    "standard library": {
        "callbacks": {
            "class_path": "lightning.pytorch.callbacks.LambdaCallback",
            "init_args": {"on_fit_start": "os.abort"},
        }
    },
}


@pytest.fixture(scope="module")
def trained(tiny: Callable[[str], str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run and its export."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "evil_module.py").write_text(EVIL)
    (folder / "evil.json").write_text('{"class_path": "evil_module.Evil"}')
    small = ["--data.cache=cache", "--data.limit_train=16", "--data.limit_validation=8", "--trainer.callbacks=null"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        model = ["--model=HeadOnly", f"--model.backbone={tiny('bert')}"]
        main(["fit", *model, *small, "--trainer.max_epochs=1", "--run_dir=run"])
        main(["export", "--ckpt_path=run", "--format=safetensors", "--output=export"])
    return folder


@pytest.fixture
def work(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of that folder, which is the working directory and on the path of modules."""
    copy = shutil.copytree(trained, tmp_path / "work")
    monkeypatch.chdir(copy)
    monkeypatch.syspath_prepend(copy)
    monkeypatch.delitem(sys.modules, "evil_module", raising=False)
    return copy


def refused(args: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return the error of a refused command line, which has run no code of the files."""
    message = refusal(args, capsys)
    assert not Path("ran").exists()
    return message


@pytest.mark.parametrize("kind", TAMPERED)
def test_what_a_run_directory_names_is_not_imported(kind: str, work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    config["trainer"] |= TAMPERED[kind]
    Path("run/config.yaml").write_text(yaml.safe_dump(config))
    message = refused(["fit", "--ckpt_path=run", "--trainer.max_epochs=2"], capsys)
    assert "os.abort" in message if kind == "standard library" else "evil" in message


@pytest.mark.parametrize("key", ["_class_path", "_instantiator", "method"])
@pytest.mark.parametrize("subcommand", ["validate", "fit"])
def test_what_a_checkpoint_names_is_not_imported(
    key: str, subcommand: str, work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("best", "last"):
        file = Path("run", "checkpoints", f"{name}.ckpt")
        checkpoint = torch.load(file, weights_only=True)
        place = checkpoint if key == "method" else checkpoint["hyper_parameters"]
        place[key] = "evil_module.HeadOnly"
        if key == "method":
            del checkpoint["hyper_parameters"]["_class_path"]
        torch.save(checkpoint, file)
    if key == "_instantiator":  # never read
        main([subcommand, "--ckpt_path=run", "--run_dir=other"])
        lit_spu.load("run")
    else:
        assert "evil_module" in refused([subcommand, "--ckpt_path=run"], capsys)
        with pytest.raises(UserError, match=r"evil_module\.HeadOnly"):
            lit_spu.load("run")
    assert not Path("ran").exists()


def test_what_an_export_names_is_not_imported(work: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = Path("export", trained_weights.WEIGHTS)
    checkpoint: dict[str, Any] = trained_weights.read_weights(file)
    checkpoint["method"] = checkpoint["hyper_parameters"]["_class_path"] = "evil_module.HeadOnly"
    trained_weights.write_weights(checkpoint, file)
    Path("export", "SHA256SUMS").unlink()
    assert "evil_module" in refused(["validate", "--ckpt_path=export"], capsys)
    with pytest.raises(UserError, match="evil_module"):
        lit_spu.load("export")
    assert not Path("ran").exists()


def test_what_the_user_names_is_imported(work: Path) -> None:
    shutil.copy("evil_module.py", "own_module.py")
    config = yaml.safe_load(Path("run/config.yaml").read_text())
    config["trainer"]["callbacks"] = [{"class_path": "own_module.Evil"}]
    Path("run/config.yaml").write_text(yaml.safe_dump(config))
    main(["fit", "--config=run/config.yaml", "--ckpt_path=run", "--trainer.max_epochs=2"])
    assert Path("ran").exists()
