"""Step time and live bytes of every method, from one interleaved run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any, cast

import torch
import yaml
from torch import Tensor

from lit_spu import discovery
from lit_spu.measure import MIB, LiveBytes, interleave
from lit_spu.methods.base import Method
from lit_spu.tasks import Task

CONFIGS = Path(__file__).parents[1] / "configs"
FORWARD, FULL = "forward", "full"
"""What all else is divided by: the plain backbone's forward pass without gradients, and the config of that name."""

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Cost:
    """What a step of one method costs. Ratios are to the forward pass and to full fine-tuning of the same run."""

    name: str
    trainable: int
    milliseconds: float
    to_forward: float
    to_full: float
    above_mib: float
    memory_to_full: float


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "full, recomputed": (FULL, {"activation_checkpointing": True}),
    "kladder, k=2": ("kladder", {"k": 2}),
    "lst, kept": ("lst", {"activation_checkpointing": False}),
}
"""Rows beyond the configs' own: the config, and what is set otherwise."""


def methods(backbone: Path, task: Task, configs: Path = CONFIGS) -> dict[str, Method]:
    """Every method that a config names, with that config's settings, on the backbone in that folder."""
    classes = {cls.__name__: cls for cls in discovery.classes("lit_spu.methods")}
    found: dict[str, Method] = {}
    for path in sorted(configs.glob("*.yaml")):
        model = yaml.safe_load(path.read_text()).get("model", {})
        if "class_path" in model:
            cls = classes[model["class_path"].rpartition(".")[2]]
            settings = model.get("init_args", {}) | {"backbone": str(backbone), "task": task.name}
            settings.pop("reduction", None)  # the configs' is for the narrow mini models; here the default's
            for name, (config, changed) in {path.stem: (path.stem, {}), **VARIANTS}.items():
                if config == path.stem:
                    torch.manual_seed(0)
                    found[name] = cast(Method, cls(**settings | changed))
    if FULL not in found:
        raise FileNotFoundError(f"{configs}/{FULL}.yaml: the method that all others are compared with")
    return found


def batch_of(examples: int, tokens: int, task: Task) -> Batch:
    """Random tokens without padding."""
    generator = torch.Generator().manual_seed(0)
    return {
        "input_ids": torch.randint(7, 1000, (examples, tokens), generator=generator),
        "attention_mask": torch.ones(examples, tokens, dtype=torch.long),
        "labels": torch.randint(len(task.labels), (examples,), generator=generator),
        "index": torch.arange(examples),
    }


def trainer_step(method: Method, batch: Batch) -> tuple[Callable[[], None], list[torch.optim.Optimizer]]:
    """One training step as a call, and its optimizers: what the Trainer does, without what it logs.

    Gradients are dropped right after the update, which is kinder to full fine-tuning than Lightning's order is.
    """
    stand_in: Any = SimpleNamespace(estimated_stepping_batches=10_000)
    method.trainer = stand_in
    optimizer: torch.optim.Optimizer = method.configure_optimizers()["optimizer"]
    method.train()

    def step() -> None:
        method.loss(batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, [optimizer]


def forward_pass(method: Method, batch: Batch) -> Callable[[], None]:
    """The plain backbone's forward pass as a call."""
    backbone = method.backbone

    @torch.no_grad()
    def forward() -> None:
        backbone(batch)

    return forward


def costs(found: Mapping[str, Method], batch: Batch, rounds: int) -> list[Cost]:
    """Measure all methods on one batch: live bytes over two steps (the second with optimizer state), then time.

    Live bytes are those above the loaded backbone: a method's own weights count. Time is the process's own, the median
    over the rounds, and ratios are medians of the rounds' ratios; both with one thread.
    """
    torch.set_num_threads(1)
    backbone = next(iter(found.values())).backbone
    loaded = sum(t.untyped_storage().nbytes() for t in {*backbone.parameters(), *backbone.buffers()})
    calls: dict[str, Callable[[], None]] = {}
    above: dict[str, float] = {}
    for name, method in found.items():
        calls[name], optimizers = trainer_step(method, batch)
        peaks = []
        for _ in range(2):
            with LiveBytes(method, optimizers) as live:
                calls[name]()
            peaks.append(live.peak_bytes)
        above[name] = (max(peaks) - loaded) / MIB
    plain = found[FULL]
    calls[FORWARD] = forward_pass(plain, batch)
    with LiveBytes(plain) as live:
        calls[FORWARD]()
    above[FORWARD] = live.above_bytes / MIB
    seconds = interleave(calls, rounds)

    def ratio(name: str, to: str) -> float:
        return median(a / b for a, b in zip(seconds[name], seconds[to], strict=True))

    return [
        Cost(
            name=name,
            trainable=sum(p.numel() for p in found[name].parameters() if p.requires_grad) if name in found else 0,
            milliseconds=1000 * median(seconds[name]),
            to_forward=ratio(name, FORWARD),
            to_full=ratio(name, FULL),
            above_mib=above[name],
            memory_to_full=above[name] / above[FULL],
        )
        for name in sorted(calls, key=lambda name: median(seconds[name]))
    ]
