"""The table of model families: names of modules and settings, by Hugging Face `model_type`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from lit_spu.backbones.causal import Causal, RotaryCausal
from lit_spu.backbones.encoder import Encoder
from lit_spu.backbones.family import Family
from lit_spu.backbones.seq2seq import Seq2Seq

_BERT = Family(
    Encoder,
    stacks=("encoder.layer",),
    embeddings=("embeddings",),
    widths=("hidden_size", "intermediate_size"),
    classifier=("bert.pooler", "dropout", "classifier"),
    vocabulary=("cls.predictions.transform", "cls.predictions.decoder"),
    unused=("pooler",),
    self_attention="attention.self",
    target_linears={
        "query": ("attention.self.query",),
        "key": ("attention.self.key",),
        "value": ("attention.self.value",),
        "output": ("attention.output.dense",),
        "up": ("intermediate.dense",),
        "down": ("output.dense",),
    },
)
_SCORE = ("first", "score")
"""Classification head of causal models: a linear layer on the only state that a head gets."""

_LLAMA = Family(
    RotaryCausal,
    stacks=("layers",),
    embeddings=("embed_tokens",),
    widths=("hidden_size", "intermediate_size", "head_dim"),
    head_dim="head_dim",
    final_modules=("norm",),
    vocabulary=("lm_head",),
    classifier=_SCORE,
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
        self_attention="attention",
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
        position_offset=2,
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
        self_attention="",  # its attention also projects relative positions to queries and keys
        widths=("hidden_size", "intermediate_size", "pooler_hidden_size", "attention_head_size", "embedding_size"),
        head_dim="attention_head_size",
        classifier=("pooler", "dropout", "classifier"),
        unused=("encoder.conv",),  # it reads the embeddings beside the first block, whose input a side model replaces
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
        head_dim="d_kv",
        depths=("num_layers", "num_decoder_layers"),
        final_modules=("decoder.final_layer_norm", "decoder.dropout"),
        vocabulary=("lm_head",),
        classifier=("first", "classification_head"),
        cross_attention="layer.1.EncDecAttention",
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
        final_modules=("ln_f",),
        vocabulary=("lm_head",),
        classifier=_SCORE,
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
        hidden_size="word_embed_proj_dim",
        final_modules=("decoder.final_layer_norm", "decoder.project_out"),
        vocabulary=("lm_head",),
        classifier=_SCORE,
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
