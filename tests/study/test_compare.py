"""The runner with programs that end, fail, are killed or wait; a whole study; and an interrupted study."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pytest

from lit_spu.study.compare import Forecast, Outcome, Runner, read_outcome
from lit_spu.study.grid import Cell

ROOT = Path(__file__).parents[2]

PROGRAM = """
import os, signal, sys, time
case = sys.argv[1]
if case == "killed":
    os.kill(os.getpid(), signal.SIGKILL)
if case == "wait":
    time.sleep(60)
if case == "refused":
    sys.exit("error: model.k=-1 is no radius")
print(os.environ["OMP_NUM_THREADS"], [arg for arg in sys.argv if "--run_dir" in arg])
"""


def cell(case: str, seed: int = 1) -> Cell:
    return Cell(case, "sst2", "mini-bert", seed, 1.0, (case, f"--seed_everything={seed}"))


def runner(out: Path, jobs: int = 1) -> Runner:
    return Runner(out, jobs, (sys.executable, "-c", PROGRAM))


def test_every_outcome_is_recorded_and_described(tmp_path: Path) -> None:
    cells = [cell("done"), cell("refused"), cell("killed")]
    outcomes = {outcome.cell.row: outcome for outcome in runner(tmp_path).run(cells)}
    assert [outcomes[name].returncode for name in ("done", "refused", "killed")] == [0, 1, -9]
    assert outcomes["done"].done
    assert "error: model.k=-1 is no radius" in outcomes["refused"].problem
    assert outcomes["killed"].problem == "killed by SIGKILL"
    for one in cells:
        assert read_outcome(one, tmp_path) == outcomes[one.row]


def test_cells_share_the_cores_and_have_their_own_directories(tmp_path: Path) -> None:
    outcomes = list(runner(tmp_path, jobs=2).run([cell("done", seed) for seed in range(4)]))
    threads = max(1, len(os.sched_getaffinity(0)) // 2)
    for outcome in outcomes:
        assert outcome.log.read_text().split()[0] == str(threads)
        assert str(outcome.run) in outcome.log.read_text()
    assert len({outcome.run.parent for outcome in outcomes}) == 4


def test_a_checkpoint_is_tested_after_a_successful_fit_only(tmp_path: Path) -> None:
    for case, lines in (("fit", 2), ("refused", 1)):
        one = Cell(case, "sst2", "mini-bert", 1, 1.0, ("fit", case), tested=True)
        program = f"{PROGRAM}\nif sys.argv[2] == 'refused': sys.exit('error: no')\nprint(sys.argv[1:])"
        (outcome,) = Runner(tmp_path, 1, (sys.executable, "-c", program)).run([one])
        commands = [line for line in outcome.log.read_text().splitlines() if line.startswith("['")]
        assert outcome.done is (case == "fit")
        assert len([line for line in outcome.log.read_text().splitlines() if "run_dir" in line]) >= lines
        if case == "fit":
            assert commands[1].startswith(f"['test', '--ckpt_path={outcome.run}', '--run_dir={outcome.run}/test'")
        else:
            assert not any("'test'" in line for line in commands)


def test_other_flags_are_another_cell(tmp_path: Path) -> None:
    list(runner(tmp_path).run([cell("done")]))
    other = Cell("done", "sst2", "mini-bert", 1, 1.0, ("done", "--seed_everything=1", "--model.k=2"))
    assert read_outcome(cell("done"), tmp_path)
    assert read_outcome(other, tmp_path) is None


def test_an_interrupted_study_has_finished_cells_only(tmp_path: Path) -> None:
    cells = [cell("done"), cell("wait"), cell("done", 2)]
    started = time.monotonic()
    outcomes = runner(tmp_path).run(cells)
    next(outcomes)
    threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        next(outcomes)
    assert time.monotonic() - started < 30  # the waiting process was terminated
    assert read_outcome(cells[0], tmp_path)
    assert read_outcome(cells[1], tmp_path) is None
    assert read_outcome(cells[2], tmp_path) is None


def test_time_left_is_the_mean_of_the_row_or_of_all_rows() -> None:
    def ended(row: str, seconds: float, code: int = 0) -> Outcome:
        return Outcome(cell(row), Path(), code, seconds)

    forecast = Forecast([], jobs=2)
    assert forecast.seconds_left([cell("full")]) is None
    assert forecast.describe([cell("full")]) == "1 run left"
    for outcome in (ended("full", 100), ended("full", 200), ended("lst", 30), ended("lst", 9999, code=1)):
        forecast.add(outcome)
    assert forecast.seconds_left([cell("full"), cell("lst"), cell("new")]) == (150 + 30 + 110) / 2
    assert forecast.describe([cell("full")] * 4) == "4 runs left, about 5 min"


STUDY = """
configs: [{root}/configs/full.yaml, {root}/configs/head.yaml]
seeds: [1]
flags: [--trainer.max_epochs=1, --data.limit_train=64, --data.limit_validation=32, --data.cache={folder}/cache]
flags_for: {{head: [--model.lr=0.01]}}
"""


def compare(folder: Path, *flags: str) -> list[str]:
    (folder / "study.yaml").write_text(STUDY.format(root=ROOT, folder=folder))
    return [sys.executable, "-m", "lit_spu", "compare", "--config=study.yaml", *flags]


@pytest.mark.slow
def test_a_whole_study(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    first = subprocess.run(
        compare(tmp_path, "--jobs=2"), cwd=tmp_path, capture_output=True, text=True, check=False, env=environment
    )
    assert first.returncode == 0, first.stdout + first.stderr
    assert "3 of 3 runs to do" in first.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"study.yaml", "cache", "runs"}
    out = tmp_path / "runs" / "compare" / "study"
    results = json.loads((out / "results.json").read_text())
    assert {row["row"] for row in results["rows"]} == {"full", "head", "majority", "zero-shot", "zero-shot, calibrated"}
    by_row = {run["row"]: run for run in results["runs"]}
    assert by_row["full"]["steps"] == by_row["head"]["steps"] == by_row["head"]["passes/backward"] == 2
    assert by_row["head"]["config.model.init_args.lr"] == 0.01
    assert by_row["full"]["memory/live_peak_mib"] > by_row["head"]["memory/live_peak_mib"]
    page = (out / "report.html").read_text()
    assert "not fair" not in page
    again = subprocess.run(
        compare(tmp_path, "--seeds=1,2"), cwd=tmp_path, capture_output=True, text=True, check=False, env=environment
    )
    assert again.returncode == 0, again.stdout + again.stderr
    assert "2 of 5 runs to do" in again.stdout
    results = (out / "results.json").read_text()
    assert json.loads(results)["rows"][1]["seeds"] == 2
    # results.json alone is enough to continue, and a smaller study does not remove records from it
    shutil.rmtree(out / "cells")
    for flags, message in (("--seeds=1", "0 of 3 runs"), ("--seeds=1,2", "0 of 5 runs")):
        more = subprocess.run(compare(tmp_path, flags), cwd=tmp_path, capture_output=True, text=True, env=environment)
        assert more.returncode == 0, more.stdout + more.stderr
        assert f"{message} to do" in more.stdout
    assert (out / "results.json").read_text() == results


@pytest.mark.slow
def test_a_killed_study_loses_running_cells_only(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    study = subprocess.Popen(compare(tmp_path, "--seeds=1,2"), cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
    cells = tmp_path / "runs" / "compare" / "study" / "cells"
    deadline = time.monotonic() + 120
    while len(list(cells.glob("*/cell.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    study.kill()
    study.wait()
    done = {path: path.stat().st_mtime_ns for path in cells.glob("*/cell.json")}
    assert 2 <= len(done) < 5
    again = subprocess.run(
        compare(tmp_path, "--seeds=1,2"), cwd=tmp_path, capture_output=True, text=True, check=False, env=environment
    )
    assert again.returncode == 0, again.stdout + again.stderr
    assert f"{5 - len(done)} of 5 runs to do" in again.stdout
    assert all(path.stat().st_mtime_ns == when for path, when in done.items())


@pytest.mark.slow
def test_ctrl_c_writes_the_report_of_finished_cells(tmp_path: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    study = subprocess.Popen(
        compare(tmp_path, "--seeds=1,2"),
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        # tests that run in the background of a shell inherit that Ctrl-C is ignored
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    out = tmp_path / "runs" / "compare" / "study"
    deadline = time.monotonic() + 120
    while len(list(out.glob("cells/*/cell.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.2)
    study.send_signal(signal.SIGINT)
    output, _ = study.communicate(timeout=60)
    assert study.returncode == 130
    assert "Interrupted. The same command continues the study." in output
    assert json.loads((out / "results.json").read_text())["runs"]
    assert (out / "report.html").exists()
