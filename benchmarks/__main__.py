"""Print tables of the benchmarks: `python -m benchmarks`."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated

# before torch is imported: on a shared machine, times of two threads are too noisy to compare
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import data, epochs, host, launches, methods, models
from lit_spu import ranges
from lit_spu.backbones.load import ASSETS
from lit_spu.errors import UserError
from lit_spu.ranges import Count, Length
from lit_spu.study.grid import build_for_gpu
from lit_spu.study.steps import batch_of
from lit_spu.tasks import TASKS, Task

RANGES = {"rounds": Count, "lengths": Annotated[list[Count], Length(1)], "batch_size": Count}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds, after a warm-up round (default: 5)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 128], help="tokens of a text (default: 32 128)")
    parser.add_argument("--batch_size", type=int, default=32, help="texts of a batch (default: 32)")
    parser.add_argument(
        "--only", nargs="+", default=["*"], help="patterns of row names, such as 'mezo*' (default: all)"
    )
    parser.add_argument(
        "--device", default="cpu", help="device of the steps, such as 'cuda' (default: cpu, one thread)"
    )
    parser.add_argument("--launches", action="store_true", help="count the operators of a step instead, as on a GPU")
    parser.add_argument("--host", action="store_true", help="time steps of narrow models in the Trainer instead")
    parser.add_argument("--quick", action="store_true", help="two rounds of 32 tokens, for a rough result")
    parser.add_argument("--glue", type=Path, help="folder in GLUE's layout: also measure batches of its SST-2")
    parser.add_argument(
        "--tokenizer", type=Path, default=ASSETS / "mini-bert", help="tokenizer for --glue (default: that of mini-bert)"
    )
    options = parser.parse_args()
    try:
        ranges.check(RANGES, vars(options), "--")
    except UserError as error:
        parser.error(str(error))
    if options.device != "cpu" and not torch.accelerator.is_available():
        parser.error(f"--device={options.device}: this machine has no accelerator that torch can use. Leave it out.")
    rounds, lengths = (2, [32]) if options.quick else (options.rounds, options.lengths)
    console, task = Console(), TASKS["sst2"]
    if options.launches:
        print_launches(task, options)
        return
    if options.host:
        print_host_times(task, options)
        return

    pipelines = [data.synthetic(67_349, options.batch_size)]
    if options.glue:
        pipelines.append(data.glue(options.glue, options.tokenizer, options.batch_size))
    table = Table(title=f"Data, batch {options.batch_size}: padded over real tokens", title_justify="left")
    for header in ("data", "buckets", "longest in batch", f"to {data.MAX_LENGTH}", "batches/s"):
        table.add_column(header, justify="left" if header == "data" else "right")
    for pipeline in pipelines:
        ratios = (pipeline.bucketed, pipeline.longest_in_batch, pipeline.to_max_length)
        table.add_row(pipeline.name, *(f"{ratio:.2f}" for ratio in ratios), f"{pipeline.batches_per_second:,.0f}")
    console.print(table)

    for name, config in models.configs().items():
        with TemporaryDirectory() as folder:
            backbone = models.save(config, Path(folder), task)
            for length in lengths:
                rows = methods.build_methods(backbone, task, only=options.only)
                batch = {k: v.to(options.device) for k, v in batch_of(options.batch_size, length, task).items()}
                device = "one thread" if options.device == "cpu" else torch.cuda.get_device_name(options.device)
                title = f"{name}, batch {options.batch_size}, {length} tokens, {rounds} rounds, {device}"
                console.print(make_cost_table(title, methods.measure_costs(rows, batch, rounds)))
            if options.only != ["*"] or options.device != "cpu":
                continue
            seconds = epochs.measure_epochs(backbone, task, rounds)
            console.print(make_epoch_table(f"{name}, an epoch of 640 texts like SST-2's, {rounds} rounds", seconds))


def print_launches(task: Task, options: argparse.Namespace) -> None:
    """Print Markdown tables of the operators of a step. Side networks recompute nothing, as on a GPU by default."""
    for name, config in models.narrow_configs().items():
        with TemporaryDirectory() as folder:
            backbone = models.save(config, Path(folder), task)
            rows = methods.build_methods(backbone, task, only=options.only, make=build_for_gpu)
            batch = batch_of(options.batch_size, options.lengths[0], task)
            print(
                "\n".join(launches.make_table(name, launches.count_launches(rows, batch, options.rounds))), end="\n\n"
            )


def print_host_times(task: Task, options: argparse.Namespace) -> None:
    """Print Markdown tables of the host time of a step in the Trainer. A round is a block of steps."""
    for name, config in models.narrow_configs().items():
        with TemporaryDirectory() as folder:
            backbone = models.save(config, Path(folder), task)
            overheads = host.measure_overheads(backbone, max(4, options.rounds))
            print("\n".join(host.make_table(name, overheads)), end="\n\n")


def make_cost_table(title: str, costs: list[methods.Cost]) -> Table:
    """Make a table of the costs of training steps.

    Times are processor time. Memory is live bytes beyond the loaded backbone. On an accelerator, a column shows the
    memory that its allocator reports.
    """
    table = Table(title=title, title_justify="left")
    has_allocator = any(cost.allocator_mib is not None for cost in costs)
    headers = ("method", "trainable", "step ms", "/ forward", "/ full", "live MiB", "/ full", "allocator MiB")
    for header in headers if has_allocator else headers[:-1]:
        table.add_column(header, justify="left" if header == "method" else "right")
    for cost in costs:
        milliseconds = f"{cost.milliseconds:,.{0 if cost.milliseconds > 100 else 1}f}"
        time = (milliseconds, f"{cost.to_forward:.2f}", f"{cost.to_full:.2f}")
        is_known = not math.isnan(cost.above_mib)
        memory = (f"{cost.above_mib:,.0f}", f"{cost.memory_to_full:.2f}") if is_known else ("–", "–")
        allocator = () if cost.allocator_mib is None else (f"{cost.allocator_mib:,.0f}",)
        table.add_row(cost.name, f"{cost.trainable:,}", *time, *memory, *allocator)
    return table


def make_epoch_table(title: str, seconds: Mapping[str, float]) -> Table:
    """Make a table of the processor seconds of an epoch, with ratios to forward passes and to full fine-tuning."""
    table = Table(title=title, title_justify="left")
    for header in ("epoch", "s", "/ forward", "/ full"):
        table.add_column(header, justify="left" if header == "epoch" else "right")
    for name, measured in sorted(seconds.items(), key=lambda item: item[1]):
        ratios = (measured / seconds[methods.FORWARD], measured / seconds[methods.FULL])
        table.add_row(name, f"{measured:,.1f}", *(f"{ratio:.2f}" for ratio in ratios))
    return table


if __name__ == "__main__":
    main()
