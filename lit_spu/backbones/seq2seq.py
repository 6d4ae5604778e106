"""Encoder-decoders (T5): the answer is the decoder's first token after its prefix, one forward for all labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_spu.backbones import t5_layers
from lit_spu.backbones.base import Backbone, Batch, Head, HiddenStates, TransformerStacks, instead
from lit_spu.backbones.cross_attention import answers_by_few, by_few
from lit_spu.tasks import Format

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SENTINEL = "<extra_id_0>"  # the blank of span corruption, in a text and in front of what fills it


class Seq2SeqStacks(TransformerStacks):
    """Two streams; the second attends to the first, without its keys and values where its own tokens are few."""

    def shrunk(self, reduction: int, keep: Sequence[Sequence[int]]) -> TransformerStacks:
        trunk = super().shrunk(reduction, keep)
        for block in trunk.stacks[-1]:  # here for good, for nobody else runs it
            attention = block.get_submodule(trunk.family.crosses)
            attention.forward = partial(by_few, attention, attention.forward)
        t5_layers.install(trunk.model)
        return trunk

    def run_at(self, inputs: Batch, position: Tensor) -> Tensor:
        with self._by_few():
            return super().run_at(inputs, position)

    def taps(self, inputs: Batch) -> tuple[HiddenStates, ...]:
        with self._by_few():
            return super().taps(inputs)

    @contextmanager
    def _by_few(self) -> Iterator[None]:
        with ExitStack() as stack:
            for block in self.stacks[-1]:
                attention = block.get_submodule(self.family.crosses)
                # a block that runs again in the backward pass does so as it is
                if not (getattr(block, "gradient_checkpointing", False) or answers_by_few(attention)):
                    stack.enter_context(instead(attention, partial(by_few, attention)))
            yield

    def run(self, inputs: Batch) -> Tensor:
        def of(prefix: str, name: str) -> dict[str, Tensor]:
            return {name: inputs[prefix + name]} if prefix + name in inputs else {}

        mask = inputs["attention_mask"]
        encoded = self.model.encoder(attention_mask=mask, **of("", "input_ids"), **of("", "inputs_embeds"))
        decoded = self.model.decoder(
            encoder_hidden_states=encoded.last_hidden_state,
            encoder_attention_mask=mask,
            use_cache=False,
            **of("decoder_", "input_ids"),
            **of("decoder_", "inputs_embeds"),
        )
        hidden: Tensor = decoded.last_hidden_state
        return hidden


class Seq2Seq(Backbone):
    """T5. Plainly asked it answers with the class's name, as it was trained to; prompted, with the label word."""

    language_model = "Seq2SeqLM"
    causal = True
    stacks_class = Seq2SeqStacks
    prefix: Tensor

    @classmethod
    def reads(cls, head: Head, tokenizer: PreTrainedTokenizerBase) -> tuple[Format, str]:
        return ("named" if head == "classifier" else "cloze"), SENTINEL

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        start = [self.model.config.decoder_start_token_id]
        sentinel = [self.encoding.tokenizer.convert_tokens_to_ids(SENTINEL)]
        prefix = start + sentinel if self.encoding.format == "cloze" else start
        self.register_buffer("prefix", torch.tensor(prefix), persistent=False)

    def inputs(self, batch: Batch) -> dict[str, Tensor]:
        ids = batch["input_ids"]
        prefix = self.prefix.expand(len(ids), -1)
        return {"input_ids": ids, "attention_mask": batch["attention_mask"], "decoder_input_ids": prefix}

    def answer(self, batch: Batch) -> Tensor:
        return torch.full_like(batch["input_ids"][:, 0], len(self.prefix) - 1)

    def head(self, state: Tensor) -> Tensor:
        config = self.model.config
        return super().head(state * config.d_model**-0.5 if config.scale_decoder_outputs else state)

    def wordings(self, head: Head) -> Sequence[Sequence[str]]:
        """Asked in its own way, its own names of the classes, if their first tokens tell them apart."""
        own = (self.task.labels,) if head == "classifier" and self.task.labels else ()
        return (*own, self.task.label_words)
