"""The record of a model family: names of its modules and settings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

from lit_spu.backbones.target_linears import Role


class Architecture:
    """Properties of an architecture. `Backbone` inherits them; apart from it, a `Family` needs no import of it."""

    language_model: ClassVar[str]  # suffix of transformers' class with a language-model head, AutoModelFor…
    knows_label_names: ClassVar[bool] = False  # whether it was pretrained to answer tasks by the names of their labels
    is_causal: ClassVar[bool]  # whether tokens of the last stack attend to earlier tokens only
    has_own_answer_state: ClassVar[bool] = False  # whether transformers' class with a classifier reads another state
    head_dim_multiple: ClassVar[int] = 1  # the width of an attention head is a multiple of this


@dataclass(frozen=True)
class Family:
    """Names of the modules and settings of one Hugging Face `model_type`.

    Paths of modules start at the base model, except for the two heads, where they start at the model with the head.
    The paths of a block's modules start at the block. A head is a chain of modules and of functions in
    `backbone.HEAD_FUNCTIONS`; `vocabulary` ends in the linear layer over the vocabulary, `classifier` in that over the
    labels.
    """

    architecture: type[Architecture]
    stacks: tuple[str, ...]  # the lists of blocks, in the order in which they run
    embeddings: tuple[str, ...]  # modules before the blocks; a side model has none
    widths: tuple[str, ...]  # settings that a side model divides by its reduction
    vocabulary: tuple[str, ...]  # language-model head: from one hidden state to the logits of the vocabulary
    classifier: tuple[str, ...]  # classification head: from states [batch, 1, width] to the logits [batch, labels]
    depths: tuple[str, ...] = ("num_hidden_layers",)  # settings for the number of blocks of each stack
    head_dim: str | None = None  # the setting for the width of one attention head, if there is one
    hidden_size: str = "hidden_size"  # the setting for the width of the last hidden states
    final_modules: tuple[str, ...] = ()  # modules after the last block of the last stack
    unused: tuple[str, ...] = ()  # modules of the base model that a side model does not need
    position_offset: int = 0  # position embeddings that no token uses
    # Path of a block's self-attention module. If set, the last block can run at one position (see `last_position`).
    # The module must compute queries, keys and values by separate linear layers, without rotary embeddings.
    self_attention: str = ""
    # Path of a block's cross-attention module, a T5Attention (see `absorbed_cross_attention`).
    cross_attention: str = ""
    # Name patterns of a block's linear layers by role; `c_attn:1/3` is the second third of a fused layer's outputs.
    target_linears: Mapping[Role, tuple[str, ...]] = field(default_factory=dict)
