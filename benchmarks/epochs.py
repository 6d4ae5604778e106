"""Time whole epochs on texts of different lengths, with and without the activation cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.data import random_texts
from benchmarks.methods import CONFIGS, FORWARD, FULL, Batch, cached_batches, make_forward_pass, make_plain_copy
from lit_spu.measure import interleave
from lit_spu.methods.base import Method
from lit_spu.methods.frozen import CachedBackbone
from lit_spu.study.grid import build
from lit_spu.study.steps import training_step
from lit_spu.tasks import Task


def measure_epochs(backbone: Path, task: Task, rounds: int, texts: int = 640, batch_size: int = 32) -> dict[str, float]:
    """Return the processor seconds of an epoch by row: medians of interleaved rounds, with one thread."""
    torch.set_num_threads(1)
    batches = list(random_texts(texts, batch_size, vocabulary=16))
    calls: dict[str, Callable[[], None]] = {}

    def add(name: str, method: Method, epoch_batches: Sequence[Batch] = batches, empties_cache: bool = False) -> None:
        step, _ = training_step(method, batches[0])

        def epoch() -> None:
            if empties_cache and isinstance(method, CachedBackbone):
                method.cache = method.make_cache()
                method.cache.plan(batches)
            for batch in epoch_batches:
                step(batch)

        calls[name] = epoch

    def build_method(config: str, **settings: str) -> Any:
        return build(CONFIGS / f"{config}.yaml", backbone=str(backbone), task=task.name, reduction=8, **settings)

    full = build_method(FULL)
    plain = make_plain_copy(full.backbone)
    passes = [make_forward_pass(plain, batch) for batch in batches]

    def forward() -> None:
        for run_forward in passes:
            run_forward()

    with TemporaryDirectory() as folder:
        calls[FORWARD] = forward
        add(FULL, full)
        for config in ("lst", "last_layer"):
            add(config, build_method(config))
            add(f"{config}, cached: first epoch", build_method(config), empties_cache=True)
            in_ram, on_disk = build_method(config), build_method(config, cache_precision="bf16")
            in_ram.cache, on_disk.cache = in_ram.make_cache(), on_disk.make_cache(Path(folder))
            add(f"{config}, cached: later epochs", in_ram, cached_batches(in_ram.cache, batches))
            files = cached_batches(on_disk.cache, batches, device_bytes=0)
            add(f"{config}, cached in files, bf16: later epochs", on_disk, files)
        seconds = interleave(calls, rounds)
    return {name: median(measured) for name, measured in seconds.items()}
