"""The subcommands that are no run: estimate, compare, export, replay, separate and doctor."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from textwrap import shorten
from typing import Any, get_origin, get_type_hints

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from lit_spu.__main__ import COMMANDS
from lit_spu.cli.doctor import doctor
from lit_spu.cli.messages import Parser, answered
from lit_spu.errors import UserError
from lit_spu.export.student import separate
from lit_spu.export.writers import export, replay
from lit_spu.measure import MIB, Kind
from lit_spu.study import report
from lit_spu.study.columns import BRIEF, COLUMNS
from lit_spu.study.compare import Forecast, Outcome, Runner, known
from lit_spu.study.estimate import estimates
from lit_spu.study.grid import Cell, Study, method_configs
from lit_spu.study.results import Record, constants, find_unfair_differences, make_record, read_records, rows, write


def estimate(
    configs: Sequence[str] = ("configs/*.yaml",),
    backbone: str = "mini-bert",
    task: str = "sst2",
    batch_size: int = 32,
    length: int = 128,
    budget: float | None = None,
    settings: dict[str, Any] | None = None,
) -> None:
    """Tell the peak memory of training, method by method, before any training and without loading weights.

    Args:
        configs: Config files of methods, or patterns of such.
        backbone: An embedded mini model (mini-bert, mini-t5), or a Hugging Face name or folder.
        task: A task's name, or the YAML file of one's own.
        batch_size: Texts of a batch, on one device.
        length: Tokens of every text.
        budget: GiB of live tensors; adds the largest batch that they hold.
        settings: Settings of the methods, laid over the configs of those that have them, as {reduction: 8}.
    """
    for name, value in (("batch_size", batch_size), ("length", length)):
        if value < 1:
            raise UserError(f"--{name}={value}: give 1 or more.")
    budget_bytes = None if budget is None else int(budget * 2**30)
    found, refused = estimates(method_configs(configs), backbone, task, batch_size, length, budget_bytes, settings)
    title = f"MiB of live tensors at the peak of a training step: {backbone}, {batch_size} texts of {length} tokens"
    table = Table(title=title, title_justify="left", box=SIMPLE, pad_edge=False)
    kinds = {
        Kind.WEIGHTS: "weights",
        Kind.GRADIENTS: "grads",
        Kind.OPTIMIZER: "optim",
        Kind.ACTIVATIONS: "saved",
        Kind.REST: "rest",
    }
    table.add_column("method", no_wrap=True)
    for header in ("trained", "peak", *kinds.values(), *([] if budget is None else ["largest\nbatch"])):
        table.add_column(header, justify="right", no_wrap=True)
    for one in found:
        split = (_mib(one.by_kind[kind]) for kind in kinds)
        fitting = [] if one.largest is None else [f"{one.largest:,}"]
        table.add_row(one.name, f"{one.trainable / 1e6:.2f}M", _mib(one.peak), *split, *fitting)
    console = Console()
    if found:
        console.print(table)
        console.print("The process itself takes more: Python, torch and what its allocator keeps.", highlight=False)
    for name, error in refused.items():
        print(f"{name}: {error}", file=sys.stderr)
    if not found:
        raise SystemExit(2)


def _mib(count: int) -> str:
    return f"{count / MIB:,.{0 if count >= 100 * MIB else 1}f}"


def compare(study: Study, out: str, jobs: int = 1, retry: bool = False, dry_run: bool = False) -> None:
    """Run methods x tasks x backbones x seeds, each in a process of its own, and report what they cost and score.

    What is finished is not run again: the same command goes on with a study that was interrupted or extended, also
    where of its directory nothing but results.json is left.

    Args:
        study: What to compare.
        out: Directory of the results (default: runs/compare/ and the name of the config file).
        jobs: Runs at a time, which share the cores. Times are comparable only between runs with as many.
        retry: Run again what failed.
        dry_run: Only list the runs.
    """
    if jobs < 1:
        raise UserError(f"--jobs={jobs}: give 1 or more.")
    cells = study.cells()
    if dry_run:
        print(*(cell.command for cell in cells), sep="\n")
        return
    if find_spec("matplotlib") is None:
        raise UserError("The report needs matplotlib: pip install 'lit-spu[report]'.")
    folder, console = Path(out), Console()
    before = [outcome for cell in cells if (outcome := known(cell, folder))]
    outcomes = {outcome.cell: outcome for outcome in before if outcome.done or not retry}
    before_that = read_records(folder)  # their directories may be gone
    records = {
        cell: before_that[cell.command] for cell in cells if cell.command in before_that and cell not in outcomes
    }
    left = [cell for cell in cells if cell not in outcomes and cell not in records]
    console.print(f"{len(left)} of {len(cells)} runs to do. Results: {folder}", highlight=False)
    complete = _run(left, Runner(folder, jobs), Forecast(before, jobs), outcomes, console)
    records |= {cell: make_record(outcome) for cell, outcome in outcomes.items() if outcome.done}
    troubles = [outcome for outcome in outcomes.values() if not outcome.done]
    _report(study, [records[cell] for cell in cells if cell in records], troubles, folder, console)
    if not complete:
        console.print("Interrupted. The same command goes on.")
        raise SystemExit(128 + signal.SIGINT)
    if failed := [outcome for outcome in troubles if not outcome.cell.optional]:
        console.print(f"{len(failed)} of the runs failed; --retry runs them again.", highlight=False)
        raise SystemExit(1)


def _run(
    left: Sequence[Cell], runner: Runner, forecast: Forecast, outcomes: dict[Cell, Outcome], console: Console
) -> bool:
    """Run what is left, add the outcomes, and show how it goes; whether it came to the end."""
    waiting = list(left)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the same as Ctrl-C
    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task(forecast.describe(waiting), total=None)
        try:
            for outcome in runner.run(left):
                outcomes[outcome.cell] = outcome
                waiting.remove(outcome.cell)
                forecast.add(outcome)
                # that a backbone cannot be asked without training is no trouble: the report tells why
                trouble = shorten(outcome.problem, 100) if outcome.cell.optional else outcome.problem
                end = f"{outcome.seconds:.0f} s" if outcome.done else f"no result: {trouble}"
                progress.console.print(f"{outcome.cell}: {end}", highlight=False, soft_wrap=True)
                progress.update(bar, description=forecast.describe(waiting))
        except KeyboardInterrupt:
            return False
    return True


def _report(
    study: Study, records: Sequence[Record], troubles: Sequence[Outcome], folder: Path, console: Console
) -> None:
    """Write all results that there are, and print the rows."""
    if not records:
        return
    found = rows(records, constants(records))
    differences = find_unfair_differences(records)
    write(records, found, folder)
    page = report.write(study, found, records, troubles, differences, folder)
    for part in report.parts(found, study.reference):
        shown = {name: heading for name, (heading, _) in COLUMNS.items() if name in BRIEF}
        table = Table(title=f"{part.task} on {part.backbone}", title_justify="left", box=SIMPLE)
        table.add_column("method")
        for header in (part.rows[0].metric, *shown.values()):
            table.add_column(header, justify="right", no_wrap=True)
        for row in part.rows:
            name = f"{row.name} (collapsed)" if row.collapsed else row.name
            table.add_row(name, report.score(row), *(report.number(row.costs.get(column)) for column in shown))
        console.print(table)
    for line in differences:
        console.print(f"Not equal, so not a fair comparison: {line}", highlight=False, soft_wrap=True)
    console.print(f"Report: {page}", highlight=False, soft_wrap=True)


def _spelled_out(args: Sequence[str], command: Callable[..., None]) -> list[str]:
    """The arguments with `--seeds 1,2` as the list that it stands for, and `--retry` alone as true."""
    hints = get_type_hints(command) | (get_type_hints(Study) if command is compare else {})
    lists = {f"--{name}" for name, hint in hints.items() if get_origin(hint) in (list, Sequence)}
    switches = {f"--{name}" for name, hint in hints.items() if hint is bool}
    words = [word for arg in args for word in (arg.split("=", 1) if arg.partition("=")[0] in lists else [arg])]
    spelled: list[str] = []
    for before, word, after in zip(["", *words], words, [*words[1:], "--"], strict=False):
        spelled.append(f"[{word}]" if before in lists and not word.startswith("[") else word)
        if word in switches and after.startswith("--"):
            spelled.append("true")
    return spelled


def run(args: Sequence[str]) -> None:
    """Run the command line of one of these."""
    name, *given = args
    Parser.given = given
    commands: dict[str, Callable[..., None]] = {
        "estimate": estimate,
        "compare": compare,
        "export": export,
        "replay": replay,
        "separate": separate,
        "doctor": doctor,
    }
    command = commands[name]
    parser = Parser(prog=f"lit-spu {name}", description=COMMANDS[name])
    if command is not doctor:
        parser.add_argument("-c", "--config", action="config", help="A YAML file of these settings.")
    if command is compare:
        parser.add_class_arguments(Study)
        parser.add_function_arguments(compare, skip={"study", "out"})
        parser.add_argument("--out", type=str | None, help="Directory of the results.")
    else:
        parser.add_function_arguments(command)
    settings = parser.parse_args(_spelled_out(given, command)).as_dict()
    files = settings.pop("config", None) or []
    if command is compare:
        settings["study"] = Study(**{field.name: settings.pop(field.name) for field in fields(Study)})
        settings["out"] = settings["out"] or f"runs/compare/{Path(str(files[-1])).stem if files else 'study'}"
    with answered():
        command(**settings)
