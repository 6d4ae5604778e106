"""Step time and live bytes of every method, from one interleaved run."""

from __future__ import annotations

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

from lit_spu.backbones.activation_cache import ActivationCache
from lit_spu.measure import MIB, AcceleratorPeak, LiveBytes, interleave
from lit_spu.methods.base import Method
from lit_spu.methods.frozen import HiddenStateReader
from lit_spu.nn.ia3 import Scale
from lit_spu.nn.lora import LowRank
from lit_spu.study.grid import build, method_configs
from lit_spu.study.steps import live_bytes, training_step
from lit_spu.tasks import Task

CONFIGS = Path(__file__).parents[1] / "configs"
FORWARD, FULL, MEZO = "forward", "full", "mezo"
"""What all else is divided by: the plain backbone's forward pass without gradients, and the config of that name."""

Batch = dict[str, Tensor]


@dataclass(frozen=True)
class Cost:
    """What a step of one method costs. Ratios are to the forward pass and to full fine-tuning of the same run.

    `allocator_mib` is what the accelerator's own allocator says, above the loaded backbone as `above_mib` is.
    """

    name: str
    trainable: int
    milliseconds: float
    to_forward: float
    to_full: float
    above_mib: float
    memory_to_full: float
    allocator_mib: float | None = None


VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "full, recomputed": (FULL, {"gradient_checkpointing": True}),
    **{f"kladder, k={k}": ("kladder", {"k": k}) for k in (2, 3, 4)},
    "kladder, k=4, cross-attention": ("kladder", {"k": 4, "fusion": "cross_attention"}),
    "lst, kept": ("lst", {"gradient_checkpointing": False}),
    "lst, cached": ("lst", {"activation_cache": "memory"}),
    "kladder, cached": ("kladder", {"activation_cache": "memory"}),
    "mezo, rademacher": ("mezo", {"noise": "rademacher"}),
    "mezo, table": ("mezo", {"noise": "table"}),
    "mezo, gaussian": ("mezo", {"noise": "gaussian"}),
    "mezo, gaussian, seen rows": ("mezo", {"noise": "gaussian", "rows": "seen"}),
    "mezo_side, cached": ("mezo_side", {"activation_cache": "memory"}),
}
"""Rows beyond the configs' own: the config, and what is set otherwise."""


PEERS = ("lora", "ia3")
"""Configs that the peft library can do as well: each has a row of its own."""


def methods(backbone: Path, task: Task, configs: Path = CONFIGS, only: Sequence[str] = ("*",)) -> dict[str, Method]:
    """Every method that a config names, with that config's settings, on the backbone in that folder.

    Of the rows, those whose names match `only`, and full fine-tuning.
    """

    def wanted(name: str) -> bool:
        return name == FULL or any(fnmatchcase(name, pattern) for pattern in only)

    found: dict[str, Method] = {}
    for stem, path in method_configs([f"{configs}/*.yaml"]).items():
        for name, (config, changed) in {stem: (stem, {}), **VARIANTS}.items():
            if config == stem and wanted(name):
                torch.manual_seed(0)
                # the configs' reduction is for the narrow mini models, as are so many directions
                found[name] = build(
                    path, backbone=str(backbone), task=task.name, **{"reduction": 8, "directions": 1, **changed}
                )
    for name in PEERS:
        if name in found and wanted(f"{name} (peft)"):
            found[f"{name} (peft)"] = under_peft(found[name])
    if wanted(f"{MEZO} (published)"):  # a twin, whose weights the published algorithm writes
        found[f"{MEZO} (published)"] = build(configs / f"{MEZO}.yaml", backbone=str(backbone), task=task.name)
    if FULL not in found:
        raise FileNotFoundError(f"{configs}/{FULL}.yaml: the method that all others are compared with")
    return found


