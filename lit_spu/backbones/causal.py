"""Causal models (GPT-2, OPT, Llama and its like): the answer follows the last token of the prompt."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from lit_spu.backbones.base import Backbone, Batch, Head
from lit_spu.tasks import Format

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Causal(Backbone):
    """One stream that sees what came before; texts are padded on the right, so padding is never seen."""

    language_model = "CausalLM"
    causal = True

    @classmethod
    def reads(cls, head: Head, tokenizer: PreTrainedTokenizerBase) -> tuple[Format, str]:
        return "prefix", ""

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        return {name: batch[name] for name in ("input_ids", "attention_mask")}

    def answer(self, batch: Batch) -> Tensor:
        return batch["attention_mask"].sum(-1) - 1


class Rotary(Causal):
    """A causal model whose heads turn pairs of coordinates, so that a head's width is even."""

    pairs = 2
