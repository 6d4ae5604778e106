"""`python -m benchmarks`: print the tables."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: ratios of two threads are noise on a shared machine

import torch
from rich.console import Console
from rich.table import Table

from benchmarks import data, epochs, methods, models
from lit_spu.backbones.load import ASSETS
from lit_spu.study.steps import batch_of
from lit_spu.tasks import TASKS


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="timed rounds, after one to warm up (default: 5)")
    parser.add_argument("--lengths", type=int, nargs="+", default=[32, 128], help="tokens of a text (default: 32 128)")
    parser.add_argument("--batch_size", type=int, default=32, help="texts of a batch (default: 32)")
    parser.add_argument(
        "--only", nargs="+", default=["*"], help="patterns of the rows' names, as 'mezo*' (default: all)"
    )
    parser.add_argument("--device", default="cpu", help="where the steps run, as 'cuda' (default: cpu, one thread)")
    parser.add_argument("--quick", action="store_true", help="two rounds of 32 tokens: a look, not a result")
    parser.add_argument("--glue", type=Path, help="a folder in GLUE's layout, whose SST-2 to batch as well")
    parser.add_argument(
        "--tokenizer", type=Path, default=ASSETS / "mini-bert", help="the tokenizer for --glue (default: mini-bert's)"
    )
    options = parser.parse_args()
    rounds, lengths = (2, [32]) if options.quick else (options.rounds, options.lengths)
    console, task = Console(), TASKS["sst2"]

    pipelines = [data.synthetic(67_349, options.batch_size)]
    if options.glue:
        pipelines.append(data.glue(options.glue, options.tokenizer, options.batch_size))
    table = Table(title=f"Data, batch {options.batch_size}: padded over real tokens", title_justify="left")
    for header in ("data", "buckets", "longest in batch", f"to {data.MAX_LENGTH}", "batches/s"):
        table.add_column(header, justify="left" if header == "data" else "right")
    for p in pipelines:
        ratios = (p.bucketed, p.longest_in_batch, p.to_max_length)
        table.add_row(p.name, *(f"{ratio:.2f}" for ratio in ratios), f"{p.batches_a_second:,.0f}")
    console.print(table)

    for name, config in models.configs().items():
        with TemporaryDirectory() as folder:
            backbone = models.save(config, Path(folder), task)
            for length in lengths:
                found = methods.methods(backbone, task, only=options.only)
                batch = {k: v.to(options.device) for k, v in batch_of(options.batch_size, length, task).items()}
                where = "one thread" if options.device == "cpu" else torch.cuda.get_device_name(options.device)
                title = f"{name}, batch {options.batch_size}, {length} tokens, {rounds} rounds, {where}"
                console.print(report(title, methods.costs(found, batch, rounds)))
            if options.only != ["*"] or options.device != "cpu":
                continue
            seconds = epochs.epochs(backbone, task, rounds)
            console.print(epoch_report(f"{name}, an epoch of 640 texts like SST-2's, {rounds} rounds", seconds))


def report(title: str, costs: list[methods.Cost]) -> Table:
    """Time is processor time; memory is live bytes above the loaded backbone, and what a device's allocator says."""
    table = Table(title=title, title_justify="left")
    told = any(c.allocator_mib is not None for c in costs)
    headers = ("method", "trainable", "step ms", "/ forward", "/ full", "live MiB", "/ full", "allocator MiB")
    for header in headers if told else headers[:-1]:
        table.add_column(header, justify="left" if header == "method" else "right")
    for c in costs:
        time = (f"{c.milliseconds:,.{0 if c.milliseconds > 100 else 1}f}", f"{c.to_forward:.2f}", f"{c.to_full:.2f}")
        told_by = () if c.allocator_mib is None else (f"{c.allocator_mib:,.0f}",)
        table.add_row(c.name, f"{c.trainable:,}", *time, f"{c.above_mib:,.0f}", f"{c.memory_to_full:.2f}", *told_by)
    return table


def epoch_report(title: str, seconds: Mapping[str, float]) -> Table:
    """Processor seconds, and how many forward passes and full fine-tunings they are."""
    table = Table(title=title, title_justify="left")
    for header in ("epoch", "s", "/ forward", "/ full"):
        table.add_column(header, justify="left" if header == "epoch" else "right")
    for name, found in sorted(seconds.items(), key=lambda item: item[1]):
        ratios = (found / seconds[methods.FORWARD], found / seconds[methods.FULL])
        table.add_row(name, f"{found:,.1f}", *(f"{ratio:.2f}" for ratio in ratios))
    return table


if __name__ == "__main__":
    main()
