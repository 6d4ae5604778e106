"""A tokenizer with one token for each word."""

import re

import pytest

from lit_spu.tasks import Encoding, Format

WORDS = [f"w{i}" for i in range(300)]


def words_of(text: str) -> list[str]:
    """Return the tokens of a text, without special ones."""
    return re.findall(r"\[MASK\]|\w+|[^\w\s]", text)


def word_encoding(form: Format = "pair", words: list[str] = WORDS) -> Encoding:
    """Return an encoding that tokenises by word: `[CLS] a [SEP]`, or `[CLS] a [SEP] b [SEP]` with token types."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        mask_token="[MASK]",
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
    )
    return Encoding(fast, form, "" if form == "prefix" else "[MASK]")


@pytest.fixture(scope="session")
def encoding() -> Encoding:
    """Encoding of the fields as they are, with one token for each word."""
    return word_encoding()
