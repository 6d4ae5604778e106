"""Side models: the architecture of a backbone at a fraction of its width."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lit_spu.backbones.stacks import Batch, TransformerStacks, has_module
from lit_spu.errors import UserError

LayerIndices = Sequence[Sequence[int]]
"""For each stack, the backbone's block for each block of the side model."""


class NoEmbeddings(nn.Module):
    """Replacement of an embedding module: return the embeddings among the arguments, or zero if there are none."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        tensors = (a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
        return next((t for t in tensors if t.dim() == 3 and t.is_floating_point()), torch.zeros(()))


def make_side_model(backbone: TransformerStacks, reduction: int, layer_indices: LayerIndices) -> TransformerStacks:
    """Return a new model of the backbone's architecture at 1/`reduction` of its width, with random weights.

    It has no embeddings: it runs on `blank_inputs`, and a hook must replace the input of its first block.

    Args:
        backbone: The stacks of the backbone.
        reduction: The backbone's width divided by the side model's.
        layer_indices: The blocks of each stack that have a counterpart in the side model.

    Raises:
        UserError: If `reduction` does not divide the widths.
    """
    from transformers import AutoModel

    family = backbone.family
    config = scaled_config(backbone, reduction, layer_indices)
    config.update({"vocab_size": 2, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None})
    model = AutoModel.from_config(config, dtype=torch.float32)
    for path in (*family.embeddings, *family.unused):
        if has_module(model, path):
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, NoEmbeddings() if path in family.embeddings else None)
    return type(backbone)(model, family)


def scaled_config(backbone: TransformerStacks, reduction: int, layer_indices: LayerIndices) -> Any:
    """Return the backbone's config at 1/`reduction` of its width. The number of attention heads is the same.

    Raises:
        UserError: If `reduction` does not divide the widths.
    """
    old, family = backbone.model.config, backbone.family
    widths = {name: getattr(old, name) for name in family.widths if getattr(old, name, None) is not None}
    head_dim = widths.get(family.head_dim or "", old.hidden_size // old.num_attention_heads)
    allowed = [
        r
        for r in range(1, head_dim + 1)
        if not any(w % r for w in widths.values()) and not head_dim % (r * family.architecture.head_dim_multiple)
    ]
    if reduction not in allowed:
        raise UserError(
            f"model.reduction={reduction} does not divide the backbone's widths ({widths}, {head_dim} per head) evenly."
            f" Allowed: {', '.join(map(str, allowed))}."
        )
    changes: dict[str, Any] = {name: width // reduction for name, width in widths.items()}
    changes |= {name: len(indices) for name, indices in zip(family.depths, layer_indices, strict=True)}
    if getattr(old, "layer_types", None):
        changes["layer_types"] = [old.layer_types[i] for i in layer_indices[0]]
    return type(old).from_dict({**copy.deepcopy(old.to_dict()), **changes})


def blank_inputs(side: TransformerStacks, inputs: Batch) -> dict[str, Tensor]:
    """Return a side model's inputs for the backbone's: zeros [batch, tokens, side width], and the same masks."""
    width, parameter = side.model.config.hidden_size, next(side.model.parameters())
    blank = {
        name.replace("input_ids", "inputs_embeds"): parameter.new_zeros(*tensor.shape, width)
        for name, tensor in inputs.items()
        if name.endswith("input_ids")
    }
    return blank | {name: tensor for name, tensor in inputs.items() if name.endswith("mask")}
