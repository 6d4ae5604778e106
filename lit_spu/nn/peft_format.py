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
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lit_spu.backbones.backbone import Backbone
from lit_spu.errors import UserError
from lit_spu.files import check_checksums
from lit_spu.nn.adapter import Adapter
from lit_spu.nn.lora import LowRank
from lit_spu.nn.peft_config import CONFIG, PeftConfig

WEIGHTS = "adapter_model.safetensors"
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

    The model then computes what the library computes with this folder.

    Raises:
        UserError: If there is no such folder, it does not fit these adapters, or it computes what they cannot.
    """
    check_checksums(folder)
    config = PeftConfig(folder)
    kind = "LORA" if isinstance(adapters[0], LowRank) else "IA3"
    if config.kind != kind:
        raise UserError(f"model.adapter: {folder} holds {config.kind}, but this method needs {kind}.")
    tensors = _read_tensors(folder)
    root = f"{backbone.model.base_model_prefix}."
    if hasattr(backbone.model, root[:-1]) and not any(name.startswith(root) for name in tensors):
        config.root, tensors = root, {root + name: tensor for name, tensor in tensors.items()}
    by_path: dict[str, list[Adapter]] = defaultdict(list)
    for adapter in adapters:
        by_path[backbone.full_path(adapter.target)].append(adapter)
    _check_targets(backbone, by_path, config, folder, tensors)
    for path, on_path in by_path.items():
        if kind == "LORA":
            pair = tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"]
            _init_pairs(on_path, path, config, *pair)
        else:
            _init_vectors(on_path, path, config, tensors[f"{path}.ia3_l"])
    _copy_saved_weights(backbone, config, folder, tensors)
    _warn_of_another_base(config.base_model, backbone.name, folder)


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a folder by their names in the whole model."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = folder / WEIGHTS
    if not file.is_file():
        pickled = file.with_suffix(".bin").is_file()
        advice = " Load the adapter_model.bin there with peft and save it again, as safetensors." if pickled else ""
        raise UserError(f"model.adapter: {file} is missing.{advice}")
    try:
        return {name.removeprefix(PREFIX): tensor for name, tensor in load_file(file).items()}
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"model.adapter: {file} cannot be read as safetensors: {error}") from error


def _check_targets(
    backbone: Backbone,
    by_path: Mapping[str, Sequence[Adapter]],
    config: PeftConfig,
    folder: Path,
    tensors: Mapping[str, Tensor],
) -> None:
    """Check that the folder's config, its weights and the adapters name the same linear layers."""
    found = {ADAPTER_WEIGHT.sub("", name) for name in tensors if ADAPTER_WEIGHT.search(name)}
    modules = (path for path, module in backbone.model.named_modules() if not isinstance(module, nn.ModuleList))
    chosen = {path for path in modules if config.targets(path)}
    if found != chosen:
        path = min(found ^ chosen)
        has, lacks = (config.file, WEIGHTS) if path in chosen else (folder / WEIGHTS, CONFIG)
        raise UserError(
            f"model.adapter: {has} has an adapter for {path}, and {lacks} has none: the adapter was made for another"
            " model, or one of its files was changed."
        )
    if found == set(by_path):
        return
    roles = {backbone.full_path(target): target.role for target in backbone.base_model.all_target_linears}
    names = ", ".join(dict.fromkeys(role for path, role in roles.items() if path in found))
    raise UserError(
        f"model.adapter: {folder} is for other linear layers than these settings: for"
        f" {f'those of the roles {names}' if names else 'none of this backbone'} ({min(found, default='none')}…)."
        f" {min(found ^ set(by_path))} is only in one of both."
    )


