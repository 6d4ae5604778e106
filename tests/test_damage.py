"""Damaged, incomplete and foreign files are noticed on reading, and reported in a line."""

from __future__ import annotations

import json
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import lit_spu
from lit_spu.backbones import load_backbone
from lit_spu.checkpoints import run_dir, trained_weights
from lit_spu.cli.resume import open_checkpoint
from lit_spu.errors import UserError
from lit_spu.export import writers
from lit_spu.files import CHECKSUMS, write_checksums
from lit_spu.methods.head import HeadOnly
from lit_spu.methods.lora import LoRA
from lit_spu.optim.noise import VERSION
from lit_spu.optim.trajectory import Trajectory
from lit_spu.tasks import TASKS

Tiny = Callable[[str], str]


@pytest.fixture
def checkpoint(tiny: Tiny, tmp_path: Path) -> Path:
    file = tmp_path / "last.ckpt"
    trained_weights.write_checkpoint(HeadOnly(backbone=tiny("bert")).checkpoint_dict(), file)
    return file


def flip(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 4
    file.write_bytes(data)


def test_a_whole_checkpoint_is_read(checkpoint: Path) -> None:
    method = lit_spu.load(checkpoint)
    stored = trained_weights.read_checkpoint(checkpoint)["state_dict"]
    assert stored
    for name, value in stored.items():
        assert torch.equal(method.state_dict()[name], value)


def test_flipped_bits_of_a_checkpoint_are_noticed(checkpoint: Path) -> None:
    """A flipped bit is refused, or lies in padding and changes nothing."""
    before, whole = checkpoint.read_bytes(), trained_weights.read_checkpoint(checkpoint)
    draw, noticed, trials = random.Random(0), 0, 200
    for _ in range(trials):
        flip(checkpoint, draw.randrange(len(before)))
        try:
            read = trained_weights.read_checkpoint(checkpoint)
        except UserError:
            noticed += 1
        else:
            assert read["hyper_parameters"] == whole["hyper_parameters"]
            assert all(torch.equal(read["state_dict"][name], value) for name, value in whole["state_dict"].items())
        checkpoint.write_bytes(before)
    assert noticed > trials / 2


def foreign_zip(file: Path) -> None:
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("data.txt", "text")


FOREIGN: dict[str, Callable[[Path], Any]] = {
    "empty": lambda file: file.write_bytes(b""),
    "half": lambda file: file.write_bytes(file.read_bytes()[: file.stat().st_size // 2]),
    "without its end": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "text": lambda file: file.write_text("model: LoRA\n"),
    "zip": foreign_zip,
    "tensor": lambda file: torch.save(torch.zeros(3), file),
    "list": lambda file: torch.save([1, 2], file),
    "weights of another project": lambda file: torch.save({"weight": torch.zeros(3)}, file),
    "no state_dict": lambda file: torch.save({"hyper_parameters": {"task": "sst2"}}, file),
    "no hyper_parameters": lambda file: torch.save({"state_dict": {}}, file),
    "settings of another project": lambda file: torch.save({"state_dict": {}, "hyper_parameters": {"dim": 3}}, file),
    "settings that are none": lambda file: torch.save({"state_dict": {}, "hyper_parameters": None}, file),
    "pickle of a class": lambda file: torch.save({"state_dict": {}, "hyper_parameters": Path("x")}, file),
}


@pytest.mark.parametrize("make", FOREIGN.values(), ids=FOREIGN)
def test_foreign_files_are_refused_in_a_line(make: Callable[[Path], Any], checkpoint: Path, tiny: Tiny) -> None:
    make(checkpoint)
    for read in (run_dir.saved_config, lit_spu.load):
        with pytest.raises(UserError, match=r"last\.ckpt") as error:
            read(checkpoint)
        assert str(error.value).count("\n") == 0
    if "settings" not in str(make):
        with pytest.raises(UserError):
            trained_weights.restore_weights(HeadOnly(backbone=tiny("bert")), checkpoint)


@pytest.mark.parametrize("format", ["safetensors", "peft", "merged"])
def test_damage_of_an_export_is_noticed(format: Any, tiny: Tiny, tmp_path: Path) -> None:
    method, folder = LoRA(backbone=tiny("bert")), tmp_path / "out"
    write: dict[str, Callable[[Any, Path], None]] = {
        "safetensors": writers.write_trained_weights,
        "peft": writers.write_peft,
        "merged": writers.write_merged,
    }
    read: dict[str, Callable[[], Any]] = {
        "safetensors": lambda: lit_spu.load(folder),
        "peft": lambda: LoRA(backbone=tiny("bert"), adapter=str(folder)),
        "merged": lambda: load_backbone(str(folder), TASKS["sst2"]),
    }
    writers.write_folder(folder, method, None, format, lambda whole: write[format](method, whole))
    read[format]()
    (weights,) = folder.glob("*.safetensors")
    before = weights.read_bytes()
    flip(weights, len(before) - 20)
    with pytest.raises(UserError, match="its checksum is not that of"):
        read[format]()
    (folder / CHECKSUMS).unlink()  # as the folder of another tool
    read[format]()
    weights.write_bytes(before)
    write_checksums(folder)
    with (folder / "README.md").open("a") as card:  # people edit it
        card.write("text")
    read[format]()


def test_an_unreadable_summary_counts_as_none(tmp_path: Path) -> None:
    for text in ("", "[]", '{"status": "comp', json.dumps({"status": "failed"})):
        (tmp_path / "summary.json").write_text(text)
        run_dir.check_unused(tmp_path)
    (tmp_path / "summary.json").write_text(json.dumps({"status": "completed"}))
    with pytest.raises(UserError, match="already holds a run"):
        run_dir.check_unused(tmp_path)


HEADER = {
    "version": VERSION,
    "groups": 1,
    "directions": 1,
    "seed": 0,
    "method": "lit_spu.methods.MeZO",
    "noise": "a",
    "initial_fingerprint": "b",
    "dtype": "float32",
    "device": "cpu",
    "device_name": "cpu",
    "torch": "2",
    "backbone": {"name": "mini-bert", "fingerprint": "c"},
    "hyper_parameters": {"task": "sst2"},
}


@pytest.mark.parametrize("name", HEADER)
def test_a_trajectory_whose_header_lacks_an_entry_is_refused(name: str, tmp_path: Path) -> None:
    file = tmp_path / "trajectory.mezo"
    file.write_bytes(json.dumps(HEADER).encode() + b"\n" + bytes(16))
    assert Trajectory.read(file).rows == [[0.0, 0.0]] * 2
    lacks = {key: value for key, value in HEADER.items() if key != name}
    for damaged in ({**HEADER, name: [1]}, *([lacks] if name != "version" else [])):
        file.write_bytes(json.dumps(damaged).encode() + b"\n" + bytes(16))
        with pytest.raises(UserError, match="was not written by a run of MeZO"):
            Trajectory.read(file)


def test_a_trajectory_of_an_older_version_is_refused(tmp_path: Path) -> None:
    """Files of the first version have no entry for it."""
    file = tmp_path / "trajectory.mezo"
    newer = ("version", "dtype", "device_name")
    file.write_bytes(json.dumps({key: value for key, value in HEADER.items() if key not in newer}).encode() + b"\n")
    with pytest.raises(UserError, match=f"has version 1, and this lit_spu replays version {VERSION} alone"):
        lit_spu.replay(file)


@pytest.mark.parametrize(
    "header",
    [
        {},
        {"groups": 1, "directions": 1},
        {"groups": 0, "directions": 0, "method": "a", "hyper_parameters": {"task": "sst2"}},
        {"groups": "1", "directions": 1, "method": "a", "hyper_parameters": {"task": "sst2"}},
        {"groups": 1, "directions": 1, "method": "a", "hyper_parameters": None},
        [1],
    ],
    ids=str,
)
def test_a_damaged_trajectory_is_refused(header: Any, tmp_path: Path) -> None:
    file = tmp_path / "trajectory.mezo"
    file.write_bytes(json.dumps(header).encode() + b"\n" + bytes(16))
    with pytest.raises(UserError, match="was not written by a run of MeZO"):
        lit_spu.replay(file)


def test_an_empty_config_of_a_run_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    checkpoint.rename(tmp_path / "checkpoints" / "last.ckpt")
    (tmp_path / "config.yaml").write_text("{}\n")
    with pytest.raises(UserError, match=r"config\.yaml lacks trainer"):
        open_checkpoint(str(tmp_path), "fit")
