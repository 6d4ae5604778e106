"""Studies with damaged, foreign or missing files: what cannot be read was not run, and is said once."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from lit_spu.__main__ import main
from lit_spu.cli import commands
from lit_spu.errors import UserError
from lit_spu.study import report
from lit_spu.study.compare import RECORD, Outcome, read_outcome
from lit_spu.study.grid import Cell, Study
from lit_spu.study.results import Record, find_unfair_differences, make_record, read_records, rows, write

CONFIGS = Path(__file__).parents[2] / "configs"
CELL = Cell("full", "sst2", "mini-bert", 1, 1.0, ("fit", "--data.task=sst2", "--seed_everything=1"))

SUMMARY = {
    "best_score": 0.75,
    "metrics": {"val/accuracy": 0.75, "val/loss": 0.5},
    "measured": {"params/trainable": 10, "memory/live_peak_mib": 5.0},
    "versions": {"torch": "2"},
    "steps": 2,
    "epochs": 1,
    "wall_seconds": 1.0,
    "device": "cpu",
    "devices": 1,
}
CONFIG = {"data": {"task": "sst2", "limit_validation": 8}, "trainer": {"max_epochs": 1}, "run_dir": "x"}
FILES = {
    "summary.json": json.dumps(SUMMARY),
    "config.yaml": yaml.safe_dump(CONFIG),
    "metrics.csv": "step,val/accuracy\n1,0.5\n2,0.75\n",
    "launches.jsonl": '{"git": "abc"}\n',
}
ODD: tuple[Any, ...] = (None, [], {}, "text", math.nan, math.inf, 10**400, -1, [1, {"a": [2]}], {"b": 1}, True, "../..")
BROKEN = (b"", b"nul", b"null", b"[]", b"5", b"{", b'{"a": ', b"\xff\xfe\x00", b"[" * 100_000, b"a,b\n1\n", b"? [1]: 2")


def write_run(out: Path, cell: Cell = CELL) -> Path:
    """Write the files of a finished cell, and return its run directory."""
    folder = out / "cells" / cell.folder
    run = folder / "run-1"
    run.mkdir(parents=True)
    for name, text in FILES.items():
        (run / name).write_text(text)
    (folder / RECORD).write_text(json.dumps({"args": cell.args, "run": "run-1", "returncode": 0, "seconds": 2.0}))
    return run


def read_or_refuse(out: Path, cell: Cell = CELL) -> Record | None:
    """Return the record of the cell, or None if it counts as not run; every other error fails the test."""
    try:
        outcome = read_outcome(cell, out)
        record = make_record(outcome) if outcome and outcome.done else None
    except UserError as error:
        message = str(error)
    else:
        message = ""
    assert len(message.splitlines()) <= 1
    if not message and record:
        table = rows([record], {})
        find_unfair_differences([record, record | {"row": "other", "steps": 3}])
        assert all(math.isfinite(row.score) and all(map(math.isfinite, row.costs.values())) for row in table)
        write([record], table, out)
        assert read_records(out).records[record["command"]] == json.loads(json.dumps(record)) | {
            "curve": record["curve"]
        }
        assert "full" in report.overviews(table, "full")[0].markdown()
    return None if message else record


def mutations(contents: Any) -> Iterator[Any]:
    """Yield the contents with each key removed, and with each value, at any depth, replaced by odd values."""
    yield from ODD
    for key in contents if isinstance(contents, dict) else ():
        yield {name: value for name, value in contents.items() if name != key}
        for changed in mutations(contents[key]):
            yield contents | {key: changed}


def test_an_untouched_run_is_read(tmp_path: Path) -> None:
    write_run(tmp_path)
    record = read_or_refuse(tmp_path)
    assert record
    assert (record["score"], record["curve"], record["git"]) == (0.75, [(1, 0.5), (2, 0.75)], "abc")


@pytest.mark.parametrize("name", [RECORD, *FILES])
def test_broken_files_of_a_run(name: str, tmp_path: Path) -> None:
    run = write_run(tmp_path)
    file = run.parent / name if name == RECORD else run / name
    whole = file.read_bytes()
    for content in (*BROKEN, whole[: len(whole) // 2], whole[::-1], whole + b"\x00", whole * 2):
        file.write_bytes(content)
        record = read_or_refuse(tmp_path)
        if name in (RECORD, "summary.json") and content in BROKEN:
            assert record is None
    file.unlink()
    read_or_refuse(tmp_path)
    file.mkdir()
    assert read_or_refuse(tmp_path) is None


def test_foreign_values_in_cell_json(tmp_path: Path) -> None:
    file = write_run(tmp_path).parent / RECORD
    for contents in mutations(json.loads(file.read_text())):
        file.write_text(json.dumps(contents))
        read_or_refuse(tmp_path)
    file.write_text(json.dumps({"run": "../../other", "returncode": 0, "seconds": 1.0}))
    assert read_or_refuse(tmp_path) is None


@pytest.mark.slow
def test_foreign_values_in_summary_json(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    for contents in mutations(SUMMARY):
        (run / "summary.json").write_text(json.dumps(contents))
        read_or_refuse(tmp_path)


@pytest.mark.slow
def test_foreign_values_in_config_yaml(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    for contents in mutations(CONFIG):
        text = yaml.safe_dump(contents)
        if str(10**400) not in text:  # a whole number in YAML, and infinite in the results' JSON
            (run / "config.yaml").write_text(text)
            read_or_refuse(tmp_path)
    (run / "config.yaml").write_text("data: {task: sst2, since: 2020-01-01, 5: !!set {a}}")
    assert read_or_refuse(tmp_path)


@pytest.mark.parametrize("score", [math.nan, math.inf, "0.5", True and [0.5]])
def test_a_score_that_is_no_number_was_not_run(score: object, tmp_path: Path) -> None:
    run = write_run(tmp_path)
    (run / "summary.json").write_text(json.dumps(SUMMARY | {"best_score": score}))
    assert read_or_refuse(tmp_path) is None


def test_costs_and_curves_skip_what_is_not_finite(tmp_path: Path) -> None:
    run = write_run(tmp_path)
    (run / "summary.json").write_text(json.dumps(SUMMARY | {"measured": {"memory/live_peak_mib": math.nan}}))
    (run / "metrics.csv").write_text("step,val/accuracy\n1,nan\n2,0.75\n")
    record = read_or_refuse(tmp_path)
    assert record
    assert (record["memory/live_peak_mib"], record["curve"]) == (None, [(2, 0.75)])
    assert "memory/live_peak_mib" not in rows([record], {})[0].costs


def test_damaged_records_of_a_study_are_left_out(tmp_path: Path) -> None:
    write_run(tmp_path)
    record = read_or_refuse(tmp_path)
    assert record
    other = record | {"command": "other"}
    for changed in mutations(record):
        (tmp_path / "results.json").write_text(json.dumps({"runs": [changed, other]}))
        saved = read_records(tmp_path)
        assert "other" in saved.records
        table = rows(list(saved.records.values()), {})
        assert all(math.isfinite(row.score) for row in table)


@pytest.mark.parametrize("content", [*BROKEN, b'{"runs": 5}', b'{"runs": [], "others": 3}', b'{"others": []}'])
def test_a_file_without_results_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_bytes(content)
    with pytest.raises(UserError, match=r"results\.json cannot be read: .* Move"):
        read_records(tmp_path)


def test_a_folder_in_the_place_of_results_is_refused(tmp_path: Path) -> None:
    (tmp_path / "results.json").mkdir()
    with pytest.raises(UserError, match=r"results\.json cannot be read"):
        read_records(tmp_path)


class NoRunner:
    """Runner that runs nothing and remembers what it was given."""

    given: Sequence[Cell] = ()

    def __init__(self, out: Path, jobs: int) -> None:
        pass

    def run(self, cells: Sequence[Cell]) -> Iterator[Outcome]:
        NoRunner.given = cells
        return iter(())


def test_only_missing_and_damaged_cells_run_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """And a damaged cell whose record is in results.json does not."""
    pytest.importorskip("matplotlib")
    study = Study([f"{CONFIGS}/full.yaml"], seeds=[1, 2, 3, 4])
    zero_shot, *cells = study.cells()
    runs = [write_run(tmp_path, cell) for cell in (zero_shot, *cells[:3])]
    (runs[1] / "summary.json").write_text("{")
    (runs[2].parent / RECORD).write_text("")
    monkeypatch.setattr(commands, "Runner", NoRunner)
    arguments = ["compare", f"--configs={CONFIGS}/full.yaml", "--seeds=1,2,3,4", f"--out={tmp_path}"]
    main(arguments)
    assert NoRunner.given == [cells[0], cells[1], cells[3]]
    out = " ".join(capsys.readouterr().out.split())
    assert "2 results count as not run. The first: " in out
    assert out.count("cannot be read") == 1
    (runs[3] / "summary.json").write_text("")
    main(arguments)
    assert NoRunner.given == [cells[0], cells[1], cells[3]]


def test_a_result_that_cannot_be_read_after_its_run_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")

    class Runner(NoRunner):
        def run(self, cells: Sequence[Cell]) -> Iterator[Outcome]:
            for cell in cells:
                run = write_run(tmp_path, cell)
                (run / "summary.json").write_text(json.dumps(SUMMARY | {"best_score": math.nan}))
                yield Outcome(cell, run, 0, 1.0)

    monkeypatch.setattr(commands, "Runner", Runner)
    with pytest.raises(SystemExit) as exit_:
        main(["compare", f"--configs={CONFIGS}/full.yaml", "--seeds=1", f"--out={tmp_path}"])
    assert exit_.value.code == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "the score is nan" in out
    assert "1 runs failed" in out


@pytest.mark.parametrize("out", ["file", "file/below"])
def test_a_file_in_the_place_of_the_study_is_refused(
    out: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("matplotlib")
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit) as exit_:
        main(["compare", f"--configs={CONFIGS}/full.yaml", f"--out={tmp_path / out}"])
    assert exit_.value.code == 2
    assert "--out" in capsys.readouterr().err
