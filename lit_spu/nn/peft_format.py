"""Adapter folders of the peft library (https://github.com/huggingface/peft): LoRA pairs and (IA)³ vectors.

A folder holds `adapter_config.json` and `adapter_model.safetensors`. The library itself is not needed.
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

from lit_spu.backbones.backbone import Backbone
from lit_spu.errors import UserError
from lit_spu.nn.adapter import Adapter
from lit_spu.nn.ia3 import Scale
from lit_spu.nn.lora import LowRank

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ADAPTER_WEIGHT = re.compile(r"\.(lora_[AB]\.weight|ia3_l)$")
PREFIX = "base_model.model."
TASKS = {"SequenceClassification": "SEQ_CLS", "Seq2SeqLM": "SEQ_2_SEQ_LM", "CausalLM": "CAUSAL_LM"}


def write_peft_folder(backbone: Backbone, adapters: Sequence[Adapter], folder: Path) -> None:
    """Write adapters, and the weights of the model that were trained with them.

    Raises:
        UserError: If the adapters are neither all LoRA pairs nor all (IA)³ vectors.
    """
    from safetensors.torch import save_file

    by_path: dict[str, list[Adapter]] = defaultdict(list)
    for adapter in adapters:
        by_path[backbone.full_path(adapter.target)].append(adapter)
    if not adapters or len({type(adapter) for adapter in adapters}) > 1:
        raise UserError("A peft folder holds either LoRA pairs or (IA)3 vectors: use another --format.")
    is_lora = isinstance(adapters[0], LowRank)
    config, tensors = (_pairs_to_peft if is_lora else _vectors_to_peft)(by_path)
    trained = {name: p for name, p in backbone.model.named_parameters() if p.requires_grad}
    # the library saves whole modules: a head's, or the one that a trained weight belongs to
    heads = [path for path in backbone.head_paths if backbone.has_classifier]
    saved_modules = {next((h for h in heads if name.startswith(f"{h}.")), name.rpartition(".")[0]) for name in trained}
    kind = "SequenceClassification" if backbone.has_classifier else backbone.language_model
    config |= {
        "task_type": TASKS.get(kind),
        "base_model_name_or_path": backbone.name,
        "target_modules": list(by_path),
        "modules_to_save": sorted(saved_modules) or None,
        "fan_in_fan_out": adapters[0].target.is_transposed,
        "inference_mode": True,
    }
    tensors |= trained
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    save_file({PREFIX + name: t.detach().contiguous() for name, t in tensors.items()}, folder / WEIGHTS)


def _pairs_to_peft(by_path: Mapping[str, Sequence[Any]]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return the config and tensors of one pair per linear layer.

    The pairs of a fused layer's parts become one pair of block matrices. Factors that `init_from_svd` has subtracted
    from W are appended with the opposite sign, because a peft folder applies to the original W.
    """
    tensors: dict[str, Tensor] = {}
    ranks, scales = {}, {}
    for path, pairs in by_path.items():
        rows, columns = [], []
        for pair in pairs:
            removed = [] if pair.removed_factors is None else [(pair.removed_factors[0], -pair.removed_factors[1])]
            for a, b in ((pair.a, pair.b), *removed):
                column = b.new_zeros(len(b) * pair.target.num_parts, b.shape[1])
                column[pair.target.part * len(b) :][: len(b)] = b.detach()
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


def _vectors_to_peft(by_path: Mapping[str, Sequence[Any]]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    tensors, feed_forward = {}, []
    for path, scales in by_path.items():
        target, inputs = scales[0].target, scales[0].inputs
        vector = scales[0].scale.new_ones(len(scales[0].scale) * target.num_parts)
        for scale in scales:
            vector[scale.target.part * len(scale.scale) :][: len(scale.scale)] = scale.scale.detach()
        tensors[f"{path}.ia3_l"] = vector.unsqueeze(0 if inputs else 1)
        feed_forward += [path] if inputs else []
    return {"peft_type": "IA3", "feedforward_modules": feed_forward}, tensors


@torch.no_grad()
def init_from_peft_folder(backbone: Backbone, adapters: Sequence[Adapter], folder: Path) -> None:
    """Initialise adapters, and the weights that are trained with them, from a folder of the peft library.

    Raises:
        UserError: If there is no such folder, or it does not fit these adapters.
    """
    from safetensors.torch import load_file

    try:
        config = json.loads((folder / CONFIG).read_text())
        tensors = {name.removeprefix(PREFIX): t for name, t in load_file(folder / WEIGHTS).items()}
    except (OSError, ValueError) as error:
        raise UserError(f"model.adapter: {folder} is no adapter folder of the peft library: {error}") from error
    kind = "LORA" if isinstance(adapters[0], LowRank) else "IA3"
    if config.get("peft_type") != kind:
        raise UserError(f"model.adapter: {folder} holds {config.get('peft_type')}, but this method needs {kind}.")
    _check_targets(backbone, adapters, folder, {ADAPTER_WEIGHT.sub("", n) for n in tensors if ADAPTER_WEIGHT.search(n)})
    for adapter in adapters:
        path = backbone.full_path(adapter.target)
        if isinstance(adapter, LowRank):
            _init_pair(adapter, path, config, tensors)
        elif isinstance(adapter, Scale):
            vector = tensors[f"{path}.ia3_l"].flatten()
            adapter.scale.copy_(vector if adapter.inputs else adapter.target.select_outputs(vector))
    own = dict(backbone.model.named_parameters())
    for name, tensor in tensors.items():
        if ADAPTER_WEIGHT.search(name):
            continue
        if name not in own or not own[name].requires_grad or own[name].shape != tensor.shape:
            raise UserError(
                f"model.adapter: {folder} also holds {name} {list(tensor.shape)}, which these settings do not train."
                " Use the task and the settings of that run, such as model.norms=true."
            )
        own[name].copy_(tensor)


def _check_targets(backbone: Backbone, adapters: Sequence[Adapter], folder: Path, found: set[str]) -> None:
    if found == {backbone.full_path(adapter.target) for adapter in adapters}:
        return
    roles = {backbone.full_path(target): target.role for target in backbone.base_model.all_target_linears}
    names = ", ".join(dict.fromkeys(role for path, role in roles.items() if path in found))
    raise UserError(
        f"model.adapter: {folder} is for other linear layers than these settings: for"
        f" {f'those of the roles {names}' if names else 'none of this backbone'} ({min(found, default='none')}…)."
    )


def _init_pair(pair: LowRank, path: str, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    a, whole = tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"]
    b = whole.chunk(pair.target.num_parts)[pair.target.part]
    rank = len(a)
    alpha = config.get("alpha_pattern", {}).get(path, config["lora_alpha"])
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    if rank == len(pair.a) * pair.target.num_parts and rank != len(pair.a):  # the parts of a fused layer, in blocks
        block = slice(pair.target.part * len(pair.a), (pair.target.part + 1) * len(pair.a))
        a, b = a[block], b[:, block]
    if a.shape != pair.a.shape or not math.isclose(scale, pair.scale):
        raise UserError(
            f"model.adapter: at {path} the folder has rank {len(a)} and scale {scale:g}, these settings have"
            f" {len(pair.a)} and {pair.scale:g}. Use --model.rank={len(a)} --model.alpha={scale * len(a):g}."
        )
    pair.a.copy_(a)
    pair.b.copy_(b)
