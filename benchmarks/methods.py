"""Measure step time and live bytes of every method in one interleaved run."""

from __future__ import annotations

import copy
import math
import sys
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from lit_spu.backbones import Backbone
from lit_spu.backbones.activation_cache import ActivationCache
from lit_spu.measure import MIB, AcceleratorPeak, LiveBytes, interleave
from lit_spu.methods.base import Method
from lit_spu.methods.frozen import CachedBackbone
from lit_spu.methods.step_graphs import CudaRecorder
from lit_spu.nn.ia3 import Scale
from lit_spu.nn.lora import LowRank
from lit_spu.study.grid import build, method_configs
from lit_spu.study.steps import live_bytes, training_step
from lit_spu.tasks import Task

CONFIGS = Path(__file__).parents[1] / "configs"
FORWARD, FULL, MEZO = "forward", "full", "mezo"
"""Names of rows. Ratios are to the backbone's forward pass without gradients, and to full fine-tuning."""

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Cost:
    """Costs of a training step of one method, with ratios to the forward pass and to full fine-tuning of the same run.

    `above_mib` counts live bytes beyond the loaded backbone. `allocator_mib` is the same as reported by the
    accelerator's allocator. Live bytes of a captured step are NaN, because a replay shows no operators.
    """

    name: str
    trainable: int
    milliseconds: float
    to_forward: float
    to_full: float
    above_mib: float
    memory_to_full: float
    allocator_mib: float | None = None


CACHED = ("head", "readout", "readout_lora", "last_layer", "last_layers", "lora_top", "lst", "kladder", "mezo_side")
"""Configs with an additional row: the same method with an activation cache."""

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "full, recomputed": (FULL, {"gradient_checkpointing": True}),
    **{f"kladder, k={k}": ("kladder", {"k": k}) for k in (2, 3, 4)},
    "kladder, k=4, cross-attention": ("kladder", {"k": 4, "fusion": "cross_attention"}),
    "lst, nothing recomputed": ("lst", {"gradient_checkpointing": False}),
    **{f"{name}, cached": (name, {"activation_cache": "memory"}) for name in CACHED},
    "mezo, rademacher": ("mezo", {"noise": "rademacher"}),
    "mezo, gaussian": ("mezo", {"noise": "gaussian"}),
    "mezo, gaussian, seen rows": ("mezo", {"noise": "gaussian", "rows": "seen"}),
}
"""Additional rows: the name of a config, and the settings that differ from it."""

PEERS = ("lora", "ia3")
"""Configs with an additional row: the same method in the peft library."""


def build_methods(
    backbone: Path,
    task: Task,
    configs: Path = CONFIGS,
    only: Sequence[str] = ("*",),
    make: Callable[..., Method] = build,
) -> dict[str, Method]:
    """Build the methods of all configs and variants, by the name of their row.

    Args:
        backbone: Folder of the backbone.
        task: The task.
        configs: Folder of the config files.
        only: Patterns of row names. Other rows are skipped, except full fine-tuning.
        make: Function that builds the method of a config file.
    """

    def is_selected(name: str) -> bool:
        return name == FULL or any(fnmatchcase(name, pattern) for pattern in only)

    found: dict[str, Method] = {}
    for stem, path in method_configs([f"{configs}/*.yaml"]).items():
        for name, (config, changed) in {stem: (stem, {}), **VARIANTS}.items():
            if config == stem and is_selected(name):
                torch.manual_seed(0)
                # reduction and directions of the configs suit the narrow mini models
                found[name] = make(
                    path,
                    backbone=str(backbone),
                    task=task.name,
                    **{"reduction": 8, "directions": 1, **changed},
                )
    for name in PEERS:
        if name in found and is_selected(f"{name} (peft)"):
            found[f"{name} (peft)"] = build_peft_twin(found[name])
    if is_selected(f"{MEZO} (published)"):  # a separate instance: the published algorithm writes its weights
        found[f"{MEZO} (published)"] = build(configs / f"{MEZO}.yaml", backbone=str(backbone), task=task.name)
    if FULL not in found:
        raise FileNotFoundError(f"{configs}/{FULL}.yaml is missing: all methods are compared with it.")
    return found


