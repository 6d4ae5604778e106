"""Fixtures and helpers of all tests."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

FAMILIES = (
    "bert",
    "distilbert",
    "roberta",
    "electra",
    "deberta-v2",
    "t5",
    "t5-gated",
    "gpt2",
    "opt",
    "opt-projected",
    "llama",
    "qwen2",
)

_TEXT = """[PAD] [UNK] [CLS] [SEP] [MASK] </s> <extra_id_0> great terrible Yes No Maybe negative positive entailment
neutral contradiction It was . ? , : the film a dull bright story sst2 stsb mnli sentence sentence1 sentence2 not good
bad"""
WORDS = tuple(_TEXT.split())


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Restore the environment variables after each test.

    Lightning sets LOCAL_RANK when it starts with a distributed strategy. A later test that starts two processes would
    inherit it, and its first process would wait for a second one that nobody starts.
    """
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data and models beside the project; tests that need it skip where it is absent."""
    folder = Path(__file__).parents[1].parent / "shared"
    if not (folder / "glue").is_dir():
        pytest.skip("no real data beside the project: ../shared/glue is absent")
    return folder


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    """Return the folder of a tiny random model of a family, with a word-level tokenizer; made once a session."""
    made: dict[str, str] = {}

    def folder(family: str) -> str:
        if family not in made:
            path = tmp_path_factory.mktemp(family)
            tiny_tokenizer(family).save_pretrained(path)
            with torch.random.fork_rng():  # a test draws the same whether it is the first to ask or not
                tiny_model(family).save_pretrained(path)
            made[family] = str(path)
        return made[family]

    return folder


def tiny_tokenizer(family: str) -> Any:
    """A tokenizer of whole words that adds the family's special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    if family in ("qwen2", "qwen3"):  # its own tokenizer class is loaded whatever the folder names
        return tiny_byte_tokenizer()
    ids = {word: i for i, word in enumerate(WORDS)}
    tokenizer = Tokenizer(models.WordLevel(ids, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "[UNK]", "pad_token": "[PAD]", "eos_token": "</s>", "mask_token": "[MASK]"}
    if family.startswith("t5"):
        tokenizer.post_processor = processors.TemplateProcessing(
            single="$A </s>", special_tokens=[("</s>", ids["</s>"])]
        )
        del special["mask_token"]
    elif family in ("gpt2", "opt", "opt-projected", "llama", "mistral"):
        special = {"unk_token": "[UNK]", "eos_token": "</s>"}
    else:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
        )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, additional_special_tokens=["<extra_id_0>"], **special)


def tiny_byte_tokenizer() -> Any:
    """A byte-level tokenizer that merges each of the words letter by letter, from the left."""
    import transformers

    make: Any = transformers.Qwen2Tokenizer

    letters = sorted({letter for word in WORDS for letter in word} | {"Ġ"})
    prefixes = sorted({"Ġ" + word[:n] for word in WORDS for n in range(1, len(word) + 1)}, key=len)
    vocabulary = {token: i for i, token in enumerate(["</s>", *letters, *prefixes])}
    merges = [(prefix[:-1], prefix[-1]) for prefix in prefixes]
    return make(vocab=vocabulary, merges=merges, unk_token="</s>", bos_token=None, eos_token="</s>", pad_token="</s>")


