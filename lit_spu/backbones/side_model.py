"""Side models: the architecture of a backbone at a fraction of its width."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from lit_spu.backbones.stacks import Batch, TransformerStacks, has_module
from lit_spu.errors import UserError

LayerIndices = Sequence[Sequence[int]]
"""For each stack, the backbone's block for each block of the side model."""


class NoEmbeddings(nn.Module):
    """Replacement of an embedding module: return the embeddings among the arguments, or zero if there are none."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        tensors = (a for a in (*args, *kwargs.values()) if isinstance(a, Tensor))
        found = next((t for t in tensors if t.dim() == 3 and t.is_floating_point()), None)
        return torch.zeros(()) if found is None else found


def make_side_model(backbone: TransformerStacks, reduction: int, layer_indices: LayerIndices) -> TransformerStacks:
    """Return a new model of the backbone's architecture at 1/`reduction` of its width, with random weights.

    It has no embeddings: it runs on `blank_inputs`, and a hook must replace the input of its first block.

    Args:
        backbone: The stacks of the backbone.
        reduction: The backbone's width divided by the side model's.
        layer_indices: The blocks of each stack that have a counterpart in the side model.

    Raises:
        UserError: If `reduction` does not divide the widths, or a model of this width does not run.
    """
    from transformers import AutoModel

    family = backbone.family
    config = scaled_config(backbone, reduction, layer_indices)
    config.update({"vocab_size": 2, "pad_token_id": 0, "bos_token_id": None, "eos_token_id": None})
    with explain_narrow_model(backbone, reduction):
        model = AutoModel.from_config(config, dtype=torch.float32)
        for path in (*family.embeddings, *family.unused):
            if has_module(model, path):
                parent, _, name = path.rpartition(".")
                setattr(model.get_submodule(parent), name, NoEmbeddings() if path in family.embeddings else None)
        side = type(backbone)(model, family)
        _check_reads_block_inputs(side)
    return side


@contextmanager
def explain_narrow_model(backbone: TransformerStacks, reduction: int) -> Iterator[None]:
    """Context manager that turns any error of a narrow model into a UserError of one line."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # transformers raises many kinds for a config that no trained model has
        raise UserError(
            f"model.reduction={reduction}: a {backbone.model.config.model_type} of this config does not run at"
            f" 1/{reduction} of its width ({type(error).__name__}: {' '.join(str(error).split())[:200]}). Use a smaller"
            " reduction, or another method."
        ) from error


@torch.no_grad()
def _check_reads_block_inputs(side: TransformerStacks) -> None:
    """Check that a side model runs, and that its output depends on the inputs of its blocks, not on `blank_inputs`.

    Raises:
        UserError: If a module beside the blocks reads the blank inputs.
    """
    parameter = next(side.model.parameters())
    if is_fake(parameter) or parameter.is_meta:
        return
    was_training = side.model.training
    state = torch.linspace(-1, 1, 3 * side.model.config.hidden_size).view(1, 3, -1)
    handles = [
        stack.blocks[0].register_forward_pre_hook(lambda _, args: (state[:, : args[0].shape[1]], *args[1:]))
        for stack in side.stacks
    ]
    ids = torch.zeros(1, 3, dtype=torch.long)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if len(side.stacks) > 1:
        inputs["decoder_input_ids"] = ids[:, :1]
    blank = blank_inputs(side, inputs)
    other = {name: x + 1 if name.endswith("inputs_embeds") else x for name, x in blank.items()}
    try:
        side.model.eval()
        if not torch.equal(side.forward(blank), side.forward(other)):
            raise UserError(
                f"A {side.model.config.model_type} of this config reads its embeddings beside its blocks, which a side"
                " network cannot replace. Use another backbone or another method."
            )
    finally:
        side.model.train(was_training)
        for handle in handles:
            handle.remove()


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
    if rope := getattr(old, "rope_parameters", None):
        # a list has a factor for each frequency; those of a narrow head are every r-th of the wide head's
        changes["rope_parameters"] = {
            name: value[::reduction] if isinstance(value, list) else value for name, value in rope.items()
        }
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
