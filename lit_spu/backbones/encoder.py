"""Encoders: BERT and its relatives, with a new classification head or the masked-language-model head they came with."""

from __future__ import annotations

import inspect
from functools import cached_property
from typing import TYPE_CHECKING

from torch import Tensor

from lit_spu.backbones.base import Backbone, Batch, Head
from lit_spu.tasks import Format

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Encoder(Backbone):
    """One stream that sees itself whole. With a prompt it answers at the blank."""

    language_model = "MaskedLM"
    causal = False
    whole_words = True  # as a blank is one token

    @classmethod
    def reads(cls, head: Head, tokenizer: PreTrainedTokenizerBase) -> tuple[Format, str]:
        return ("pair" if head == "classifier" else "cloze"), tokenizer.mask_token or ""

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        return {name: batch[name] for name in self.accepted if name in batch}

    @cached_property
    def accepted(self) -> list[str]:
        """What of a batch the model reads; not all know token types."""
        known = inspect.signature(self.base_model.model.forward).parameters
        return [name for name in ("input_ids", "attention_mask", "token_type_ids") if name in known]

    def answer(self, batch: Batch) -> Tensor:
        blanks: Tensor = batch["input_ids"] == self.encoding.tokenizer.mask_token_id
        return blanks.int().argmax(-1)
