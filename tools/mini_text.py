"""Text of the mini models' pretraining: files of text, tokenizers, and batches of tokens."""

from __future__ import annotations

import lzma
import string
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from math import log
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_spu.errors import UserError
from lit_spu.tasks import TASKS

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

NUM_SENTINELS = 50
"""Sentinel tokens of T5's tokenizer, one per corrupted span of a text."""


def read_text(path: Path) -> Iterator[str]:
    """Yield the non-empty lines of a `.txt` or `.txt.xz` file, or of all such files below a folder, in order of names.

    Raises:
        UserError: if there is no such file, or one is neither UTF-8 nor xz.
    """
    files = [path] if path.is_file() else sorted([*path.rglob("*.txt"), *path.rglob("*.txt.xz")])
    if not files:
        raise UserError(f"--text: {path} is neither a file nor a folder with .txt or .txt.xz files.")
    for file in files:
        with lzma.open(file, "rb") if file.suffix == ".xz" else file.open("rb") as lines:
            position = str(file)
            try:
                for number, line in enumerate(lines, start=1):
                    position = f"{file}, line {number}"
                    if text := line.decode().strip():
                        yield text
            except (UnicodeDecodeError, lzma.LZMAError, EOFError) as error:
                raise UserError(f"--text: {position}: {error}. Give plain or xz-compressed UTF-8.") from error


def task_words() -> list[str]:
    """Return the words of the tasks' inputs and labels, also capitalised; each becomes one token."""
    words = {word for task in TASKS.values() for word in (task.name, *task.fields, *task.labels, *task.label_words)}
    return sorted(words | {word.capitalize() for word in words})


def build_vocabulary(tokenizer: Any, texts: Iterable[str], known: Sequence[str], size: int) -> dict[str, float]:
    """Return the known words and the most common words of the texts, each with its log-likelihood.

    The trainers of `tokenizers` break ties randomly; this count is the same in every run.

    Args:
        tokenizer: A tokenizer of `tokenizers`, for its normalizer and pre-tokenizer.
        texts: The texts to count.
        known: Words that are included in any case.
        size: Number of words in all.
    """
    counts = Counter(
        word
        for text in texts
        for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(tokenizer.normalizer.normalize_str(text))
    )
    words = sorted(counts.keys() - set(known), key=lambda word: (-counts[word], word))[: max(0, size - len(known))]
    return {word: log(max(counts[word], 1) / counts.total()) for word in [*dict.fromkeys(known), *words]}


def make_wordpiece(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """Return a lower-case tokenizer like BERT's: whole words, and rare words letter by letter."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    continuations = [f"##{character}" for character in string.ascii_lowercase + string.digits]
    known = [
        *special,
        *string.printable.strip(),
        *continuations,
        *(name.lower() for name in task_words() if name.isalnum()),
    ]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    ids = {token: i for i, token in enumerate(build_vocabulary(tokenizer, texts, known, size))}
    tokenizer.model = models.WordPiece(ids, unk_token="[UNK]")
    tokenizer.add_special_tokens(special)
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, ids[token]) for token in ("[CLS]", "[SEP]")],
    )
    roles = {f"{token.strip('[]').lower()}_token": token for token in special}
    inputs = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_input_names=inputs, **roles)


def make_unigram(texts: Iterable[str], size: int) -> PreTrainedTokenizerFast:
    """Return a cased tokenizer like T5's, in which even a label of two words is one token."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "</s>", "<unk>"]
    known = [*special, "▁", *string.printable.strip(), *("▁" + name.replace(" ", "▁") for name in task_words())]
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(r"\s+"), " ")])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Metaspace(prepend_scheme="first"), pre_tokenizers.Punctuation()]
    )
    vocabulary = build_vocabulary(tokenizer, texts, known, size)
    tokenizer.model = models.Unigram(list(vocabulary.items()), unk_id=special.index("<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    sentinels = [f"<extra_id_{i}>" for i in range(NUM_SENTINELS)]
    tokenizer.add_special_tokens(special)
    tokenizer.add_special_tokens([AddedToken(token, lstrip=True, special=True) for token in sentinels])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", special.index("</s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=sentinels,
        model_input_names=["input_ids", "attention_mask"],
    )


TOKENIZERS: Mapping[str, Callable[[Iterable[str], int], PreTrainedTokenizerFast]] = {
    "mini-bert": make_wordpiece,
    "mini-t5": make_unigram,
}
"""The function that makes the tokenizer of each mini model, from texts and the size of the vocabulary."""


def tokenize(tokenizer: Any, texts: Iterable[str], length: int) -> list[Tensor]:
    """Return the token ids of the texts without special tokens, long texts cut into pieces of at most `length`."""
    pieces: list[Tensor] = []
    texts = iter(texts)
    while chunk := list(islice(texts, 1000)):
        for ids in tokenizer(chunk, add_special_tokens=False).input_ids:
            pieces += [torch.tensor(ids[i : i + length], dtype=torch.int32) for i in range(0, len(ids), length)]
    return pieces


def make_batches(lengths: Sequence[int], max_tokens: int, seed: str) -> list[list[int]]:
    """Return batches of indices of texts of similar length, shuffled by the seed.

    Args:
        lengths: Tokens of each text.
        max_tokens: Tokens of a batch at most, padding included; a longer text is a batch by itself.
        seed: Random seed.
    """
    rng = Random(seed)
    order = sorted(range(len(lengths)), key=lambda i: (lengths[i], rng.random()))
    batches: list[list[int]] = [[]]
    for i in order:
        if batches[-1] and (len(batches[-1]) + 1) * lengths[i] > max_tokens:
            batches.append([])
        batches[-1].append(i)
    rng.shuffle(batches)
    return batches
