"""Studies under docs/studies stay readable: the commands in their pages find the recorded runs."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_spu.__main__ import main
from lit_spu.study.grid import Study
from lit_spu.study.old_names import RENAMED, rename, use_present_names
from lit_spu.study.results import read_records

ROOT = Path(__file__).parents[2]
STUDIES = ROOT / "docs" / "studies"

RECORDED = {
    "distill": 12,
    "kshot/before": 5,
    "kshot/k16": 13,
    "kshot/k512": 13,
    "kshot/noise": 10,  # without the noise `table`, which is removed
    "kshot/other-tasks": 39,
    "kshot/t5": 13,
    "ladders": 120,
    "minilm": 120,
    "minilm-h200": 62,
    "rte-mrpc": 60,
    "score": 399,
    "score-smollm2": 12,
    "updates": 96,
}
"""Runs of each study that its command finds."""


def read_commands() -> dict[str, list[str]]:
    """Return the arguments of `lit-spu compare` in the studies' pages, by the study's directory."""
    commands = {}
    for page in STUDIES.glob("*/README.md"):
        for line in page.read_text().replace("\\\n", "").splitlines():
            if line.startswith("lit-spu compare "):
                words = shlex.split(line)
                study = words[words.index("--out") + 1].removeprefix("docs/studies/")
                commands[study] = words[2:]
    # the first split of k16 with an earlier version of the model
    commands["kshot/before"] = [word.replace("minilm-mlm-further", "minilm-mlm") for word in commands["kshot/k16"]]
    return commands


def make_study(arguments: Sequence[str]) -> Study:
    settings: dict[str, Any] = yaml.safe_load((ROOT / arguments[arguments.index("--config") + 1]).read_text())
    settings.pop("jobs", None)
    for name in ("backbones", "tasks"):
        if f"--{name}" in arguments:
            given = yaml.safe_load(arguments[arguments.index(f"--{name}") + 1])
            settings[name] = given if isinstance(given, list) else [given]
    added = [word.removeprefix("--flags+=") for word in arguments if word.startswith("--flags+=")]
    return Study(**settings | {"flags": [*settings.get("flags", []), *added]})


def test_every_study_is_checked() -> None:
    folders = {str(path.parent.relative_to(STUDIES)) for path in STUDIES.rglob("results.json")}
    assert folders == set(RECORDED) == set(read_commands())


@pytest.mark.parametrize("study", RECORDED)
def test_a_study_finds_its_records(study: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    records = read_records(STUDIES / study).records
    cells = make_study(read_commands()[study]).cells()
    found = {cell: records[cell.command] for cell in cells if cell.command in records}
    assert len(found) >= RECORDED[study]
    for cell, record in found.items():
        assert (record["row"], record["task"], record["seed"]) == (cell.row, cell.task, cell.seed)


def test_a_dry_run_lists_the_recorded_commands(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    main(["compare", *read_commands()["ladders"], "--dry_run"])
    listed = set(capsys.readouterr().out.splitlines())
    assert len(listed & read_records(STUDIES / "ladders").records.keys()) == RECORDED["ladders"]


@pytest.mark.parametrize("study", RECORDED)
def test_records_have_present_names_only(study: str) -> None:
    settings = {old.partition(".")[2] for old in RENAMED if old.startswith("model.")}
    for record in read_records(STUDIES / study).records.values():
        assert not {f"config.model.init_args.{name}" for name in settings} & record.keys()
        assert not re.search(rf"--model\.(init_args\.)?({'|'.join(settings)})=", record["command"])
        assert "lit_spu.policies." not in json.dumps(record)
        assert "config.model.init_args.gradient_checkpointing" in record


@pytest.mark.parametrize(
    ("old", "present"),
    [
        ("lit-spu fit --model.start=svd --model.lr=1", "lit-spu fit --model.init=svd --model.lr=1"),
        ("--model.init_args.tap_cache=taps", "--model.init_args.activation_cache=taps"),
        ("config.model.init_args.states_weight", "config.model.init_args.hidden_states_weight"),
        ("policy=lit_spu.policies.Random", "policy=lit_spu.callbacks.policies.Random"),
        ("--model.start_at=1 --trainer.callbacks.start=2 --data.source=/model.start", None),
        ("--model.init=svd --trainer.callbacks.policy=lit_spu.callbacks.policies.Random", None),
    ],
)
def test_names_are_replaced_and_others_are_not(old: str, present: str | None) -> None:
    assert rename(old) == (present or old)


@pytest.mark.parametrize("folder", ["configs/", "/opt/lit_spu/configs/", ""])
def test_an_older_k_ladder_is_lst_with_windows(folder: str) -> None:
    old = {
        "command": f"lit-spu fit --config={folder}kladder.yaml --model.reduction=8",
        "config.model.class_path": "lit_spu.methods.kladder.KLadder",
    }
    assert use_present_names(old)["command"] == f"lit-spu fit --config={folder}lst.yaml --model.k=1 --model.reduction=8"
    present = old | {"config.model.init_args.blocks": "upper"}
    assert use_present_names(present) == present
