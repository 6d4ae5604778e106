"""How an example becomes text, and text becomes tokens.

A prompt is a format string: `{field}` stands for a text field, `{mask}` for the blank. Too long an example loses the
ends of its longest fields, never a part of the prompt, so that the blank is always there.
"""

from __future__ import annotations

import json
import os
import string
import tempfile
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, get_args
from zipfile import BadZipFile

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from lit_spu.errors import UserError, did_you_mean
from lit_spu.tasks import Encoding, Format, Task

Row = Mapping[str, Any]
"""An example: the text of each field, and its `label`."""

_CHUNK = 10_000  # rows tokenised at a time: bounds the memory that Python's lists of numbers take


class _Field(str):
    """A text: `{field:cut}` gives it without its final punctuation mark, `{field:uncap}` with a small first letter."""

    def __format__(self, spec: str) -> str:
        if spec == "cut":
            return self[:-1].rstrip() if self and unicodedata.category(self[-1]).startswith("P") else str(self)
        return self[:1].lower() + self[1:] if spec == "uncap" else str(self)


def render(template: str, fields: Mapping[str, str], mask: str) -> str:
    """`template` filled in, without blanks at its end: a language model goes on with the blank in front of a word."""
    return template.format_map({name: _Field(text) for name, text in fields.items()} | {"mask": mask}).rstrip()


def template_of(task: Task, encoding: Encoding, template: str = "auto") -> str | None:
    """The format string by which `task` becomes text for this backbone; None for the bare fields.

    `template` is `auto` (what the backbone expects), a `Format` or a format string of the user's own.

    Raises:
        UserError: if it does not hold every field of the task, or no blank where the backbone answers at one.
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
    what = f"the {chosen} template of {task.name}" if chosen in prompts else "data.template"
    if prompt is not None:
        _check(prompt, task, what)
    if encoding.format in ("cloze", "prefix") and (prompt is None or prompt.count("{mask}") != 1):
        raise UserError(
            f"{what}: this backbone answers at a blank, so the template must hold {{mask}} once: {prompt!r}."
        )
    if encoding.format == "prefix" and prompt is not None and not prompt.rstrip().endswith("{mask}"):
        raise UserError(f"{what}: this backbone answers at the end, so the template must end in {{mask}}: {prompt!r}.")
    return prompt


def _check(prompt: str, task: Task, what: str) -> None:
    try:
        slots = [(name, spec, conv) for _, name, spec, conv in string.Formatter().parse(prompt) if name is not None]
    except ValueError as error:
        raise UserError(f"{what}: {prompt!r} does not parse: {error}.") from error
    for name, spec, conversion in slots:
        if name not in (*task.fields, "mask"):
            raise UserError(
                f"{what}: {{{name}}} is no field of {task.name}. {did_you_mean(name, (*task.fields, 'mask'))}"
            )
        if conversion or spec not in ("", "cut", "uncap"):
            raise UserError(f"{what}: {{{name}}} takes :cut or :uncap and nothing else: {prompt!r}.")
    if missing := [name for name in task.fields if name not in {slot[0] for slot in slots}]:
        raise UserError(f"{what}: {{{missing[0]}}} is missing, and {task.name} cannot be told without it: {prompt!r}.")


@dataclass(frozen=True)
class Tokens:
    """The tokens of many texts, end to end.

    Attributes:
        ids: Token numbers of all texts, int32 [tokens].
        starts: Where each text starts, and the end of the last, int64 [texts + 1].
        types: Which of two texts each token belongs to, uint8 [tokens], where the tokenizer tells.
    """

    ids: np.ndarray[Any, np.dtype[np.int32]]
    starts: np.ndarray[Any, np.dtype[np.int64]]
    types: np.ndarray[Any, np.dtype[np.uint8]] | None

    def __len__(self) -> int:
        return len(self.starts) - 1

    @property
    def lengths(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Tokens of each text, [texts]."""
        return np.diff(self.starts)


def encode(rows: Sequence[Row], task: Task, encoding: Encoding, template: str | None, max_length: int) -> Tokens:
    """The tokens of `rows`, at most `max_length` each, special tokens as the tokenizer puts them.

    Args:
        rows: The examples.
        task: Tells their fields.
        encoding: Tells the tokenizer and its blank.
        template: What `template_of` gave; None tokenises the fields themselves, of more than two the rest as one.
        max_length: Longer pairs lose the end of their longer text; longer prompts the ends of their longest fields.

    Raises:
        UserError: if `max_length` has no room for the prompt, or a text holds the blank itself.
    """
    ids: list[np.ndarray[Any, Any]] = []
    types: list[np.ndarray[Any, Any]] = []
    lengths: list[int] = []
    for start in range(0, len(rows), _CHUNK):
        chunk = rows[start : start + _CHUNK]
        if template is None:
            encoded = _pairs(chunk, task, encoding, max_length)
        else:
            encoded = _prompts(chunk, task, encoding, template, max_length)
        lengths += map(len, encoded["input_ids"])
        ids.append(np.fromiter((i for row in encoded["input_ids"] for i in row), np.int32))
        if "token_type_ids" in encoded:
            types.append(np.fromiter((i for row in encoded["token_type_ids"] for i in row), np.uint8))
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return Tokens(np.concatenate(ids), starts, np.concatenate(types) if types else None)


