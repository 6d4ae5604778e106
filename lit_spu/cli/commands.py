"""The subcommands without a Trainer: estimate, compare, export, replay, separate and doctor."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import fields, replace
from importlib.util import find_spec
from pathlib import Path
from textwrap import shorten
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from lit_spu.cli.doctor import doctor
from lit_spu.cli.parser import Parser, put_configs_first
from lit_spu.cli.subcommands import COMMANDS
from lit_spu.cli.user_errors import exit_on_user_error
from lit_spu.console import make_console
from lit_spu.errors import UserError
from lit_spu.export.student import separate
from lit_spu.export.writers import export, replay
from lit_spu.files import lock_folder
from lit_spu.measure import MIB, Kind
from lit_spu.ranges import Count, Length, Positive, Text
from lit_spu.study import report
from lit_spu.study.columns import BRIEF, COLUMNS
from lit_spu.study.compare import Forecast, Outcome, Runner, read_outcome
from lit_spu.study.estimate import Estimate, Failure, estimates
from lit_spu.study.grid import PACKAGED_CONFIGS, Cell, Study, method_configs
from lit_spu.study.results import (
    Record,
    find_unfair_differences,
    make_record,
    read_records,
    rows,
    score_constants,
    write,
)


def estimate(
    configs: Annotated[Sequence[Text], Length(1)] = PACKAGED_CONFIGS,
    backbone: Text = "mini-bert",
    task: Text = "sst2",
    batch_size: Count = 32,
    length: Count = 128,
    budget: Positive | None = None,
    settings: dict[str, Any] | None = None,
    device: Literal["cpu", "cuda"] | None = None,
) -> None:
    """Estimate the peak memory of training for every method, without training and without loading weights.

    Args:
        configs: Config files of methods, or glob patterns (default: the packaged config of every method).
        backbone: An embedded mini model (mini-bert, mini-t5), or a Hugging Face name or folder.
        task: The name of a task, or the YAML file of a custom task.
        batch_size: Texts per batch, on one device.
        length: Tokens per text.
        budget: Memory for live tensors in GiB; adds a column with the largest batch that fits.
        settings: Settings that replace those of the configs in the methods that have them, as {reduction: 8}.
        device: Kind of device (default: that of this machine). On cuda, ladders recompute no blocks by default.

    Raises:
        UserError: if no config file matches, or no method has one of the settings.
    """
    budget_bytes = None if budget is None else int(budget * 2**30)
    files = method_configs(configs)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    results = estimates(files, backbone, task, batch_size, length, budget_bytes, settings, device == "cuda")
    shape = f"{batch_size} texts of {length} tokens"
    print(f"MiB of live tensors at the peak of a training step on {device}: {backbone}, {shape}")
    width = max(map(len, files))
    headings = _estimate_row(("trained", "peak", *ESTIMATE_PARTS.values()), "batch" if budget else "")
    print(f"{'method':{width}}{headings}", flush=True)
    failures: list[Failure] = []
    for number, name in enumerate(files, 1):
        _print_progress(f"estimating {name} ({number} of {len(files)})")
        result = next(results)
        print(f"{name:{width}}{_describe_estimate(result)}", flush=True)
        if isinstance(result, Failure):
            failures.append(result)
    if len(failures) == len(files):
        raise UserError(f"No method could be estimated. {failures[-1].name}: {failures[-1].reason}")
    if budget:
        print(f"batch: the largest batch size within {budget:g} GiB")
    print("The process takes more: Python, torch, and memory that its allocator holds.")


ESTIMATE_PARTS = {
    Kind.WEIGHTS: "weights",
    Kind.GRADIENTS: "grads",
    Kind.OPTIMIZER: "optim",
    Kind.ACTIVATIONS: "activ.",
    Kind.REST: "rest",
}
"""Headings of the parts of the peak."""


def _describe_estimate(result: Estimate | Failure) -> str:
    """Return the cells of a method: trained parameters, peak, its parts in MiB, and the largest batch size."""
    if isinstance(result, Failure):
        return f"  no estimate: {result.reason}"
    parts = (_mib(result.by_kind[kind]) for kind in ESTIMATE_PARTS)
    largest = "" if result.largest is None else f"{result.largest:,}"
    return _estimate_row((f"{result.trainable / 1e6:.2f}M", _mib(result.peak), *parts), largest)


def _estimate_row(cells: Sequence[str], largest: str) -> str:
    """Return cells in columns that fit into a terminal beside the method's name."""
    return "".join(f"{cell:>8}" for cell in cells) + (f"{largest:>8}" if largest else "")


