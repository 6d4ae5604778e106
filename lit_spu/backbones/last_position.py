"""The last block of an encoder at one position of each text.

A head reads the last block's output at one position. There, the query, the feed-forward and everything after them are
computed for this position alone; keys and values are computed for all. Logits and gradients are the same.

The position is the keyword argument `answer_position` of the base model. transformers hands unknown keyword arguments
on to all blocks. The override of the last block takes this one, and the other blocks ignore it.

A family opts in by its `self_attention`. The block runs transformers' own code at all positions where the shortcut does
not apply: with hooks that are not position-wise (see `hooks`), wrapped linear layers or rotary embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_spu.backbones.family import Family
from lit_spu.backbones.hooks import is_position_wise, override_forward, position_wise
from lit_spu.backbones.target_linears import Role, TargetLinear

LayerPaths = Mapping[Role, str]
"""By role, the paths of an attention module's linear layers in this module."""


def gather_position(hidden: Tensor, position: Tensor) -> Tensor:
    """Return the states [batch, 1, width] at one position [batch] of each text in `hidden` [batch, tokens, width]."""
    return hidden[torch.arange(len(hidden), device=hidden.device), position].unsqueeze(1)


def install(base_model: nn.Module, family: Family, targets: list[TargetLinear], num_heads: int) -> bool:
    """Let the last block run at the positions in `base_model(..., answer_position=position)`, if the family opts in.

    Args:
        base_model: The Hugging Face base model.
        family: Its family.
        targets: All target linears of the last block of the last stack.
        num_heads: Number of attention heads.

    Returns:
        Whether the base model accepts `answer_position` now.
    """
    is_causal = getattr(base_model.config, "is_decoder", False)  # then each position has a mask of its own
    if not family.self_attention or is_causal or any(target.num_parts > 1 for target in targets):
        return False
    block_list = base_model.get_submodule(family.stacks[-1])
    number = len(list(block_list.children())) - 1
    block = block_list.get_submodule(str(number))
    attention = block.get_submodule(family.self_attention)
    prefix = f"{family.stacks[-1]}.{number}.{family.self_attention}."
    layer_paths = {t.role: t.path.removeprefix(prefix) for t in targets if t.path.startswith(prefix)}
    override_forward(block, partial(_forward_block, block, attention, layer_paths))
    override_forward(attention, partial(_attend, attention, layer_paths, num_heads))
    return True


# The parameters before `forward` are bound by `install`; `override_forward` passes `forward` and the call's arguments.
@position_wise
def _forward_block(
    block: nn.Module,
    attention: nn.Module,
    layer_paths: LayerPaths,
    forward: Callable[..., Any],
    hidden: Tensor,
    attention_mask: Tensor | None = None,
    *args: Any,
    answer_position: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """Run a block on `hidden` [batch, tokens, width], at `answer_position` [batch] alone if that is possible.

    `attention_mask` is [batch, 1, queries, keys]. All queries of an encoder see the same keys, so the first one's row
    serves any position.
    """
    if answer_position is None or not _can_narrow(block, attention, layer_paths, attention_mask, kwargs):
        return forward(hidden, attention_mask, *args, **kwargs)
    mask = None if attention_mask is None else attention_mask[:, :, :1]
    return forward(gather_position(hidden, answer_position), mask, *args, all_hidden_states=hidden, **kwargs)


def _can_narrow(
    block: nn.Module, attention: nn.Module, layer_paths: LayerPaths, mask: Any, kwargs: Mapping[str, Any]
) -> bool:
    known_mask = mask is None or (isinstance(mask, Tensor) and mask.dim() == 4)
    plain_layers = all(isinstance(attention.get_submodule(path), nn.Linear) for path in layer_paths.values())
    return known_mask and plain_layers and "position_embeddings" not in kwargs and is_position_wise(block)


@position_wise
def _attend(
    attention: Any,
    layer_paths: LayerPaths,
    num_heads: int,
    forward: Callable[..., Any],
    hidden: Tensor,
    attention_mask: Tensor | None = None,
    *args: Any,
    all_hidden_states: Tensor | None = None,
    **kwargs: Any,
) -> Any:
    """Attend from `hidden` [batch, 1, width] to `all_hidden_states` [batch, tokens, width], which the block passes."""
    if all_hidden_states is None:
        return forward(hidden, attention_mask, *args, **kwargs)
    linear = {role: attention.get_submodule(path) for role, path in layer_paths.items()}
    states: dict[Role, Tensor] = {"query": hidden, "key": all_hidden_states, "value": all_hidden_states}
    query, key, value = (
        linear[role](state).unflatten(-1, (num_heads, -1)).transpose(1, 2) for role, state in states.items()
    )
    dropout = attention.dropout.p if attention.training else 0.0
    heads = F.scaled_dot_product_attention(query, key, value, attention_mask, dropout)
    context = heads.transpose(1, 2).flatten(2)
    return (linear["output"](context) if "output" in linear else context), None
