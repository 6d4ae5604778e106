"""Time whole epochs on texts of different lengths, with and without the activation cache of side methods."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch

from benchmarks.data import random_texts
from benchmarks.methods import CONFIGS, FORWARD, FULL, make_forward_pass, make_plain_copy
from lit_spu.backbones.activation_cache import ActivationCache
from lit_spu.measure import interleave
from lit_spu.methods.base import Method
from lit_spu.methods.frozen import HiddenStateReader
from lit_spu.study.grid import build
from lit_spu.study.steps import training_step
from lit_spu.tasks import Task


def measure_epochs(backbone: Path, task: Task, rounds: int, texts: int = 640, batch_size: int = 32) -> dict[str, float]:
    """Return the processor seconds of an epoch by row: medians of interleaved rounds, with one thread."""
    torch.set_num_threads(1)
    batches = list(random_texts(texts, batch_size, vocabulary=16))
    calls: dict[str, Callable[[], None]] = {}

    def add(name: str, method: Method, cache: Callable[[], ActivationCache] | None = None) -> None:
        step, _ = training_step(method, batches[0])

        def epoch() -> None:
            if cache is not None and isinstance(method, HiddenStateReader):
                method.cache = cache()
            for batch in batches:
                step(batch)

        calls[name] = epoch

    def build_method(config: str) -> Method:
        return build(CONFIGS / f"{config}.yaml", backbone=str(backbone), task=task.name, reduction=8)

    full = build_method(FULL)
    plain = make_plain_copy(full.backbone)
    passes = [make_forward_pass(plain, batch) for batch in batches]

    def forward() -> None:
        for run_forward in passes:
            run_forward()

    with TemporaryDirectory() as folder:
        calls[FORWARD] = forward
        add(FULL, full)
        add("lst", build_method("lst"))
        fresh, in_ram, on_disk = (build_method("lst") for _ in range(3))
        ram_cache = ActivationCache(in_ram.backbone)
        disk_cache = ActivationCache(on_disk.backbone, Path(folder), "bf16")
        add("lst, cached: first epoch", fresh, lambda: ActivationCache(fresh.backbone))
        add("lst, cached: later epochs", in_ram, lambda: ram_cache)
        add("lst, cached in files, bf16: later epochs", on_disk, lambda: disk_cache)
        seconds = interleave(calls, rounds)
    return {name: median(measured) for name, measured in seconds.items()}