def _print_progress(text: str) -> None:
    """Print what is being measured on stderr. On a terminal, the row that follows replaces it."""
    replaced = sys.stdout.isatty() and sys.stderr.isatty()
    print(text, end="\r" if replaced else "\n", file=sys.stderr, flush=True)


def _mib(count: int) -> str:
    """Format bytes in MiB, with one decimal if they are few."""
    return f"{count / MIB:,.{0 if count >= 100 * MIB else 1}f}"


def compare(study: Study, out: str, jobs: Count = 1, retry: bool = False, dry_run: bool = False) -> None:
    """Run methods x tasks x backbones x seeds, each in its own process, and report their costs and scores.

    Finished runs are not repeated, so the same command continues a study that was interrupted or extended. It needs
    only the study's results.json, not the run directories.

    Args:
        study: Methods, tasks, backbones and seeds to compare.
        out: Directory of the results (default: runs/compare/ and the name of the config file).
        jobs: Number of runs at the same time, which share the cores. Compare times only between runs with equal jobs.
        retry: Repeat the runs that failed.
        dry_run: Only list the runs.

    Raises:
        UserError: if a package for the report is missing.
    """
    cells = study.cells()
    if dry_run:
        print(*(cell.command for cell in cells), sep="\n")
        return
    if find_spec("matplotlib") is None:
        raise UserError("The report needs matplotlib: pip install 'lit-spu[report]'.")
    folder, console = Path(out), make_console()
    (folder / "cells").mkdir(parents=True, exist_ok=True)
    outcomes, records, problems = _read_finished(cells, folder, retry)
    if problems:
        console.print(f"{len(problems)} results count as not run. The first: {problems[0]}", soft_wrap=True)
    remaining = [cell for cell in cells if cell not in outcomes and cell not in records]
    console.print(f"{len(remaining)} of {len(cells)} runs to do. Results: {folder}")
    complete = _run(remaining, Runner(folder, jobs), Forecast(outcomes.values(), jobs), outcomes, console)
    for cell in remaining:
        if cell in outcomes and outcomes[cell].done:
            try:
                records[cell] = make_record(outcomes[cell])
            except UserError as error:
                outcomes[cell] = replace(outcomes[cell], fault=str(error))
                console.print(f"{cell}: no result: {error}", soft_wrap=True)
    failures = [outcome for outcome in outcomes.values() if not outcome.done]
    _report(study, [records[cell] for cell in cells if cell in records], failures, folder, console)
    if not complete:
        console.print("Interrupted. The same command continues the study.")
        raise SystemExit(128 + signal.SIGINT)
    if failed := [outcome for outcome in failures if not outcome.cell.optional]:
        console.print(f"{len(failed)} runs failed. --retry repeats them.")
        raise SystemExit(1)


def _read_finished(
    cells: Sequence[Cell], folder: Path, retry: bool
) -> tuple[dict[Cell, Outcome], dict[Cell, Record], list[str]]:
    """Read what a study has: the outcomes and records of cells, and why others cannot be read.

    A record in results.json is enough: the run directory may be gone.
    """
    saved, problems = read_records(folder)
    outcomes, records = {}, {}
    for cell in cells:
        try:
            outcome = read_outcome(cell, folder)
            if outcome and outcome.done:
                records[cell] = make_record(outcome)
            if outcome and (outcome.done or not retry):
                outcomes[cell] = outcome
        except UserError as error:
            if cell.command not in saved:
                problems.append(str(error))
        if cell not in outcomes and cell.command in saved:
            records[cell] = saved[cell.command]
    return outcomes, records, problems