def _init_pairs(pairs: Sequence[Any], path: str, config: PeftConfig, a: Tensor, b: Tensor) -> None:
    """Initialise the pairs on one linear layer, one for each of its parts that has any, from its A and B."""
    num_parts, own, scale = pairs[0].target.num_parts, len(pairs[0].a), config.scale(path)
    outputs = len(pairs[0].b) * num_parts
    rank = config.rank(path)
    if a.shape != (rank, pairs[0].a.shape[1]) or b.shape != (outputs, rank):
        raise UserError(
            f"model.adapter: {path} has a pair of the shapes {list(a.shape)} and {list(b.shape)}; {config.file} and the"
            f" backbone need {[rank, pairs[0].a.shape[1]]} and {[outputs, rank]}."
        )
    in_blocks = rank == own * len(pairs) > own  # as `_pairs_to_peft` writes the pairs of several parts
    if (rank != own and not in_blocks) or not math.isclose(scale, pairs[0].scale):
        rank = rank // len(pairs) if in_blocks else rank
        raise UserError(
            f"model.adapter: at {path} the folder has rank {rank} and scale {scale:g}, these settings have"
            f" {own} and {pairs[0].scale:g}. Use --model.rank={rank} --model.alpha={scale * rank:g}, if all"
            " layers of the folder have the same."
        )
    unread = b.clone()
    for number, pair in enumerate(pairs):
        block = slice(number * own, (number + 1) * own) if in_blocks else slice(None)
        part = slice(pair.target.part * len(pair.b), (pair.target.part + 1) * len(pair.b))
        pair.a.copy_(a[block])
        pair.b.copy_(b[part, block])
        unread[part, block] = 0
    if unread.any():
        raise _whole_layer_error(path, config)


def _init_vectors(scales: Sequence[Any], path: str, config: PeftConfig, vector: Tensor) -> None:
    """Initialise the vectors on one linear layer, one for each of its parts that has any."""
    inputs, target = scales[0].inputs, scales[0].target
    shape = (1, -1) if inputs else (-1, 1)
    length = len(scales[0].scale) * (1 if inputs else target.num_parts)
    if config.scales_inputs(path) != inputs or vector.numel() != length or vector.shape != vector.view(shape).shape:
        side = "inputs" if config.scales_inputs(path) else "outputs"
        raise UserError(
            f"model.adapter: at {path} the folder scales the {side} by a vector {list(vector.shape)}, and these"
            f" settings scale the {'inputs' if inputs else 'outputs'}, of width {length}."
            f" Put the role {target.role} into --model.{side}."
        )
    unread = vector.flatten().clone()
    for scale in scales:
        part = unread if inputs else scale.target.select_outputs(unread)
        scale.scale.copy_(part)
        part.fill_(1)
    if (unread != 1).any():
        raise _whole_layer_error(path, config)


def _whole_layer_error(path: str, config: PeftConfig) -> UserError:
    return UserError(
        f"model.adapter: {config.file.parent} changes more of {path}, a fused layer, than the part that these settings"
        " adapt: use all of its roles."
    )


def _copy_saved_weights(backbone: Backbone, config: PeftConfig, folder: Path, tensors: Mapping[str, Tensor]) -> None:
    """Copy the weights of whole modules, such as a head, to the trained weights of the model."""
    own = dict(backbone.model.named_parameters())
    for name, tensor in tensors.items():
        if ADAPTER_WEIGHT.search(name):
            continue
        if name not in own or not own[name].requires_grad or own[name].shape != tensor.shape:
            raise UserError(
                f"model.adapter: {folder} also holds {name} {list(tensor.shape)}, which these settings do not train."
                " Use the task and the settings of that run, such as model.norms=true."
            )
        if not config.saves(name):
            raise UserError(f"model.adapter: {folder} also holds {name}, which modules_to_save in {CONFIG} lacks.")
        own[name].copy_(tensor)


def _warn_of_another_base(trained_on: str | None, name: str, folder: Path) -> None:
    """Warn if an adapter was trained on another model. A hub's name is that of a local copy of the same last name."""
    if not trained_on or trained_on == name or Path(trained_on).absolute() == Path(name).absolute():
        return
    are_folders = Path(trained_on).is_absolute() and Path(name).is_absolute()
    if are_folders or Path(trained_on).name.casefold() != Path(name).name.casefold():
        rank_zero_warn(
            f"model.adapter: {folder} was trained on {trained_on!r}, and model.backbone is {name!r}: unless they are"
            " the same model, its function is another one here."
        )