def tiny_model(family: str) -> Any:
    """A random model of the family with its language-model head: 4 blocks of width 32, 4 heads, no dropout."""
    import transformers

    hf: Any = transformers
    torch.manual_seed(0)
    bert: dict[str, Any] = {
        "vocab_size": len(WORDS),
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": 136,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "pad_token_id": 0,
    }
    t5: dict[str, Any] = {
        "vocab_size": len(WORDS),
        "d_model": 32,
        "d_kv": 8,
        "d_ff": 64,
        "num_layers": 4,
        "num_heads": 4,
        "dropout_rate": 0.0,
        "pad_token_id": 0,
        "eos_token_id": 5,
        "decoder_start_token_id": 0,
    }
    llama = {k: v for k, v in bert.items() if "dropout" not in k} | {"num_key_value_heads": 2, "eos_token_id": 5}
    opt = {
        "vocab_size": len(WORDS),
        "hidden_size": 32,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "ffn_dim": 64,
        "max_position_embeddings": 136,
        "dropout": 0.0,
        "pad_token_id": 0,
        "eos_token_id": 5,
        "bos_token_id": 5,
    }
    make: dict[str, Callable[[], Any]] = {
        "bert": lambda: hf.BertForMaskedLM(hf.BertConfig(**bert)),
        "distilbert": lambda: hf.DistilBertForMaskedLM(
            hf.DistilBertConfig(
                vocab_size=len(WORDS), dim=32, n_layers=4, n_heads=4, hidden_dim=64, dropout=0.0, attention_dropout=0.0
            )
        ),
        "roberta": lambda: hf.RobertaForMaskedLM(hf.RobertaConfig(**bert)),
        "electra": lambda: hf.ElectraForMaskedLM(hf.ElectraConfig(**bert, embedding_size=16)),
        "deberta-v2": lambda: hf.DebertaV2ForMaskedLM(
            hf.DebertaV2Config(
                **bert,
                relative_attention=True,
                pos_att_type=["p2c", "c2p"],
                share_att_key=True,  # as in DeBERTa-v3: a block's keys and queries project the positions as well
                norm_rel_ebd="layer_norm",
            )
        ),
        "t5": lambda: hf.T5ForConditionalGeneration(hf.T5Config(**t5)),
        "t5-gated": lambda: hf.T5ForConditionalGeneration(
            hf.T5Config(**t5, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
        ),
        "gpt2": lambda: hf.GPT2LMHeadModel(
            hf.GPT2Config(
                vocab_size=len(WORDS),
                n_embd=32,
                n_layer=4,
                n_head=4,
                n_positions=136,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                bos_token_id=5,
                eos_token_id=5,
            )
        ),
        "opt": lambda: hf.OPTForCausalLM(hf.OPTConfig(**opt, word_embed_proj_dim=32)),
        "opt-projected": lambda: hf.OPTForCausalLM(hf.OPTConfig(**opt, word_embed_proj_dim=16)),
        "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**llama, bos_token_id=5)),
        "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**llama, bos_token_id=5)),
        "qwen2": lambda: hf.Qwen2ForCausalLM(hf.Qwen2Config(**llama | {"vocab_size": 400}, bos_token_id=5)),
        "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**llama | {"vocab_size": 400}, head_dim=8, bos_token_id=5)),
    }
    return make[family]()


SENTENCES = ("the film was great .", "a dull story .", "the story was not good . a film", "bright film")


def encode(backbone: Any, sentences: tuple[str, ...] = SENTENCES, pad_to: int | None = None) -> dict[str, Tensor]:
    """A batch as the data module makes it, for the backbone's own format."""
    encoding = backbone.encoding
    text = {
        "pair": "{}",
        "named": "sst2 sentence: {}",
        "cloze": "{} It was " + encoding.mask + " .",
        "prefix": "{} It was",
    }[encoding.format]
    rows = encoding.tokenizer(
        [text.format(s) for s in sentences], padding="max_length" if pad_to else True, max_length=pad_to
    )
    batch = {name: torch.tensor(ids) for name, ids in rows.items()}
    count = len(sentences)
    labels = torch.rand(count) if backbone.task.regression else torch.arange(count) % max(2, len(backbone.task.labels))
    return batch | {"labels": labels, "index": torch.arange(count)}


def use_plain_cross_attention(backbone: Any) -> None:
    """Let a T5 compute the keys and values of its cross-attention, as transformers does."""
    for block in backbone.stacks[-1].blocks:
        del block.get_submodule(backbone.base_model.family.cross_attention).forward