def _run(
    remaining: Sequence[Cell], runner: Runner, forecast: Forecast, outcomes: dict[Cell, Outcome], console: Console
) -> bool:
    """Run the remaining cells, add their outcomes, and show the progress; return False if interrupted."""
    waiting = list(remaining)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the same as Ctrl-C
    columns = SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        bar = progress.add_task(forecast.describe(waiting), total=None)
        try:
            for outcome in runner.run(remaining):
                outcomes[outcome.cell] = outcome
                waiting.remove(outcome.cell)
                forecast.add(outcome)
                # short, because the report explains why a backbone without a pretrained head has no zero-shot score
                problem = shorten(outcome.problem, 100) if outcome.cell.optional else outcome.problem
                result = f"{outcome.seconds:.0f} s" if outcome.done else f"no result: {problem}"
                progress.console.print(f"{outcome.cell}: {result}", soft_wrap=True)
                progress.update(bar, description=forecast.describe(waiting))
        except KeyboardInterrupt:
            return False
    return True


def _report(
    study: Study, records: Sequence[Record], failures: Sequence[Outcome], folder: Path, console: Console
) -> None:
    """Write the results so far, and print a table per task and backbone."""
    if not records:
        return
    constants, problems = score_constants(records)
    found = rows(records, constants)
    problems += [f"no score: {record['command']}" for record in records if record["score"] is None]
    differences = find_unfair_differences(records)
    write(records, found, folder)
    page = report.write(study, found, records, failures, differences, folder)
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
    for overview in report.overviews(found, study.reference):
        if len(names := overview.worth_their_memory()) > 1:
            console.print(f"Worth their memory on {overview.backbone}, in order of memory: {'; '.join(names)}")
    for line in problems:
        console.print(line, soft_wrap=True)
    for line in differences:
        console.print(f"Not a fair comparison, because settings differ: {line}", soft_wrap=True)
    console.print(f"Report: {page}", soft_wrap=True)


def _normalize(args: Sequence[str], command: Callable[..., None]) -> list[str]:
    """Return the arguments in the parser's form: `--seeds 1,2` becomes a list, and `--retry` alone becomes true.

    Texts of a list are quoted: in YAML, configs/*.yaml and 5 alone would be no texts.
    """
    hints = get_type_hints(command) | (get_type_hints(Study) if command is compare else {})
    lists = {f"--{name}": get_args(hint) for name, hint in hints.items() if get_origin(hint) in (list, Sequence)}
    switches = {f"--{name}" for name, hint in hints.items() if hint is bool}
    words = [word for arg in args for word in (arg.split("=", 1) if arg.partition("=")[0] in lists else [arg])]
    normalized: list[str] = []
    for previous, word, following in zip(["", *words], words, [*words[1:], "--"], strict=False):
        if previous in lists and not word.startswith("["):
            word = json.dumps(word.split(",")) if lists[previous] == (str,) else f"[{word}]"
        normalized.append(word)
        if word in switches and following.startswith("--"):
            normalized.append("true")
    return normalized


FUNCTIONS: dict[str, Callable[..., None]] = {
    "estimate": estimate,
    "compare": compare,
    "export": export,
    "replay": replay,
    "separate": separate,
    "doctor": doctor,
}
"""The functions of the subcommands; their arguments are the flags."""


def run(args: Sequence[str]) -> None:
    """Run the command line of one of these subcommands."""
    name, *given = args
    Parser.command_line = given
    command = FUNCTIONS[name]
    settings = _parser(name, command).parse_args(put_configs_first(_normalize(given, command))).as_dict()
    files = settings.pop("config", None) or []
    if command is compare:
        settings["study"] = Study(**{field.name: settings.pop(field.name) for field in fields(Study)})
        settings["out"] = settings["out"] or f"runs/compare/{Path(str(files[-1])).stem if files else 'study'}"
    with exit_on_user_error(), ExitStack() as resources:
        if command is compare and not settings["dry_run"]:
            resources.enter_context(lock_folder(Path(settings["out"]), "--out"))
        command(**settings)


def _parser(name: str, command: Callable[..., None]) -> Parser:
    parser = Parser(prog=f"lit-spu {name}", description=COMMANDS[name])
    if command is not doctor:
        parser.add_argument("-c", "--config", action="config", help="A YAML file of these settings.")
    if command is compare:
        parser.add_class_arguments(Study)
        parser.add_function_arguments(compare, skip={"study", "out"})
        parser.add_argument(
            "--out", type=Text | None, help="Directory of the results (default: named after the config file)."
        )
    else:
        parser.add_function_arguments(command)
    return parser
