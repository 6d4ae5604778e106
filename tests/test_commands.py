"""The subcommands estimate and compare, from their command lines."""

from __future__ import annotations

from inspect import signature
from pathlib import Path

import pytest

from lit_spu.__main__ import main
from lit_spu.cli.commands import FUNCTIONS
from lit_spu.study.grid import PACKAGED_CONFIGS, method_configs

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture(autouse=True)
def _work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run_refused(args: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as exit_:
        main(args.format(configs=CONFIGS).split())
    assert exit_.value.code == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    assert len(message.splitlines()) <= 2
    return message


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        ("estimate --configs none/*.yaml", ["configs", "'none/*.yaml'", "matches no file"]),
        ("estimate --configs=*.yaml", ["'*.yaml' matches no file"]),
        ("estimate --configs=[]", ["--configs: []", "at least 1"]),
        ("estimate --batch 3", ["--batch", "Did you mean --batch_size?"]),
        ("estimate --batch_size 0 --configs {configs}/lst.yaml", ["--batch_size: 0", "from 1 to"]),
        ("estimate --batch_size many", ["--batch_size: 'many'", "a whole number"]),
        ("estimate --configs {configs}/lst.yaml --backbone mini-brt", ["mini-brt", "Did you mean mini-bert?"]),
        ("estimate --config {configs}/lst.yaml", ["lst.yaml", "--configs"]),
        ("estimate --configs {configs}/lst.yaml --budget=-1", ["--budget: -1", "a number from"]),
        (
            'estimate --configs {configs}/lst.yaml --settings={{"redution":4}}',
            ["'redution'", "Did you mean reduction?"],
        ),
        ("estimate --configs {configs}/lst.yaml --length 500", ["length=500", "160"]),
        ("estimate --configs {configs}/lst.yaml --task sst", ["'sst'", "Did you mean sst5?"]),
        ("compare", ["configs"]),
        ("compare --config nowhere.yaml", ["nowhere.yaml", "does not exist"]),
        ("compare --configs {configs}/lst.yaml", ["reference", "'full'", "lst"]),
        ("compare --configs {configs}/full.yaml --seeds one", ["--seeds", "one"]),
        ("compare --configs {configs}/full.yaml --jobs 0", ["--jobs: 0", "from 1 to"]),
        ("compare --configs {configs}/full.yaml --sed 1", ["--sed", "Did you mean --seeds?"]),
    ],
)
def test_errors_are_explained_in_two_lines(args: str, parts: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    message = run_refused(args, capsys)
    for part in parts:
        assert part in message


@pytest.mark.slow
def test_estimates_are_printed_as_they_come(capsys: pytest.CaptureFixture[str]) -> None:
    main(f"estimate --configs {CONFIGS}/full.yaml,{CONFIGS}/head.yaml --length 16 --budget 0.02".split())
    printed = capsys.readouterr()
    assert "1.10M" in printed.out
    assert printed.err.splitlines() == ["estimating full (1 of 2)", "estimating head (2 of 2)"]
    rows = [line.split() for line in printed.out.splitlines() if "M " in line]
    largest = {row[0]: int(row[-1].replace(",", "")) for row in rows}
    assert largest["head"] > largest["full"] > 1
    assert all(len(line) <= 80 for line in printed.out.splitlines()[1:])


def test_a_method_without_an_estimate_has_a_row(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lit_spu.methods.full.FullFineTuning.loss", lambda self, batch: 1 / 0)
    main(f"estimate --configs {CONFIGS}/full.yaml,{CONFIGS}/head.yaml --length 16".split())
    rows = capsys.readouterr().out.splitlines()
    assert rows[2] == "full  no estimate: ZeroDivisionError: division by zero"
    assert rows[3].startswith("head")


def test_the_packaged_configs_are_those_of_the_checkout() -> None:
    """They are found from any directory: this test runs in an empty one."""
    assert method_configs(PACKAGED_CONFIGS).keys() == method_configs([f"{CONFIGS}/*.yaml"]).keys()
    assert signature(FUNCTIONS["estimate"]).parameters["configs"].default == PACKAGED_CONFIGS


def test_dry_run_lists_the_runs_of_a_study(capsys: pytest.CaptureFixture[str]) -> None:
    main(f"compare --configs={CONFIGS}/full.yaml,{CONFIGS}/lst.yaml --seeds 1,2 --dry_run".split())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 2 * 2
    assert all(line.startswith(("lit-spu fit", "lit-spu validate")) for line in lines)
    assert list(Path().iterdir()) == []


def test_the_shipped_studies_are_valid(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(CONFIGS.parent)
    for study in (CONFIGS / "compare").glob("*.yaml"):
        main(["compare", f"--config={study}", "--dry_run"])
        runs = capsys.readouterr().out
        assert runs
        main(["compare", "--flags+=--data.source=folder", f"--config={study}", "--dry_run"])  # flags may stand first
        assert capsys.readouterr().out.count("--data.source=folder") == len(runs.splitlines())
        if study.stem == "quick":
            assert all(f"/{name}.yaml" in runs for name in method_configs([f"{CONFIGS}/*.yaml"]))
