"""The one place that knows a model family's names: how each is laid out, and how one is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch._subclasses import FakeTensor

from lit_spu.backbones.base import Backbone, Family, Head
from lit_spu.backbones.causal import Causal, Rotary
from lit_spu.backbones.encoder import Encoder
from lit_spu.backbones.seq2seq import Seq2Seq
from lit_spu.errors import UserError, did_you_mean
from lit_spu.tasks import Encoding, Task

ASSETS = Path(__file__).parent / "assets"

_BERT = Family(
    Encoder,
    stacks=("encoder.layer",),
    embeddings=("embeddings",),
    widths=("hidden_size", "intermediate_size"),
    classifier=("bert.pooler", "dropout", "classifier"),
    vocabulary=("cls.predictions.transform", "cls.predictions.decoder"),
    unused=("pooler",),
    feed_forward="intermediate",
    target_linears={
        "query": ("attention.self.query",),
        "key": ("attention.self.key",),
        "value": ("attention.self.value",),
        "output": ("attention.output.dense",),
        "up": ("intermediate.dense",),
        "down": ("output.dense",),
    },
)
_LLAMA = Family(
    Rotary,
    stacks=("layers",),
    embeddings=("embed_tokens",),
    widths=("hidden_size", "intermediate_size", "head_dim"),
    head_width="head_dim",
    after=("norm",),
    vocabulary=("lm_head",),
    feed_forward="mlp",
    target_linears={
        "query": ("self_attn.q_proj",),
        "key": ("self_attn.k_proj",),
        "value": ("self_attn.v_proj",),
        "output": ("self_attn.o_proj",),
        "up": ("mlp.gate_proj", "mlp.up_proj"),
        "down": ("mlp.down_proj",),
    },
)

FAMILIES: Mapping[str, Family] = {
    "bert": _BERT,
    "distilbert": Family(
        Encoder,
        stacks=("transformer.layer",),
        embeddings=("embeddings",),
        widths=("dim", "hidden_dim"),
        depths=("n_layers",),
        classifier=("first", "pre_classifier", "relu", "dropout", "classifier"),
        vocabulary=("vocab_transform", "activation", "vocab_layer_norm", "vocab_projector"),
        feed_forward="ffn",
        target_linears={
            "query": ("attention.q_lin",),
            "key": ("attention.k_lin",),
            "value": ("attention.v_lin",),
            "output": ("attention.out_lin",),
            "up": ("ffn.lin1",),
            "down": ("ffn.lin2",),
        },
    ),
    "roberta": replace(
        _BERT,
        classifier=("classifier",),
        vocabulary=("lm_head.dense", "gelu", "lm_head.layer_norm", "lm_head.decoder"),
        reserved=2,
    ),
    "electra": replace(
        _BERT,
        embeddings=("embeddings", "embeddings_project"),
        widths=("hidden_size", "intermediate_size", "embedding_size"),
        classifier=("classifier",),
        vocabulary=("generator_predictions", "generator_lm_head"),
        unused=(),
    ),
    "deberta-v2": replace(
        _BERT,
        widths=("hidden_size", "intermediate_size", "pooler_hidden_size"),
        classifier=("pooler", "dropout", "classifier"),
        unused=(),
        target_linears={
            **_BERT.target_linears,
            "query": ("attention.self.query_proj",),
            "key": ("attention.self.key_proj",),
            "value": ("attention.self.value_proj",),
        },
    ),
    "t5": Family(
        Seq2Seq,
        stacks=("encoder.block", "decoder.block"),
        embeddings=("shared", "encoder.embed_tokens", "decoder.embed_tokens"),
        widths=("d_model", "d_ff", "d_kv"),
        head_width="d_kv",
        depths=("num_layers", "num_decoder_layers"),
        after=("decoder.final_layer_norm", "decoder.dropout"),
        vocabulary=("lm_head",),
        crosses="layer.1.EncDecAttention",
        target_linears={
            "query": ("layer.?.*Attention.q",),
            "key": ("layer.?.*Attention.k",),
            "value": ("layer.?.*Attention.v",),
            "output": ("layer.?.*Attention.o",),
            "up": ("layer.?.DenseReluDense.wi*",),
            "down": ("layer.?.DenseReluDense.wo",),
        },
    ),
    "gpt2": Family(
        Causal,
        stacks=("h",),
        embeddings=("wte", "wpe"),
        widths=("n_embd", "n_inner"),
        depths=("n_layer",),
        after=("ln_f",),
        vocabulary=("lm_head",),
        feed_forward="mlp",
        target_linears={
            "query": ("attn.c_attn:0/3",),
            "key": ("attn.c_attn:1/3",),
            "value": ("attn.c_attn:2/3",),
            "output": ("attn.c_proj",),
            "up": ("mlp.c_fc",),
            "down": ("mlp.c_proj",),
        },
    ),
    "opt": Family(
        Causal,
        stacks=("decoder.layers",),
        embeddings=("decoder.embed_tokens", "decoder.embed_positions", "decoder.project_in"),
        widths=("hidden_size", "ffn_dim", "word_embed_proj_dim"),
        output="word_embed_proj_dim",
        after=("decoder.final_layer_norm", "decoder.project_out"),
        vocabulary=("lm_head",),
        target_linears={
            "query": ("self_attn.q_proj",),
            "key": ("self_attn.k_proj",),
            "value": ("self_attn.v_proj",),
            "output": ("self_attn.out_proj",),
            "up": ("fc1",),
            "down": ("fc2",),
        },
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
}


def load_backbone(name: str, task: Task, head: Head = "classifier") -> Backbone:
    """The embedded mini model of that name, or the Hugging Face model of that folder or name, in fp32.

    Under torch's FakeTensorMode only its config and its tokenizer are read: shapes without weights.

    Raises:
        UserError: if there is no such model, its family is unknown, it lacks the weights or the head that is asked for,
            or its tokenizer cannot spell the label words.
    """
    source, local, config, tokenizer = read(name)
    family = FAMILIES.get(config.model_type)
    if family is None:
        raise UserError(
            f"model.backbone: {name!r} is of the family {config.model_type!r}, which has no Family record. Give it one"
            " in lit_spu/backbones/families.py (block lists, embeddings, widths, head and target linears), as for"
            f" {', '.join(FAMILIES)}."
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    form, mask = family.shape.reads(head, tokenizer)
    positions = getattr(config, "max_position_embeddings", None)  # a T5's are relative: it has no such setting
    max_tokens = positions and positions - family.reserved
    model, knows = load_model(source, name, family, task, head, local)
    backbone = family.shape(model, family, task, head, Encoding(tokenizer, form, mask, max_tokens), name)
    backbone.head_is_pretrained = knows
    return backbone


def read(name: str) -> tuple[str, bool, Any, Any]:
    """Where the model of that name lies, whether that is on this machine, its config and its tokenizer.

    Raises:
        UserError: if there is no such model.
    """
    from transformers import AutoConfig, AutoTokenizer

    embedded = {folder.name: str(folder) for folder in ASSETS.iterdir() if (folder / "config.json").is_file()}
    source = embedded.get(name, name)
    if not Path(source).is_dir() and "/" not in name and did_you_mean(name, embedded).startswith("Did"):
        raise UserError(f"model.backbone: there is no {name!r}. {did_you_mean(name, embedded)}")
    try:
        local = Path(source).is_dir() or not on_hub(source)
        config = AutoConfig.from_pretrained(source, local_files_only=local)
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=local)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.backbone: {name!r} is neither embedded ({', '.join(sorted(embedded))}), nor a folder with a Hugging"
            f" Face model, nor a model that the hub gives here: {str(error).splitlines()[0]}"
        ) from error
    return source, local, config, tokenizer


def load_model(source: str, name: str, family: Family, task: Task, head: Head, local: bool) -> tuple[Any, bool]:
    """The model, and whether its head came with it: only a new classification head may be missing from the weights."""
    import transformers

    classifies = head == "classifier" and bool(family.classifier)
    kind = "SequenceClassification" if classifies else family.shape.language_model
    auto = getattr(transformers, f"AutoModelFor{kind}")
    options: dict[str, Any] = {"num_labels": task.num_logits} if classifies else {}
    if isinstance(torch.empty(0), FakeTensor):
        config = transformers.AutoConfig.from_pretrained(source, local_files_only=local, **options)
        config.use_cache = False
        return auto.from_config(config).eval(), not classifies
    with quiet_loading():
        model, info = auto.from_pretrained(
            source, dtype=torch.float32, output_loading_info=True, local_files_only=local, **options
        )
    model.config.use_cache = False
    new = [path for path in family.classifier if "." in path or hasattr(model, path)] if classifies else []
    missing = [key for key in info["missing_keys"] if not any(key.startswith(f"{path}.") for path in new)]
    if missing:
        advice = "Use model.head=classifier, or a model with its language-model head." if not classifies else ""
        raise UserError(
            f"model.backbone: {name!r} lacks {len(missing)} of the weights that model.head={head} needs"
            f" ({', '.join(sorted(missing)[:3])}…): they would be random. {advice}"
        )
    return model, not info["missing_keys"]


def on_hub(name: str) -> bool:
    """Whether the hub has that model, asked once: the loaders ask an unreachable hub for half a minute."""
    from huggingface_hub import HfApi

    try:
        HfApi().model_info(name, timeout=5)
    except Exception:  # those of its transport too; the cache may have the model all the same
        return False
    return True


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Silence the report of new and unread weights: those of the heads are expected, and others are refused above."""
    from transformers.utils import logging

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
