"""Whole epochs on texts of many lengths: what the cache of a side method saves."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

import torch

from benchmarks.data import random_texts
from benchmarks.methods import CONFIGS, FORWARD, FULL, forward_pass
from lit_spu.backbones.activation_cache import ActivationCache
from lit_spu.measure import interleave
from lit_spu.methods.base import Method
from lit_spu.methods.frozen import HiddenStateReader
from lit_spu.study.grid import build
from lit_spu.study.steps import training_step
from lit_spu.tasks import Task


def epochs(backbone: Path, task: Task, rounds: int, texts: int = 640, batch_size: int = 32) -> dict[str, float]:
    """Processor seconds of an epoch, by row: medians of interleaved rounds, with one thread."""
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

    def made(config: str) -> Method:
        return build(CONFIGS / f"{config}.yaml", backbone=str(backbone), task=task.name, reduction=8)

    full = made(FULL)
    passes = [forward_pass(full, batch) for batch in batches]

    def forward() -> None:
        for run in passes:
            run()

    with TemporaryDirectory() as folder:
        calls[FORWARD] = forward
        add(FULL, full)
        add("lst", made("lst"))
        fresh, filled, filed = (made("lst") for _ in range(3))
        in_memory, in_files = ActivationCache(filled.backbone), ActivationCache(filed.backbone, Path(folder), "bf16")
        add("lst, cached: first epoch", fresh, lambda: ActivationCache(fresh.backbone))
        add("lst, cached: later epochs", filled, lambda: in_memory)
        add("lst, cached in files, bf16: later epochs", filed, lambda: in_files)
        seconds = interleave(calls, rounds)
    return {name: median(found) for name, found in seconds.items()}
