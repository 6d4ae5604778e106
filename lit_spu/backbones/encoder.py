"""Encoders: BERT and its relatives, with a new classification head or their masked-language-model head."""

from __future__ import annotations

import inspect
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_spu.backbones.backbone import Backbone, Head
from lit_spu.backbones.stacks import Batch
from lit_spu.tasks import Format

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Encoder(Backbone):
    """One stack whose tokens attend to all tokens. With a prompt, it predicts the label word at the blank."""

    language_model = "MaskedLM"
    is_causal = False
    one_token_words = True  # a blank is one token

    @classmethod
    def prompt_format(cls, head: Head, tokenizer: PreTrainedTokenizerBase) -> tuple[Format, str]:
        return ("pair" if head == "classifier" else "cloze"), tokenizer.mask_token or ""

    def model_inputs(self, batch: Batch) -> dict[str, Tensor]:
        return {name: batch[name] for name in self.accepted_inputs if name in batch}

    @cached_property
    def accepted_inputs(self) -> list[str]:
        """Names of the model's arguments that a batch may hold. Not all models accept token types."""
        known = inspect.signature(self.base_model.model.forward).parameters
        return [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in known]

    def answer_position(self, batch: Batch) -> Tensor:
        if self.has_classifier:
            return torch.zeros_like(batch["input_ids"][:, 0])
        blanks: Tensor = batch["input_ids"] == self.encoding.tokenizer.mask_token_id
        return blanks.int().argmax(-1)
