"""Encoders: BERT and its relatives, with a new classification head or the masked-language-model head they came with."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor

from lit_spu.backbones.base import Backbone, Batch


class Encoder(Backbone):
    """One stream that sees itself whole. With a prompt it answers at the blank."""

    causal = False
    whole_words = True  # as a blank is one token

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        accepted = inspect.signature(self.stem.model.forward).parameters
        names = ("input_ids", "attention_mask", "token_type_ids")
        return {name: batch[name] for name in names if name in batch and name in accepted}

    def answer(self, hidden: Tensor, batch: Batch) -> Tensor:
        blanks = batch["input_ids"] == self.encoding.tokenizer.mask_token_id
        return hidden[torch.arange(len(hidden), device=hidden.device), blanks.int().argmax(-1)]