def build_peft_twin(method: Method) -> Method:
    """Build the same method with adapters of the peft library. The other trained parameters stay the same."""
    import peft

    twin = build(CONFIGS / f"{FULL}.yaml", backbone=method.backbone.name, task=method.task.name)
    twin.backbone.freeze()
    adapters = {twin.backbone.full_path(adapter.target): adapter for adapter in method.adapters}
    low_rank = [adapter for adapter in adapters.values() if isinstance(adapter, LowRank)]
    trained = {name for name, p in method.backbone.named_parameters() if p.requires_grad}
    config: peft.PeftConfig
    if low_rank:
        rank = len(low_rank[0].a)
        config = peft.LoraConfig(r=rank, lora_alpha=int(low_rank[0].scale * rank), target_modules=list(adapters))
    else:
        on_inputs = [name for name, adapter in adapters.items() if isinstance(adapter, Scale) and adapter.inputs]
        config = peft.IA3Config(target_modules=list(adapters), feedforward_modules=on_inputs)
    parameters = dict(twin.backbone.named_parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft uses a deprecated name of transformers
        peft.get_peft_model(twin.backbone.model, config)  # inserts its layers into the model
    for name in trained:
        parameters[name].requires_grad_(True)
    return twin


def make_published_step(method: Method, batch: Batch, lr: float = 1e-6, epsilon: float = 1e-3) -> Callable[[], None]:
    """Return a function that runs a step of MeZO as published (https://arxiv.org/abs/2305.17333, Algorithm 1).

    It draws the noise again and writes every weight four times: for +ε, −2ε, +ε and the update.
    """
    parameters = [parameter for parameter in method.parameters() if parameter.requires_grad]

    def move(seed: int, scale: float) -> None:
        torch.manual_seed(seed)
        for parameter in parameters:
            parameter.data.add_(torch.randn_like(parameter), alpha=scale)

    @torch.no_grad()
    def step() -> None:
        method.eval()
        losses = []
        for scale in (epsilon, -2 * epsilon):
            move(0, scale)
            losses.append(method.loss(batch).item())
        move(0, epsilon)
        move(0, -lr * (losses[0] - losses[1]) / (2 * epsilon))

    return step


def make_step(name: str, method: Method, batch: Batch) -> tuple[Callable[[], None], list[torch.optim.Optimizer]]:
    """Return a function that runs a training step of a row, and the optimizers of the row."""
    if name == f"{MEZO} (published)":
        return make_published_step(method, batch), []
    return training_step(method, batch)


def open_cache(method: Method, batch: Batch) -> Batch:
    """Return the batch of a later epoch, for whose texts a method that is set to have a cache has one now."""
    if not isinstance(method, CachedBackbone) or not method.activation_cache:
        return batch
    method.cache = method.make_cache()
    return cached_batches(method.cache, [batch])[0]


def cached_batches(cache: ActivationCache, batches: Sequence[Batch], device_bytes: int = sys.maxsize) -> list[Batch]:
    """Cache the hidden states of batches, and return the batches as they are in later epochs.

    Args:
        cache: A new cache.
        batches: The batches.
        device_bytes: Memory of the device that the cache may take.
    """
    on_host = [{name: tensor.cpu() for name, tensor in batch.items()} for batch in batches]
    cache.plan(on_host, device_bytes=device_bytes)
    with torch.no_grad():
        for batch in batches:
            cache(batch)
    return [{name: tensor.to(cache.device) for name, tensor in batch.items()} for batch in cache.prepare(on_host)]


def make_plain_copy(backbone: Backbone) -> Backbone:
    """Return a copy of a backbone that runs transformers' own code, without this library's shortcuts."""
    plain = copy.deepcopy(backbone)
    for module in plain.modules():
        vars(module).pop("forward", None)
    return plain


def make_forward_pass(backbone: Backbone, batch: Batch) -> Callable[[], None]:
    """Return a function that runs a backbone at all positions, without gradients."""

    @torch.no_grad()
    def forward() -> None:
        hidden = backbone.base_model.forward(backbone.model_inputs(batch))
        backbone.apply_head(backbone.select_answer_state(hidden, batch))

    return forward


def growth(step: Callable[[], None], device: torch.device) -> int:
    """Return the peak growth of allocated bytes during a step, as counted by the device's allocator."""
    before = torch.accelerator.memory_allocated(device)
    peak = AcceleratorPeak(device)
    step()
    return peak.peak_bytes()[0] - before


def synchronized_time(device: torch.device) -> float:
    """Wait until the device has finished its work, and return the time in seconds."""
    torch.accelerator.synchronize(device)
    return time.perf_counter()


def measure_costs(methods: Mapping[str, Method], batch: Batch, rounds: int) -> list[Cost]:
    """Measure all methods on one batch: live bytes over two steps (the second with optimizer state), then time.

    Live bytes are those beyond the loaded backbone, so a method's own weights count. Times are processor times with one
    thread, or on an accelerator the time until the device has finished. A time is the median over the rounds, a ratio
    the median of the ratios in each round. A row with an activation cache shows a step of the second or a later epoch.
    """
    torch.set_num_threads(1)
    device = batch["labels"].device
    backbone = next(iter(methods.values())).backbone
    loaded = sum(t.untyped_storage().nbytes() for t in {*backbone.parameters(), *backbone.buffers()})
    calls: dict[str, Callable[[], None]] = {}
    above: dict[str, float] = {}
    allocated: dict[str, float] = {}
    for name, method in methods.items():
        own_batch = open_cache(method.to(device), batch)
        calls[name], optimizers = make_step(name, method, own_batch)
        live = live_bytes(method, calls[name], optimizers)
        above[name] = (live.peak_bytes - loaded) / MIB
        if device.type != "cpu":
            allocated[name] = (live.entry_bytes - loaded + growth(calls[name], device)) / MIB
        if device.type == "cuda" and optimizers:
            replay, _ = training_step(method, own_batch, CudaRecorder())
            grown = max(growth(replay, device) for _ in range(2))  # the second step is captured
            if method.graphs and method.graphs.num_replays:
                calls[f"{name}, graph"] = replay
                allocated[f"{name}, graph"] = (live.entry_bytes - loaded + grown) / MIB
    full = methods[FULL]
    plain = make_plain_copy(full.backbone)
    calls[FORWARD] = make_forward_pass(plain, batch)
    with LiveBytes(plain) as live:
        calls[FORWARD]()
    above[FORWARD] = live.above_bytes / MIB
    seconds = interleave(
        calls, rounds, clock=time.process_time if device.type == "cpu" else partial(synchronized_time, device)
    )

    def ratio(name: str, to: str) -> float:
        return median(a / b for a, b in zip(seconds[name], seconds[to], strict=True))

    trainable = {name: sum(p.numel() for p in m.parameters() if p.requires_grad) for name, m in methods.items()}
    return [
        Cost(
            name=name,
            trainable=trainable.get(name.removesuffix(", graph"), 0),
            milliseconds=1000 * median(seconds[name]),
            to_forward=ratio(name, FORWARD),
            to_full=ratio(name, FULL),
            above_mib=above.get(name, math.nan),
            memory_to_full=above.get(name, math.nan) / above[FULL],
            allocator_mib=allocated.get(name),
        )
        for name in sorted(calls, key=lambda name: median(seconds[name]))
    ]
