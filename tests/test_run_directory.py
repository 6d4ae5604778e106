"""A launch changes nothing in its run directory before its first step, and one process at a time writes there."""

from __future__ import annotations

import hashlib
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from lit_spu.__main__ import main
from lit_spu.checkpoints import run_dir, trained_weights
from lit_spu.errors import UserError
from lit_spu.files import lock_folder

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches")


class Stop(Callback):
    """Ctrl-C after a number of steps, or a failure before a step."""

    armed = True

    def __init__(self, after: int = -1, before: int = -1) -> None:
        self.after, self.before = after, before

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.after and Stop.armed:
            raise KeyboardInterrupt

    def on_before_optimizer_step(self, trainer: Any, *args: Any) -> None:
        if trainer.global_step == self.before and Stop.armed:
            raise RuntimeError("does not fit")


@pytest.fixture
def given(tiny: Callable[[str], str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Flags of a run of two epochs of four steps, on a file of texts in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Stop, "armed", True)
    (tmp_path / "data").mkdir()
    (tmp_path / "task.yaml").write_text("name: own\nfields: [text]\nlabels: [bad, good]\n")
    write_texts(tmp_path / "data/train.tsv", 32)
    write_texts(tmp_path / "data/dev.tsv", 16)
    return [
        "--model=LadderSideTuning",
        f"--model.backbone={tiny('bert')}",
        "--model.reduction=2",
        "--data.task=task.yaml",
        "--data.source=data",
        "--data.cache=cache",
        "--data.batch_size=8",
        "--trainer.max_epochs=2",
        "--trainer.callbacks=[]",
        "--trainer.enable_progress_bar=false",
    ]


def write_texts(file: Path, count: int) -> None:
    lines = (
        f"the film was {'great' if i % 2 else 'dull'} {'. ' * (i % 5)}\t{'good' if i % 2 else 'bad'}"
        for i in range(count)
    )
    file.write_text("\n".join(["text\tlabel", *lines, ""]))


def interrupt(args: list[str], code: int = 130) -> None:
    """Run a command line that ends early, and restore the handler that Lightning replaces."""
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit) as exit_:
        main(args)
    signal.signal(signal.SIGINT, handler)
    assert exit_.value.code == code


def fails(args: list[str]) -> bool:
    """Return whether a command line is refused, or fails."""
    try:
        main(args)
    except SystemExit as error:
        return error.code == 2
    except Exception:
        return True
    return False


def contents(folder: Path) -> dict[str, str]:
    """Return a digest of every file below a folder, by its path."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def assert_same_weights(one: Path, other: Path) -> None:
    for name in ("best", "last"):
        first, second = (trained_weights.read_checkpoint(run / f"checkpoints/{name}.ckpt") for run in (one, other))
        assert first["global_step"] == second["global_step"]
        assert first["state_dict"].keys() == second["state_dict"].keys()
        for weight, value in first["state_dict"].items():
            assert torch.equal(value, second["state_dict"][weight]), weight


STOP = "--trainer.callbacks+=tests.test_run_directory.Stop"


@pytest.mark.slow
def test_a_refused_or_failed_resume_changes_nothing(given: list[str], tmp_path: Path) -> None:
    main(["fit", *given, "--run_dir=whole"])
    run, texts = tmp_path / "run", (tmp_path / "data/train.tsv").read_bytes()
    interrupt(["fit", *given, "--run_dir=run", STOP, "--trainer.callbacks.after=5"])
    Stop.armed = False
    before = contents(run)
    assert {"config.yaml", "launches.jsonl", "metrics.csv", "summary.json", "checkpoints/last.ckpt"} <= before.keys()

    for flags in (
        ["--data.batch_size=16"],
        ["--data.limit_train=16"],
        ["--model.lr=1"],
        ["--model=HeadOnly"],
        ["--trainer.max_epochs=nonsense"],
        ["--trainer.val_check_interval=1000"],
        ["--trainer.accelerator=nonsense"],
    ):
        assert fails(["fit", "--ckpt_path=run", *flags]), flags
        assert contents(run) == before, flags

    write_texts(tmp_path / "data/train.tsv", 24)
    assert fails(["fit", "--ckpt_path=run"])
    (tmp_path / "data/train.tsv").unlink()
    assert fails(["fit", "--ckpt_path=run"])
    (tmp_path / "data/train.tsv").write_bytes(texts)
    assert contents(run) == before

    Stop.armed = True
    with pytest.raises(RuntimeError, match="does not fit"):  # after the restore, in the first step
        main(["fit", "--ckpt_path=run", STOP, "--trainer.callbacks.before=5"])
    assert contents(run) == before
    Stop.armed = False

    last = run / "checkpoints/last.ckpt"
    good = last.read_bytes()
    checkpoint = trained_weights.read_checkpoint(last)
    checkpoint["optimizer_states"][0]["param_groups"] = []
    trained_weights.write_checkpoint(checkpoint, last)
    tampered = contents(run)
    assert fails(["fit", "--ckpt_path=run"])
    assert contents(run) == tampered
    last.write_bytes(good)

    main(["fit", "--ckpt_path=run", "--run_dir=run"])  # the same place, said twice
    assert_same_weights(run, tmp_path / "whole")
    finished = contents(run)
    main(["fit", "--ckpt_path=run"])  # nothing is left to do
    assert contents(run) == finished


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["before=0"], ["before=2"]], ids=str)
def test_a_run_without_a_checkpoint_can_be_run_again(
    flags: list[str], given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["fit", *given, "--run_dir=run", STOP, *(f"--trainer.callbacks.{flag}" for flag in flags)]

    with pytest.MonkeyPatch.context() as patch:  # as a kill: nobody saves
        patch.setattr("lit_spu.callbacks.last_checkpoint.LastCheckpoint.on_exception", lambda *_: None)
        with pytest.raises(RuntimeError, match="does not fit"):
            main(command)
    assert not list(tmp_path.glob("run/checkpoints/*.ckpt"))
    assert (tmp_path / "run").exists() == (flags == ["before=2"])
    interrupt(["fit", "--ckpt_path=run"], code=2)
    message = capsys.readouterr().err
    if flags == ["before=2"]:
        assert "stopped before its first checkpoint. Run it again: lit-spu fit --config run/config.yaml" in message
    Stop.armed = False
    main(command)
    main(["fit", *given, "--run_dir=whole"])
    assert_same_weights(tmp_path / "run", tmp_path / "whole")
    interrupt(command, code=2)
    assert "already holds a run" in capsys.readouterr().err


def test_a_folder_is_locked_until_its_process_ends(tmp_path: Path) -> None:
    folder = tmp_path / "runs" / "one"
    code = f"""