def under_peft(method: Method) -> Method:
    """The same pairs or vectors, of the peft library: what trains beside them, and how, stays the same."""
    import peft

    twin = build(CONFIGS / f"{FULL}.yaml", backbone=method.backbone.name, task=method.task.name)
    twin.backbone.freeze()
    adapters = {twin.backbone.full_path(adapter.target): adapter for adapter in method.adapters}
    pairs = [adapter for adapter in adapters.values() if isinstance(adapter, LowRank)]
    learns = {name for name, p in method.backbone.named_parameters() if p.requires_grad}
    config: peft.PeftConfig
    if pairs:
        rank = len(pairs[0].a)
        config = peft.LoraConfig(r=rank, lora_alpha=int(pairs[0].scale * rank), target_modules=list(adapters))
    else:
        inner = [name for name, adapter in adapters.items() if isinstance(adapter, Scale) and adapter.inputs]
        config = peft.IA3Config(target_modules=list(adapters), feedforward_modules=inner)
    parameters = dict(twin.backbone.named_parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the library asks transformers for what has another name now
        peft.get_peft_model(twin.backbone.model, config)  # puts its layers into the model
    for name in learns:
        parameters[name].requires_grad_(True)
    return twin


def four_passes(method: Method, batch: Batch, lr: float = 1e-6, epsilon: float = 1e-3) -> Callable[[], None]:
    """A step of MeZO as it was published (https://arxiv.org/abs/2305.17333, Algorithm 1), as a call.

    Noise is drawn anew and every weight written for +ε, for −2ε, for +ε and for the update.
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


def forward_pass(method: Method, batch: Batch) -> Callable[[], None]:
    """The plain backbone's forward pass as a call: all of every block, also where a method would leave some out."""
    backbone = method.backbone

    @torch.no_grad()
    def forward() -> None:
        hidden = backbone.base_model.forward(backbone.model_inputs(batch))
        backbone.apply_head(backbone.select_answer_state(hidden, batch))

    return forward


def growth(step: Callable[[], None], device: torch.device) -> int:
    """Bytes in tensors that a step takes beyond those before it, as the device's allocator counts them."""
    before = torch.accelerator.memory_allocated(device)
    peak = AcceleratorPeak(device)
    step()
    return peak.allocated_bytes() - before


def until_done(device: torch.device) -> float:
    """The time in seconds once a device has done all that it was given."""
    torch.accelerator.synchronize(device)
    return time.perf_counter()


def costs(found: Mapping[str, Method], batch: Batch, rounds: int) -> list[Cost]:
    """Measure all methods on one batch: live bytes over two steps (the second with optimizer state), then time.

    Live bytes are those above the loaded backbone: a method's own weights count. Time is the process's own, the median
    over the rounds, and ratios are medians of the rounds' ratios; both with one thread. On an accelerator it is the
    time that passes until the device is done. A cached step reads what the first kept: it is one of the second epoch
    and later.
    """
    torch.set_num_threads(1)
    device = batch["labels"].device
    backbone = next(iter(found.values())).backbone
    loaded = sum(t.untyped_storage().nbytes() for t in {*backbone.parameters(), *backbone.buffers()})
    calls: dict[str, Callable[[], None]] = {}
    above: dict[str, float] = {}
    allocated: dict[str, float] = {}
    for name, method in found.items():
        method.to(device)
        if isinstance(method, HiddenStateReader) and method.activation_cache:
            method.cache = ActivationCache(method.backbone)
        optimizers: list[torch.optim.Optimizer]
        if name == f"{MEZO} (published)":
            calls[name], optimizers = four_passes(method, batch), []
        else:
            calls[name], optimizers = training_step(method, batch)
        live = live_bytes(method, calls[name], optimizers)
        above[name] = (live.peak_bytes - loaded) / MIB
        if device.type != "cpu":
            allocated[name] = (live.entry_bytes - loaded + growth(calls[name], device)) / MIB
    plain = found[FULL]
    calls[FORWARD] = forward_pass(plain, batch)
    with LiveBytes(plain) as live:
        calls[FORWARD]()
    above[FORWARD] = live.above_bytes / MIB
    seconds = interleave(
        calls, rounds, clock=time.process_time if device.type == "cpu" else partial(until_done, device)
    )

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
            allocator_mib=allocated.get(name),
        )
        for name in sorted(calls, key=lambda name: median(seconds[name]))
    ]
