"""Check of a family's record against transformers, on a loaded model: its logits, and the parts of fused layers."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import is_fake

from lit_spu.backbones.backbone import Backbone
from lit_spu.backbones.stacks import tensor_of
from lit_spu.errors import UserError

_AMPLIFIED = 1024.0
"""Factor on the input of the vocabulary's layer, so that a soft cap after it shows whatever the size of the logits."""
_TOLERANCE = 1e-3
"""Largest difference of two logits, relative to the largest logit."""


def check_record(backbone: Backbone) -> None:
    """Check that a backbone computes the logits of its Hugging Face model, and that its record names the right parts.

    It runs two texts of a few tokens twice, without gradients, and copies no weights: for 3 billion weights this takes
    seconds and tens of MiB. On a model without weights (fake tensors) it does nothing.

    Raises:
        UserError: If the model's logits are not finite, it has a step that its family's record lacks, or a part of a
            fused layer is another one.
    """
    if is_fake(next(backbone.model.parameters())):
        return
    was_training, task = backbone.training, backbone.task
    backbone.eval()
    backbone.task = replace(task, score_range=None) if not backbone.has_classifier else task  # plain logits
    try:
        if not _has_same_logits(backbone):
            raise _refusal(backbone, "a step after the blocks or at the head")
        if not _has_right_parts(backbone):
            raise _refusal(backbone, "another order of queries, keys and values in its fused layer")
    finally:
        backbone.task = task
        backbone.train(was_training)


def _refusal(backbone: Backbone, difference: str) -> UserError:
    return UserError(
        f"model.backbone: {backbone.name!r}: this {backbone.model.config.model_type} has {difference}, which lit_spu"
        " does not support: it would compute another function. Use a model of another family."
    )


def _probe(backbone: Backbone) -> dict[str, Tensor]:
    """Return two texts of different lengths, with the mask token if the backbone answers there."""
    tokenizer: Any = backbone.encoding.tokenizer
    answer = f" {backbone.encoding.mask}" if backbone.encoding.format == "cloze" else ""
    rows = [tokenizer(f"{text}{answer}").input_ids for text in ("It was", "the film . It was")]
    length = max(map(len, rows))
    ids = [row + [tokenizer.pad_token_id] * (length - len(row)) for row in rows]
    mask = [[1] * len(row) + [0] * (length - len(row)) for row in rows]
    return {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}


@torch.no_grad()
def _has_same_logits(backbone: Backbone) -> bool:
    batch = _probe(backbone)
    last = backbone.stacks[-1].blocks[-1]
    outputs: list[Any] = []
    handles = [last.register_forward_hook(lambda _, args, output: outputs.append(output))]
    if not backbone.has_classifier:
        vocabulary = backbone.model.get_submodule(backbone.base_model.family.vocabulary[-1])
        handles.append(vocabulary.register_forward_pre_hook(lambda _, args: (args[0] * _AMPLIFIED, *args[1:])))
    try:
        theirs = backbone.reference_logits(batch)
    finally:
        for handle in handles:
            handle.remove()
    state = backbone.base_model.apply_final_modules(tensor_of(outputs[0]))
    own = [backbone(batch), backbone.apply_head(backbone.select_answer_state(state, batch))]
    if not backbone.has_classifier:
        theirs = theirs[torch.arange(len(theirs)), backbone.answer_position(batch)][:, backbone.label_token_ids]
        _, bias = backbone.label_head_weights()
        own = [logits * _AMPLIFIED - (0 if bias is None else bias * (_AMPLIFIED - 1)) for logits in own]
    scale = float(theirs.abs().max())
    if not math.isfinite(scale):
        raise UserError(
            f"model.backbone: {backbone.name!r}: its logits are not finite, so some of its weights are NaN or infinite."
            " Download it again, or use another model."
        )
    return all(bool(((logits - theirs).abs() <= _TOLERANCE * scale).all()) for logits in own)


def _has_right_parts(backbone: Backbone) -> bool:
    """Check the first block's fused layer: with one token, the output depends on all values and on nothing else.

    A single token attends to itself with weight 1, whatever its query and key are. One token runs, with a gradient of
    this layer's output alone.
    """
    targets = [t for t in backbone.base_model.block_target_linears(0, 0, "query", "key", "value") if t.num_parts > 1]
    if not targets:
        return True
    outputs: list[Tensor] = []
    handle = targets[0].linear.register_forward_hook(lambda _, args, output: outputs.append(output))
    ids = _probe(backbone)["input_ids"][:1, :1]
    try:
        with torch.enable_grad():
            hidden = backbone.base_model.forward({"input_ids": ids, "attention_mask": torch.ones_like(ids)})
            (grad,) = torch.autograd.grad((hidden * torch.linspace(-1, 2, hidden.shape[-1])).sum(), outputs[0])
    finally:
        handle.remove()
    is_used = grad.abs() > 1e-6 * grad.abs().max()
    if grad.shape[-1] % targets[0].num_parts:
        return False
    shares = {target.role: float(target.select_outputs(is_used).float().mean()) for target in targets}
    return all(share > 0.95 if role == "value" else share == 0 for role, share in shares.items())
