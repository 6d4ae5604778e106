"""Encoder-decoders (T5): the answer is the decoder's first token after its prefix, in one pass for all labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_spu.backbones.backbone import Backbone, Head
from lit_spu.backbones.stacks import Batch, TransformerStacks
from lit_spu.tasks import Format

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SENTINEL = "<extra_id_0>"
"""T5's mask token, from span corruption: it marks the blank in a text, and precedes the words that fill it."""


class Seq2SeqStacks(TransformerStacks):
    """An encoder and a decoder. The decoder's cross-attention reads the encoder's last hidden states."""

    def forward(self, inputs: Batch) -> Tensor:
        """Return the decoder's last hidden states, without the vocabulary's logits of the model's own forward."""
        mask = inputs["attention_mask"]
        encoded = self.model.encoder(attention_mask=mask, **_select(inputs, ""))
        decoded = self.model.decoder(
            encoder_hidden_states=encoded.last_hidden_state,
            encoder_attention_mask=mask,
            use_cache=False,
            **_select(inputs, "decoder_"),
        )
        hidden: Tensor = decoded.last_hidden_state
        return hidden


def _select(inputs: Batch, prefix: str) -> dict[str, Tensor]:
    """Return the token ids or embeddings of the stack whose inputs start with this prefix."""
    return {name: inputs[prefix + name] for name in ("input_ids", "inputs_embeds") if prefix + name in inputs}


class Seq2Seq(Backbone):
    """T5. It reads its own prompt, and answers by a classification head or, as in its pretraining, by a label's name.

    It answers a template (head `prompt`) with a label word.
    """

    language_model = "Seq2SeqLM"
    knows_label_names = True
    has_own_answer_state = True
    is_causal = True
    stacks_class = Seq2SeqStacks
    prefix: Tensor

    @classmethod
    def prompt_format(cls, head: Head, tokenizer: PreTrainedTokenizerBase) -> tuple[Format, str]:
        return ("cloze" if head == "prompt" else "named"), SENTINEL

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        prefix = [self.model.config.decoder_start_token_id]
        if self.encoding.format == "cloze":
            prefix.append(self.encoding.tokenizer.convert_tokens_to_ids(SENTINEL))
        self.register_buffer("prefix", torch.tensor(prefix), persistent=False)

    def model_inputs(self, batch: Batch) -> dict[str, Tensor]:
        ids = batch["input_ids"]
        prefix = self.prefix.expand(len(ids), -1)
        return {"input_ids": ids, "attention_mask": batch["attention_mask"], "decoder_input_ids": prefix}

    def answer_position(self, batch: Batch) -> Tensor:
        return torch.full_like(batch["input_ids"][:, 0], len(self.prefix) - 1)

    def apply_head(self, state: Tensor) -> Tensor:
        config = self.model.config
        is_scaled = config.scale_decoder_outputs and not self.has_classifier
        return super().apply_head(state * config.d_model**-0.5 if is_scaled else state)

    def reference_logits(self, batch: Batch) -> Tensor:
        """Return the logits of transformers' class.

        Its classifier reads the decoder at the text's end-of-sequence token. A text of this token alone, beside the
        encoder's states, lets it read the decoder's first state.
        """
        if not self.has_classifier:
            return super().reference_logits(batch)
        inputs = self.model_inputs(batch)
        encoded = self.base_model.model.encoder(**_select(inputs, ""), attention_mask=inputs["attention_mask"])
        ends = torch.full_like(inputs["decoder_input_ids"], self.model.config.eos_token_id)
        logits: Tensor = self.model(**inputs | {"input_ids": ends}, encoder_outputs=encoded).logits
        return logits

    def label_word_candidates(self) -> Sequence[Sequence[str]]:
        """Return the names of the labels, if T5 answers its own prompt, and the task's label words."""
        own = (self.task.labels,) if self.head_type == "names" and self.task.labels else ()
        return (*own, self.task.label_words)