def _tokenise(encoding: Encoding, *texts: Any, **kwargs: Any) -> Any:
    # verbose: the tokenizer would warn of texts that are about to be cut
    return encoding.tokenizer(*texts, return_attention_mask=False, verbose=False, **kwargs)


def _pairs(rows: Sequence[Row], task: Task, encoding: Encoding, max_length: int) -> Any:
    first = [row[task.fields[0]] for row in rows]
    second = [" ".join(row[name] for name in task.fields[1:]) for row in rows]
    texts = (first, second) if len(task.fields) > 1 else (first,)
    return _tokenise(encoding, *texts, truncation="longest_first", max_length=max_length)


def _prompts(rows: Sequence[Row], task: Task, encoding: Encoding, template: str, max_length: int) -> Any:
    mask = encoding.mask
    if mask and "{mask}" in template:
        for row in rows:
            if held := [name for name in task.fields if mask in row[name]]:
                raise UserError(f"The {held[0]} {row[held[0]]!r} holds {mask!r}, this backbone's blank: take it out.")
    texts = [render(template, {name: row[name] for name in task.fields}, mask) for row in rows]
    encoded = _tokenise(encoding, texts)
    long = [i for i, ids in enumerate(encoded["input_ids"]) if len(ids) > max_length]
    for i in long:
        fields = {name: rows[i][name] for name in task.fields}
        text = _shortened(fields, encoding, template, max_length)
        for key, value in _tokenise(encoding, text).items():
            encoded[key][i] = value
    return encoded


def _shortened(fields: dict[str, str], encoding: Encoding, template: str, max_length: int) -> str:
    """The prompt with its longest fields cut to one common length, the largest with which it fits."""
    text = render(template, fields, encoding.mask)
    # Tokens at the seams can change as a field is cut, so measure again; each round cuts at least one token.
    while (excess := len(_tokenise(encoding, text)["input_ids"]) - max_length) > 0:
        ends = {
            name: [
                end
                for _, end in _tokenise(encoding, t, add_special_tokens=False, return_offsets_mapping=True)[
                    "offset_mapping"
                ]
            ]
            for name, t in fields.items()
        }
        room = sum(map(len, ends.values())) - excess
        cap = max(map(len, ends.values()))
        while sum(min(len(e), cap) for e in ends.values()) > room:
            cap -= 1
        if cap < 1:
            raise UserError(
                f"data.max_length={max_length} leaves no room for an example in the template {template!r}:"
                " raise it, or choose a shorter --data.template."
            )
        fields = {name: t[: ends[name][cap - 1]] if len(ends[name]) > cap else t for name, t in fields.items()}
        text = render(template, fields, encoding.mask)
    return text


def encode_cached(
    rows: Sequence[Row], task: Task, encoding: Encoding, template: str | None, max_length: int, folder: Path
) -> Tokens:
    """`encode`, whose result is kept in `folder` and found again by all that it depends on.

    A file that cannot be read whole (checksums are part of the format) is written anew.
    """
    if not rows:
        return Tokens(np.zeros(0, np.int32), np.zeros(1, np.int64), None)
    path = folder / f"{_key(rows, task, encoding, template, max_length)}.npz"
    try:
        return _read(path)
    except (OSError, ValueError, KeyError, EOFError, BadZipFile):  # absent, or damaged
        tokens = encode(rows, task, encoding, template, max_length)
    try:
        _write(path, tokens)
    except OSError as error:
        rank_zero_warn(f"The tokens cannot be kept in data.cache={folder} ({error}): each run makes them anew.")
    return tokens


def _key(rows: Sequence[Row], task: Task, encoding: Encoding, template: str | None, max_length: int) -> str:
    digest = sha256(Path(__file__).read_bytes())  # a change of this module makes new tokens
    settings = (template, max_length, task.fields, encoding.mask, _fingerprint(encoding.tokenizer))
    for part in _parts(settings, rows, task):
        digest.update(f"{len(part)}:{part}".encode(errors="surrogatepass"))
    return digest.hexdigest()[:32]


def _parts(settings: tuple[Any, ...], rows: Sequence[Row], task: Task) -> Iterator[str]:
    yield repr(settings)
    for row in rows:
        for name in task.fields:
            yield row[name]


def _fingerprint(tokenizer: Any) -> str:
    """All that decides how it tokenises, but for the padding and truncation of the call before."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state.update(padding=None, truncation=None)
    settings = (type(tokenizer).__name__, tokenizer.truncation_side, tokenizer.model_input_names, state)
    return sha256(repr(settings).encode()).hexdigest()


def _read(path: Path) -> Tokens:
    with path.open("rb") as file, np.load(file) as arrays:
        return Tokens(arrays["ids"], arrays["starts"], arrays.get("types"))


def _write(path: Path, tokens: Tokens) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    arrays: dict[str, Any] = {name: array for name, array in vars(tokens).items() if array is not None}
    handle, draft = tempfile.mkstemp(dir=path.parent, suffix=".draft")
    try:
        with os.fdopen(handle, "wb") as file:
            np.savez(file, **arrays)
        os.replace(draft, path)  # whole or not at all, whoever else is writing
    except BaseException:
        os.unlink(draft)
        raise
