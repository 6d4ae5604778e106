"""Check of a tokenizer against its model, before the weights are read."""

from __future__ import annotations

from typing import Any

from lit_spu.errors import UserError
from lit_spu.tasks import Encoding, Task

PROBE = "the film was great . It was not a bad story ."
"""Plain words: any tokenizer that was trained on English text knows them or their pieces."""


def check_tokenizer(name: str, config: Any, encoding: Encoding, task: Task) -> None:
    """Check that a model can read everything that its tokenizer returns.

    Args:
        name: The model's name, for errors.
        config: The model's config.
        encoding: The tokenizer and the format of the examples.
        task: The task.

    Raises:
        UserError: If the tokenizer knows no words, returns ids or token types that the model has no embedding for,
            lacks the padding or mask token, or appends a token after the text, where a causal model answers.
    """
    tokenizer: Any = encoding.tokenizer
    problem = (
        _kind_problem(tokenizer)
        or _vocabulary_problem(tokenizer, config)
        or _types_problem(tokenizer, config, encoding, task)
        or _mask_problem(tokenizer, encoding)
        or _end_problem(tokenizer, encoding)
    )
    if problem:
        raise UserError(f"model.backbone: {name!r} and its tokenizer do not fit: {problem}")


def _kind_problem(tokenizer: Any) -> str | None:
    if not getattr(tokenizer, "is_fast", False):
        return f"{type(tokenizer).__name__} is written in Python; only tokenizers with a tokenizer.json are supported."
    ids = tokenizer(PROBE, add_special_tokens=False).input_ids
    num_unknown = ids.count(tokenizer.unk_token_id)
    if not ids or 2 * num_unknown >= len(ids):
        return (
            f"it has {len(tokenizer)} tokens, and knows {len(ids) - num_unknown} of {len(ids)} in {PROBE!r}. Without"
            " tokenizer files in the folder, transformers makes an empty one: add them (tokenizer.json)."
        )
    if tokenizer.pad_token_id is None:
        return "it has no padding token. Set pad_token in tokenizer_config.json."
    return None


def _vocabulary_problem(tokenizer: Any, config: Any) -> str | None:
    ids = {**tokenizer.get_vocab(), tokenizer.pad_token: tokenizer.pad_token_id}
    for arguments in ((PROBE,), (PROBE, PROBE)):
        ids |= {f"a special token with the id {i}": i for i in tokenizer(*arguments).input_ids}
    token, highest = max(ids.items(), key=lambda item: item[1])
    if highest < config.vocab_size:
        return None
    return (
        f"the token {token!r} has the id {highest}, and the model has embeddings for the ids 0 to"
        f" {config.vocab_size - 1}. Use the model's own tokenizer, or resize_token_embeddings and save both."
    )


def _types_problem(tokenizer: Any, config: Any, encoding: Encoding, task: Task) -> str | None:
    num_types = getattr(config, "type_vocab_size", None)  # 0: DeBERTa ignores them
    if encoding.format != "pair" or len(task.fields) < 2 or not num_types:
        return None
    types = tokenizer(PROBE, PROBE).get("token_type_ids", [0])
    if max(types) < num_types:
        return None
    return (
        f"it marks the second text of a pair by the token type {max(types)}, and the model has {num_types}"
        " (type_vocab_size). Set model_input_names: [input_ids, attention_mask] in tokenizer_config.json."
    )


def _mask_problem(tokenizer: Any, encoding: Encoding) -> str | None:
    if encoding.format != "cloze":
        return None
    mask_id = tokenizer.convert_tokens_to_ids(encoding.mask) if encoding.mask else None
    found = tokenizer(f"It was {encoding.mask} .").input_ids if encoding.mask else []
    if mask_id is not None and mask_id != tokenizer.unk_token_id and found.count(mask_id) == 1:
        return None
    return f"it has no mask token{f' {encoding.mask}' * bool(encoding.mask)}, which model.head=prompt needs."


def _end_problem(tokenizer: Any, encoding: Encoding) -> str | None:
    if encoding.format != "prefix":
        return None
    ids, plain = tokenizer("It was").input_ids, tokenizer("It was", add_special_tokens=False).input_ids
    if ids[-1:] == plain[-1:]:
        return None
    return (
        f"it appends {tokenizer.convert_ids_to_tokens(ids[-1])} after a text, where a causal model answers. Remove it"
        " (add_eos_token: false in tokenizer_config.json, or the post_processor of tokenizer.json)."
    )