import os, sys, time
from pathlib import Path
from lit_spu.files import lock_folder
with lock_folder(Path({str(folder)!r}), "--run_dir"):
    (Path({str(folder)!r}) / "file").touch()
    if os.fork() == 0:  # a worker that outlives its parent
        print(flush=True)  # it has dropped the lock by now
        time.sleep(15)
        os._exit(0)
    sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        process.stdout.readline()
        with pytest.raises(UserError, match=r"another process is writing into .*one"), lock_folder(folder, "--run_dir"):
            pass
        process.kill()
    with lock_folder(folder, "--run_dir"):
        pass
    assert [path.name for path in folder.iterdir()] == ["file"]


def test_a_forked_process_leaves_a_locked_folder_without_error(tmp_path: Path) -> None:
    code = f"""
import os
from pathlib import Path
from lit_spu.files import lock_folder
folder = Path({str(tmp_path / "run")!r})
with lock_folder(folder, "--run_dir"):
    child = os.fork()
    if child:
        status = os.waitpid(child, 0)[1]
        assert status == 0 and folder.is_dir()
if child:
    assert not folder.exists()
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_launch_is_described_without_git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run_dir.describe_launch(["fit"])["git"] is None


def test_a_folder_is_usable_where_there_are_no_locks(tmp_path: Path) -> None:
    """Windows has neither the module of locks nor forks."""
    code = f"""
import errno, hashlib, os, pathlib, re, shutil, sys, uuid
sys.modules["fcntl"], sys.platform = None, "win32"
del os.register_at_fork
from lit_spu.files import lock_folder, write_text
folder = pathlib.Path({str(tmp_path / "run")!r})
with lock_folder(folder, "--run_dir"):
    write_text(folder / "file", "text")
"""
    subprocess.run([sys.executable, "-c", code], check=True)
    assert (tmp_path / "run" / "file").read_text() == "text"


def test_a_locked_folder_that_stays_empty_is_removed(tmp_path: Path) -> None:
    with lock_folder(tmp_path / "runs" / "a" / "b", "--run_dir"):
        assert (tmp_path / "runs" / "a" / "b").is_dir()
    assert not list(tmp_path.iterdir())


def test_two_runs_in_one_directory_are_refused(
    given: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with lock_folder(tmp_path / "run", "--run_dir"):
        for command in ("fit", "validate"):
            interrupt([command, *given, "--run_dir=run"], code=2)
            assert "error: --run_dir: another process is writing into run." in capsys.readouterr().err
        assert not list((tmp_path / "run").iterdir())


@pytest.mark.slow
def test_a_fast_dev_run_leaves_nothing(given: list[str], tmp_path: Path) -> None:
    before = contents(tmp_path)
    main(["fit", *given, "--run_dir=run", "--trainer.fast_dev_run=true"])
    assert {name for name in contents(tmp_path) if not name.startswith("cache")} == set(before)


@pytest.mark.slow
def test_places_that_cannot_be_written_are_refused_before_a_model_is_loaded(
    given: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lit_spu.methods.base.load_backbone", lambda *_: pytest.fail("a model was loaded"))
    (tmp_path / "file").touch()
    for args, flag in (
        (["fit", *given, "--run_dir=file/run"], "--run_dir"),
        (["predict", *given, "--output=file/predictions.jsonl"], "--output"),
        (["predict", *given, "--output=data"], "--output"),
        (["export", "--ckpt_path=absent", "--output=file/out"], "--output"),
        (["replay", "--trajectory=absent", "--output=file/out"], "--output"),
    ):
        interrupt(args, code=2)
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith(f"error: {flag}: ")
