"""Input texts and their tokens: templates, tokenisation and the token cache.

A template is a format string. `{field}` is replaced by the text of a field, `{mask}` by the mask token. If an example
is too long, the ends of its longest fields are cut. The template is never cut, so the mask token is always there.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import Any, get_args

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from lit_spu.errors import UserError, did_you_mean
from lit_spu.files import replace_path
from lit_spu.tasks import Encoding, Format, Task, check_template

Row = dict[str, Any]
"""An example: the text of each field and `label`, which is a label's position or a score; None if unknown."""

_CHUNK = 10_000  # rows tokenised at a time, which limits the memory of the tokenizer's lists


# --- Templates -------------------------------------------------------------------------------------------------------


class _FieldText(str):
    """Text of a field with the format options `:cut` (no final punctuation mark) and `:uncap` (small first letter)."""

    def __format__(self, spec: str) -> str:
        if spec == "cut":
            return self[:-1].rstrip() if self and unicodedata.category(self[-1]).startswith("P") else str(self)
        return self[:1].lower() + self[1:] if spec == "uncap" else str(self)


def render(template: str, fields: Mapping[str, str], mask: str) -> str:
    """Fill in `template` and drop trailing spaces, because a language model predicts a word with its leading space."""
    return template.format_map({name: _FieldText(text) for name, text in fields.items()} | {"mask": mask}).rstrip()


def template_of(task: Task, encoding: Encoding, template: str = "auto") -> str | None:
    """Return the template that turns examples of `task` into text for a backbone.

    Args:
        task: The task.
        encoding: The format that the backbone expects.
        template: `auto` for that format, the name of another `Format`, or a template as text.

    Returns:
        A template, or None if the fields are tokenised as they are.

    Raises:
        UserError: if the template lacks a field of the task, or the `{mask}` that the backbone needs.
    """
    chosen = encoding.format if template == "auto" else template
    if chosen not in get_args(Format) and "{" not in chosen:
        raise UserError(
            f"data.template: {template!r} is neither a format nor a text with {{fields}}."
            f" {did_you_mean(template, ('auto', *get_args(Format)))}"
        )
    named = " ".join((task.name, *(f"{name}: {{{name}}}" for name in sorted(task.fields))))  # as T5 was trained
    prompts = {"pair": None, "named": named, "cloze": task.cloze, "prefix": task.prefix}
    prompt = prompts.get(chosen, chosen)
    where = f"the {chosen} template of {task.name}" if chosen in prompts else "data.template"
    if prompt is not None:
        check_template(prompt, task.fields, where)
    _check_mask(prompt, encoding, where)
    return prompt


def _check_mask(prompt: str | None, encoding: Encoding, where: str) -> None:
    """Raise a UserError if the backbone answers at `{mask}` but `prompt` does not have it there."""
    if encoding.format not in ("cloze", "prefix"):
        return
    if prompt is None or prompt.count("{mask}") != 1:
        given = "it has only the fields" if prompt is None else repr(prompt)
        raise UserError(
            f"{where}: this backbone answers at {{mask}}, so the template must contain {{mask}} once: {given}."
        )
    if encoding.format == "prefix" and not prompt.rstrip().endswith("{mask}"):
        raise UserError(
            f"{where}: this backbone answers after the last token, so the template must end in {{mask}}: {prompt!r}."
        )


