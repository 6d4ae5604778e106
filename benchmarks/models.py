"""Make backbones of real size with random weights from their configs, without downloads."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lit_spu.backbones.tokenizer_check import PROBE
from lit_spu.tasks import Task

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

SPECIAL = ("<pad>", "</s>", "<unk>", "[CLS]", "[SEP]", "[MASK]", "<extra_id_0>")


def configs() -> Mapping[str, PreTrainedConfig]:
    """Return the configs by name, without dropout: its masks would be noise in time and memory."""
    from transformers import DistilBertConfig, T5Config

    t5 = T5Config(dropout_rate=0.0)
    t5.decoder_start_token_id = t5.pad_token_id
    return {
        "DistilBERT-base": DistilBertConfig(dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0),
        "T5-small": t5,
    }


def narrow_configs() -> Mapping[str, PreTrainedConfig]:
    """Return configs of the same depth and a fraction of the width: their steps have the same operators."""
    from transformers import DistilBertConfig

    config = DistilBertConfig(
        dim=96, hidden_dim=384, vocab_size=1000, dropout=0.0, attention_dropout=0.0, seq_classif_dropout=0.0
    )
    t5 = configs()["T5-small"]
    t5.update({"d_model": 64, "d_ff": 128, "d_kv": 8, "vocab_size": 1000})
    return {"DistilBERT-base": config, "T5-small": t5}


def save(config: PreTrainedConfig, folder: Path, task: Task) -> Path:
    """Save a backbone in Hugging Face layout: random weights, and a tokenizer that knows the task's label words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForMaskedLM, AutoModelForSeq2SeqLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    torch.manual_seed(0)
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForMaskedLM
    logging.disable_progress_bar()
    auto.from_config(config).save_pretrained(folder)  # type: ignore[no-untyped-call]
    words = " ".join((PROBE, *task.labels, *task.label_words)).split()
    vocabulary = {word: index for index, word in enumerate(dict.fromkeys((*SPECIAL, *words)))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        extra_special_tokens=["<extra_id_0>"],
    ).save_pretrained(folder)
    return folder
