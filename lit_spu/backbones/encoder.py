"""Encoders: BERT and its relatives, with a new classification head or the masked-language-model head they came with."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lit_spu.backbones.base import Backbone, Batch
from lit_spu.errors import UserError


class Encoder(Backbone):
    """One stream that sees itself whole. With a prompt it answers at the blank."""

    causal = False

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        accepted = inspect.signature(self.stem.model.forward).parameters
        names = ("input_ids", "attention_mask", "token_type_ids")
        return {name: batch[name] for name in names if name in batch and name in accepted}

    def answer(self, hidden: Tensor, batch: Batch) -> Tensor:
        blanks = batch["input_ids"] == self.encoding.tokenizer.mask_token_id
        return hidden[torch.arange(len(hidden), device=hidden.device), blanks.int().argmax(-1)]

    def check_words(self, pieces: Mapping[str, Sequence[int]]) -> None:
        """A blank is one token, so a label word must be one too."""
        tokenizer = self.encoding.tokenizer
        for word, ids in pieces.items():
            if len(ids) != 1:
                raise UserError(
                    f"The label word {word!r} of {self.task.name} is {len(ids)} tokens in {self.name}"
                    f" ({' '.join(tokenizer.convert_ids_to_tokens(list(ids)))}), but a blank holds one."
                    " Give other label_words in the task's YAML file, or use model.head=classifier."
                )
