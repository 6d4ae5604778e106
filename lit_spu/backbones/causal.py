"""Causal models (GPT-2, OPT, Llama and relatives): they answer at the prompt's last token, before the answer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor

from lit_spu.backbones.backbone import Backbone, Head
from lit_spu.backbones.stacks import Batch
from lit_spu.tasks import Format

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Causal(Backbone):
    """One stack whose tokens attend to earlier ones. Texts are padded on the right, so no real token sees padding."""

    language_model = "CausalLM"
    is_causal = True

    @classmethod
    def prompt_format(cls, head: Head, tokenizer: PreTrainedTokenizerBase) -> tuple[Format, str]:
        return "prefix", ""

    def model_inputs(self, batch: Batch) -> dict[str, Tensor]:
        return {name: batch[name] for name in ("input_ids", "attention_mask")}

    def answer_position(self, batch: Batch) -> Tensor:
        return batch["attention_mask"].sum(-1) - 1


class RotaryCausal(Causal):
    """A causal model with rotary embeddings. They rotate pairs of coordinates, so the width of a head is even."""

    head_dim_multiple = 2
