"""The folders of the peft library (https://github.com/huggingface/peft): how pairs and vectors leave, and come back.

A folder holds `adapter_config.json` and `adapter_model.safetensors`. Neither way needs the library.
"""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_spu.backbones.base import Backbone
from lit_spu.errors import UserError
from lit_spu.nn.adapter import Adapter
from lit_spu.nn.ia3 import Scale
from lit_spu.nn.lora import LowRank

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PART = re.compile(r"\.(lora_[AB]\.weight|ia3_l)$")
PREFIX = "base_model.model."
TASKS = {"SequenceClassification": "SEQ_CLS", "Seq2SeqLM": "SEQ_2_SEQ_LM", "CausalLM": "CAUSAL_LM"}


def write(backbone: Backbone, adapters: Sequence[Adapter], folder: Path) -> None:
    """Write adapters, and what of the model was trained beside them.

    Raises:
        UserError: if they are not all pairs, or all vectors.
    """
    from safetensors.torch import save_file

    by_path: dict[str, list[Adapter]] = defaultdict(list)
    for adapter in adapters:
        by_path[backbone.path(adapter.target)].append(adapter)
    if not adapters or len({type(adapter) for adapter in adapters}) > 1:
        raise UserError("Only low-rank pairs or (IA)3 vectors go into a peft folder: use another --format.")
    lora = isinstance(adapters[0], LowRank)
    config, tensors = (_pairs if lora else _vectors)(by_path)
    trained = {name: p for name, p in backbone.model.named_parameters() if p.requires_grad}
    # the library wraps a head whole, as it does by itself
    heads = [path for path in backbone.head_path if backbone.classifies]
    beside = {next((h for h in heads if name.startswith(f"{h}.")), name.rpartition(".")[0]) for name in trained}
    kind = "SequenceClassification" if backbone.classifies else backbone.language_model
    config |= {
        "task_type": TASKS.get(kind),
        "base_model_name_or_path": backbone.name,
        "target_modules": list(by_path),
        "modules_to_save": sorted(beside) or None,
        "fan_in_fan_out": adapters[0].target.transposed,
        "inference_mode": True,
    }
    tensors |= trained
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    save_file({PREFIX + name: t.detach().contiguous() for name, t in tensors.items()}, folder / WEIGHTS)


def _pairs(by_path: Mapping[str, Sequence[Any]]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """One pair for each linear: the parts of a fused one stand in blocks, and what SVD took from W is given back."""
    tensors: dict[str, Tensor] = {}
    ranks, scales = {}, {}
    for path, pairs in by_path.items():
        rows, columns = [], []
        for pair in pairs:
            for a, b in ((pair.a, pair.b), *([] if pair.taken is None else [(pair.taken[0], -pair.taken[1])])):
                column = b.new_zeros(len(b) * pair.target.slots, b.shape[1])
                column[pair.target.slot * len(b) :][: len(b)] = b.detach()
                rows.append(a)
                columns.append(column)
        tensors |= {f"{path}.lora_A.weight": torch.cat(rows), f"{path}.lora_B.weight": torch.cat(columns, 1)}
        ranks[path], scales[path] = sum(len(a) for a in rows), pairs[0].scale
    rank, scale = max(ranks.values(), key=list(ranks.values()).count), next(iter(scales.values()))
    others = {path: other for path, other in ranks.items() if other != rank}
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": scale * rank,
        "lora_dropout": next(iter(by_path.values()))[0].dropout.p,
        "bias": "none",
        "rank_pattern": others,
        "alpha_pattern": {path: scale * other for path, other in others.items()},
    }
    return config, tensors


def _vectors(by_path: Mapping[str, Sequence[Any]]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors, inner = {}, []
    for path, scales in by_path.items():
        target, inputs = scales[0].target, scales[0].inputs
        vector = scales[0].scale.new_ones(len(scales[0].scale) * target.slots)
        for scale in scales:
            vector[scale.target.slot * len(scale.scale) :][: len(scale.scale)] = scale.scale.detach()
        tensors[f"{path}.ia3_l"] = vector.unsqueeze(0 if inputs else 1)
        inner += [path] if inputs else []
    return {"peft_type": "IA3", "feedforward_modules": inner}, tensors


@torch.no_grad()
def read(backbone: Backbone, adapters: Sequence[Adapter], folder: Path) -> None:
    """Start adapters, and what is trained beside them, from a folder of the peft library's.

    Raises:
        UserError: if there is none, or it does not fit these adapters: with the settings that do.
    """
    from safetensors.torch import load_file

    try:
        config = json.loads((folder / CONFIG).read_text())
        tensors = {name.removeprefix(PREFIX): t for name, t in load_file(folder / WEIGHTS).items()}
    except (OSError, ValueError) as error:
        raise UserError(f"model.adapter: {folder} is no adapter folder of the peft library: {error}") from error
    kind = "LORA" if isinstance(adapters[0], LowRank) else "IA3"
    if config.get("peft_type") != kind:
        raise UserError(f"model.adapter: {folder} holds {config.get('peft_type')}, where {kind} is asked for.")
    theirs = {PART.sub("", name) for name in tensors if PART.search(name)}
    if theirs != {backbone.path(adapter.target) for adapter in adapters}:
        here = {backbone.path(target): target.role for target in backbone.base_model.all_target_linears}
        roles = ", ".join(dict.fromkeys(role for path, role in here.items() if path in theirs))
        raise UserError(
            f"model.adapter: {folder} is for other linears than these settings: for"
            f" {f'those of the roles {roles}' if roles else 'none of this backbone'} ({min(theirs, default='none')}…)."
        )
    for adapter in adapters:
        if isinstance(adapter, LowRank):
            _start_pair(adapter, backbone.path(adapter.target), config, tensors)
        elif isinstance(adapter, Scale):
            vector = tensors[f"{backbone.path(adapter.target)}.ia3_l"].flatten()
            adapter.scale.copy_(adapter.target.outputs(vector) if not adapter.inputs else vector)
    own = dict(backbone.model.named_parameters())
    for name, tensor in tensors.items():
        if PART.search(name):
            continue
        if name not in own or not own[name].requires_grad or own[name].shape != tensor.shape:
            raise UserError(
                f"model.adapter: {folder} trained {name} {list(tensor.shape)} as well, which is not trained so here."
                " Give the task and the settings of that run, such as model.norms=true."
            )
        own[name].copy_(tensor)


def _start_pair(pair: LowRank, path: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    a, whole = tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"]
    b = whole.chunk(pair.target.slots)[pair.target.slot]
    rank = len(a)
    alpha = config.get("alpha_pattern", {}).get(path, config["lora_alpha"])
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    if rank == len(pair.a) * pair.target.slots and rank != len(pair.a):  # the parts of a fused linear, in blocks
        block = slice(pair.target.slot * len(pair.a), (pair.target.slot + 1) * len(pair.a))
        a, b = a[block], b[:, block]
    if a.shape != pair.a.shape or not math.isclose(scale, pair.scale):
        raise UserError(
            f"model.adapter: at {path} its rank is {len(a)} and its scale {scale:g}, here they are {len(pair.a)} and"
            f" {pair.scale:g}. Give --model.rank={len(a)} --model.alpha={scale * len(a):g}."
        )
    pair.a.copy_(a)
    pair.b.copy_(b)