# --- Tokens ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tokens:
    """Tokens of many texts, concatenated.

    Attributes:
        ids: Token ids of all texts, int32 [tokens].
        starts: Position of each text's first token, and last the number of all tokens, int64 [texts + 1].
        types: Token type ids (0 in the first field, 1 in the second), uint8 [tokens]; None if the tokenizer has none.
    """

    ids: np.ndarray[Any, np.dtype[np.int32]]
    starts: np.ndarray[Any, np.dtype[np.int64]]
    types: np.ndarray[Any, np.dtype[np.uint8]] | None

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Number of tokens of each text, [texts]."""
        return np.diff(self.starts)


def encode(rows: Sequence[Row], task: Task, encoding: Encoding, template: str | None, max_length: int) -> Tokens:
    """Tokenise `rows`, with the tokenizer's special tokens.

    Args:
        rows: The examples.
        task: Their task, which has the names of the fields.
        encoding: The tokenizer and its mask token.
        template: Result of `template_of`. With None the first field and the other fields, joined, are a pair of texts.
        max_length: Largest number of tokens of an example. A longer pair loses the end of its longer text, a longer
            prompt the ends of its longest fields.

    Raises:
        UserError: if `max_length` is too short for the template, or if a text contains the mask token.
    """
    ids: list[np.ndarray[Any, Any]] = []
    types: list[np.ndarray[Any, Any]] = []
    lengths: list[int] = []
    for start in range(0, len(rows), _CHUNK):
        chunk = rows[start : start + _CHUNK]
        if template is None:
            encoded = _tokenise_fields(chunk, task, encoding, max_length)
        else:
            encoded = _tokenise_prompts(chunk, task, encoding, template, max_length)
        lengths += map(len, encoded["input_ids"])
        ids.append(np.fromiter((i for row in encoded["input_ids"] for i in row), np.int32))
        if "token_type_ids" in encoded:
            types.append(np.fromiter((i for row in encoded["token_type_ids"] for i in row), np.uint8))
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Tokens(np.concatenate(ids), starts, np.concatenate(types) if types else None)


def _tokenise(encoding: Encoding, *texts: Any, **kwargs: Any) -> Any:
    # verbose=False: otherwise the tokenizer warns about texts that are cut only afterwards
    return encoding.tokenizer(*texts, return_attention_mask=False, verbose=False, **kwargs)


def _tokenise_fields(rows: Sequence[Row], task: Task, encoding: Encoding, max_length: int) -> Any:
    first = [row[task.fields[0]] for row in rows]
    second = [" ".join(row[name] for name in task.fields[1:]) for row in rows]
    texts = (first, second) if len(task.fields) > 1 else (first,)
    return _tokenise(encoding, *texts, truncation="longest_first", max_length=max_length)


def _tokenise_prompts(rows: Sequence[Row], task: Task, encoding: Encoding, template: str, max_length: int) -> Any:
    if encoding.mask and "{mask}" in template:
        _check_texts(rows, task, encoding.mask)
    texts = [render(template, {name: row[name] for name in task.fields}, encoding.mask) for row in rows]
    encoded = _tokenise(encoding, texts)
    too_long = [i for i, ids in enumerate(encoded["input_ids"]) if len(ids) > max_length]
    for i in too_long:
        fields = {name: rows[i][name] for name in task.fields}
        text = _render_shortened(fields, encoding, template, max_length)
        for key, value in _tokenise(encoding, text).items():
            encoded[key][i] = value
    return encoded


def _check_texts(rows: Sequence[Row], task: Task, mask: str) -> None:
    """Raise a UserError if a text contains the mask token."""
    for row in rows:
        if found := [name for name in task.fields if mask in row[name]]:
            raise UserError(
                f"The {found[0]} {row[found[0]][:60]!r} contains {mask!r}, this backbone's mask token: remove it."
            )


def _render_shortened(fields: dict[str, str], encoding: Encoding, template: str, max_length: int) -> str:
    """Fill in `template` after cutting its longest fields to one common length, the largest at which the text fits."""
    text = render(template, fields, encoding.mask)
    # A cut can change the neighbouring tokens, so measure again after each round. A round cuts at least one token.
    while (excess := len(_tokenise(encoding, text)["input_ids"]) - max_length) > 0:
        ends = {name: _token_ends(field, encoding) for name, field in fields.items()}
        available = sum(map(len, ends.values())) - excess
        longest = max(map(len, ends.values()))
        while sum(min(len(e), longest) for e in ends.values()) > available:
            longest -= 1
        if longest < 1:
            raise UserError(
                f"data.max_length={max_length} leaves no tokens for the example in the template {template!r}:"
                " raise it, or choose a shorter --data.template."
            )
        fields = {
            name: field[: ends[name][longest - 1]] if len(ends[name]) > longest else field
            for name, field in fields.items()
        }
        text = render(template, fields, encoding.mask)
    return text


def _token_ends(text: str, encoding: Encoding) -> list[int]:
    """Return the position in `text` at which each of its tokens ends."""
    encoded = _tokenise(encoding, text, add_special_tokens=False, return_offsets_mapping=True)
    return [end for _, end in encoded["offset_mapping"]]


# --- The token cache -------------------------------------------------------------------------------------------------


def encode_cached(
    rows: Sequence[Row], task: Task, encoding: Encoding, template: str | None, max_length: int, folder: Path
) -> Tokens:
    """Read the tokens of `rows` from the cache in `folder`, or tokenise them as `encode` does and cache them.

    A damaged file is detected by its checksums and the number of its texts, and written again.
    """
    if not rows:
        return Tokens(np.zeros(0, np.int32), np.zeros(1, np.int64), None)
    path = folder / f"{_cache_key(rows, task, encoding, template, max_length)}.npz"
    try:
        return _read_tokens(path, len(rows))
    except Exception:  # missing or damaged: numpy and zipfile raise many kinds
        tokens = encode(rows, task, encoding, template, max_length)
    try:
        _write_tokens(path, tokens)
    except UserError as error:
        rank_zero_warn(
            f"The tokens cannot be cached in data.cache={folder} ({error}) So every run tokenises them again. Set"
            " --data.cache to a folder that is writable."
        )
    return tokens


def _cache_key(rows: Sequence[Row], task: Task, encoding: Encoding, template: str | None, max_length: int) -> str:
    """Return a digest of everything that the tokens depend on: settings, texts, and the code of this module."""
    digest = sha256(Path(__file__).read_bytes())
    settings = (template, max_length, task.fields, encoding.mask, _tokenizer_fingerprint(encoding.tokenizer))
    texts = (row[name] for row in rows for name in task.fields)
    for part in chain([repr(settings)], texts):
        digest.update(f"{len(part)}:{part}".encode(errors="surrogatepass"))  # lengths, so that parts cannot shift
    return digest.hexdigest()[:32]


def _tokenizer_fingerprint(tokenizer: Any) -> str:
    """Return a digest of all settings of a tokenizer, except the padding and truncation of its last call."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state.update(padding=None, truncation=None)
    settings = (type(tokenizer).__name__, tokenizer.truncation_side, tokenizer.model_input_names, state)
    return sha256(repr(settings).encode()).hexdigest()


def _read_tokens(path: Path, num_texts: int) -> Tokens:
    with path.open("rb") as file, np.load(file) as arrays:
        tokens = Tokens(arrays["ids"], arrays["starts"], arrays.get("types"))
    lengths = [len(array) for array in (tokens.ids, tokens.types) if array is not None]
    is_whole = tokens.starts[0] == 0 and (tokens.lengths > 0).all() and {*lengths} == {int(tokens.starts[-1])}
    if len(tokens) != num_texts or not is_whole:
        raise ValueError(f"{path} does not hold the tokens of {num_texts} texts.")
    return tokens


def _write_tokens(path: Path, tokens: Tokens) -> None:
    arrays: dict[str, Any] = {name: array for name, array in vars(tokens).items() if array is not None}
    with replace_path(path, shared=True) as partial, partial.open("wb") as file:
        np.savez(file, **arrays)
