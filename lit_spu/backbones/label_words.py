"""Label words: the tokens by which a language-model head answers a task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lit_spu.errors import UserError

CONTEXT = "It was"
"""Words before a label word, so that it is tokenised as in the middle of a sentence."""


def tokenize_label_words(
    tokenizer: Any, candidates: Sequence[Sequence[str]], one_token: bool
) -> tuple[list[int], list[str]]:
    """Return the first token of each label word, from the first list of words in which these tokens differ.

    Args:
        tokenizer: The backbone's.
        candidates: Lists of words for the labels, the preferred list first.
        one_token: Require each word to be one token.

    Returns:
        The tokens (none if no list fits), and a description of each rejected word's tokens.
    """
    skip = len(tokenizer(CONTEXT, add_special_tokens=False).input_ids)
    rejected: list[str] = []
    for words in candidates:
        pieces = [tokenizer(f"{CONTEXT} {word}", add_special_tokens=False).input_ids[skip:] for word in words]
        first = [ids[0] for ids in pieces if ids and ids[0] != tokenizer.unk_token_id]
        if len(set(first)) == len(words) and (not one_token or all(len(ids) == 1 for ids in pieces)):
            return first, rejected
        rejected += [
            f"{word} = {' '.join(tokenizer.convert_ids_to_tokens(ids))}"
            for word, ids in zip(words, pieces, strict=True)
        ]
    return [], rejected


def label_word_error(task: str, backbone: str, rejected: Sequence[str], one_token: bool) -> UserError:
    """Return the error for label words that a backbone cannot predict."""
    needed = "must be one known token" if one_token else "must start with a known token that no other starts with"
    return UserError(
        f"The label words of {task} do not fit {backbone}, where each {needed}: {'; '.join(rejected)}."
        " Give other label_words in the task's YAML file, or use --model.head=classifier."
    )
