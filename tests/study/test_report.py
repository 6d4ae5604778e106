"""The HTML report, also opened in a browser if there is one."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lit_spu.study import report
from lit_spu.study.columns import AXES
from lit_spu.study.compare import Outcome
from lit_spu.study.grid import MAJORITY, Cell, Study
from lit_spu.study.plots import pareto
from lit_spu.study.results import Row

pytest.importorskip("matplotlib")

BROWSER = shutil.which("chromium")
STUDY = Study(configs=["configs/*.yaml"], seeds=[1, 2])


def row(name: str, scores: list[float], memory: float, **more: Any) -> Row:
    costs = dict.fromkeys(AXES, memory) | {"memory/weights_mib": memory / 2, "memory/activations_mib": memory / 2}
    more = {"seeds": range(len(scores))} | more
    return Row(name, "sst2", "mini-bert", 1.0, "accuracy", scores, costs, [(1, 0.5), (2, scores[0])], **more)


ROWS = [
    row("full", [0.9, 0.7], 400),
    row("full, recomputed", [0.9, 0.7], 400),  # equal values in every plot
    row("lst <b>", [0.85, 0.85], 100),
    row("head", [0.5, 0.5], 50, collapsed=2),
    Row(MAJORITY, "sst2", "mini-bert", 1.0, "accuracy", [0.5]),
]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    failed = Cell("lora", "sst2", "mini-bert", 1, 1.0, ("fit",))
    out = tmp_path_factory.mktemp("study")
    return report.write(STUDY, ROWS, [], [Outcome(failed, out / "run", -9, 1.0)], ["steps on sst2: 1; 2"], out)


def test_the_page_loads_no_other_files(page: Path) -> None:
    text = page.read_text()
    addresses = set(re.findall(r"https?://[^\s\"'<>]+", text))
    assert all("w3.org" in a or "purl.org" in a or "creativecommons" in a or "matplotlib.org" in a for a in addresses)
    assert not re.search(r"<(script|link|img|iframe)[^>]+(src|href)=", text)


def test_the_page_lists_failed_runs_and_unfair_differences(page: Path) -> None:
    text = page.read_text()
    assert "lora, sst2, mini-bert, seed 1: killed by SIGKILL" in text
    assert "steps on sst2: 1; 2" in text
    assert "collapsed, 2 of 2" in text
    assert "lst &lt;b&gt;" in text  # names are escaped


def test_costs_are_also_shown_relative_to_the_reference(page: Path) -> None:
    lst = page.read_text().split("lst &lt;b&gt;</td>")[1].split("</tr>")[0]
    assert [float(v) for v in re.findall(r'data-value="([\d.]+)"', lst)][:5] == [0.85, 100, 100, 0.25, 100]


def test_plots_are_saved_as_files(page: Path) -> None:
    files = {path.name for path in (page.parent / "plots" / "sst2-mini-bert").iterdir()}
    assert files == {f"{name}.{kind}" for name in ("pareto", "memory", "curves") for kind in ("svg", "png")}


def test_the_pareto_plot_shows_costs_that_differ() -> None:
    def panels(*costs: dict[str, float]) -> list[str]:
        rows = [Row(f"row {i}", "sst2", "m", 1.0, "accuracy", [0.5], cost) for i, cost in enumerate(costs)]
        return [axis.get_xlabel() for axis in pareto(rows).axes]

    memory, passes = AXES["memory/live_peak_mib"], AXES["passes/backward"]
    one = dict.fromkeys(AXES, 10.0)
    assert panels(one, one | {"memory/live_peak_mib": 5.0}) == [memory]
    assert panels(one, one | {"passes/backward": 5.0}) == [passes]
    assert panels(one, one | {"passes/backward": 0.0, "memory/live_peak_mib": 5.0}) == [memory]  # zero has no logarithm
    assert panels({"memory/live_peak_mib": 9.0}, one) == [memory]  # older runs can lack a measure
    assert panels(one, one) == [memory]


@pytest.mark.skipif(BROWSER is None, reason="no chromium")
@pytest.mark.parametrize(
    ("address", "order"),
    [
        ("", ["lst <b>", "full", "full, recomputed", "head", MAJORITY]),
        ("#sst2-mini-bert:3:1", ["head", "lst <b>", "full", "full, recomputed", MAJORITY]),
        ("#sst2-mini-bert:3:-1", ["full", "full, recomputed", "lst <b>", "head", MAJORITY]),  # missing values stay last
        ("#sst2-mini-bert:0:1", ["full", "full, recomputed", "head", "lst <b>", MAJORITY]),
    ],
)
def test_the_table_sorts_in_a_browser(page: Path, address: str, order: list[str]) -> None:
    command = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", f"file://{page}{address}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    body = done.stdout.split("<tbody>")[1].split("</tbody>")[0]
    first = [re.sub("<small.*", "", cell).strip() for cell in re.findall(r"<tr.*?><td.*?>(.*?)</td>", body, re.DOTALL)]
    assert [name.replace("&lt;", "<").replace("&gt;", ">") for name in first] == order


def test_an_overview_shows_all_tasks() -> None:
    costs = {"memory/live_peak_mib": 10.0, "latency/step_ms": 4.0, "params/trainable": 5}

    def make_row(name: str, task: str, score: float, factor: float) -> Row:
        scaled = {cost: value * factor for cost, value in costs.items()}
        return Row(name, task, "mini-bert", 1.0, "accuracy", [score], scaled)

    rows = [
        make_row("full", "sst2", 0.8, 2),
        make_row("full", "rte", 0.6, 4),
        make_row("lst", "sst2", 0.9, 1),
        make_row("lst", "rte", 0.7, 1),
    ]
    (table,) = report.overviews([*rows, Row(MAJORITY, "rte", "mini-bert", 1.0, "accuracy", [0.5])], "full")
    assert list(table.rows) == ["lst", "full", MAJORITY]
    lines = table.markdown().splitlines()
    assert lines[2] == "| lst | 5 | 0.900 | 0.700 | 10 | 0.38 | 0.38 |"
    assert lines[3] == "| full | 20 | 0.800 | 0.600 | 40 | 1.00 | 1.00 |"
    assert lines[4] == "| majority | – | – | 0.500 | – | – | – |"


def test_rows_worth_their_memory_are_clearly_better_than_those_of_less() -> None:
    rows = [
        row("head", [0.50, 0.52, 0.54], 10),
        row("noisy", [0.40, 0.60, 0.80], 20),  # 0.08 above head with a standard error of 0.1
        row("readout", [0.60, 0.62, 0.64], 30),
        row("worse", [0.59, 0.61, 0.63], 40),
        row("paired", [0.605, 0.626, 0.646], 50),  # 0.006 ± 0.0003 by seed, within the deviation over seeds
        Row(MAJORITY, "sst2", "mini-bert", 1.0, "accuracy", [0.9]),  # without a cost
        row("a failed seed", [0.9, 0.9], 60, seeds=[0, 2]),
        row("another failed", [0.95, 0.95], 70, seeds=[0, 1]),
        row("no second task", [0.9, 0.9, 0.9], 60),
    ]
    both = [*rows, *(replace(one, task="rte") for one in rows[:-1])]
    (table,) = report.overviews(both, "head")
    assert table.worth_their_memory() == ["head", "readout", "paired"]
    (table,) = report.overviews([replace(one, scores=one.scores[:1], seeds=[0]) for one in rows[:4]], "head")
    assert table.worth_their_memory() == ["head", "readout"]
