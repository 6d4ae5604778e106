"""Reading and checking of custom tasks: a YAML file or a mapping becomes a `Task`."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

from lit_spu.errors import UserError, did_you_mean
from lit_spu.safe_yaml import read_mapping
from lit_spu.tasks.glue import TASKS
from lit_spu.tasks.task import Files, Metric, Task

_RESERVED_FIELDS = {"label", "mask"}
_SCORE_WORDS = ("low", "high")


def load_task(spec: str | Mapping[str, Any]) -> Task:
    """Return the task given by its name, by a YAML file, or by a mapping as `Task.to_dict` returns it.

    A custom task needs `fields` and either `labels` or `score_range`. The other keys have defaults: `name` is the
    file's name, `label_words` are the labels (`low` and `high` for a regression), the prompts are the fields followed
    by `It was {mask}`, and `metrics` are the accuracy (Pearson's and Spearman's correlation for a regression).

    Raises:
        UserError: if no such task or file exists, or if the description is not valid.
    """
    if isinstance(spec, Mapping):
        return _make_task(dict(spec), "data.task")
    if spec in TASKS:
        return TASKS[spec]
    path = Path(spec)
    if path.suffix not in {".yaml", ".yml"}:
        raise UserError(f"data.task: {spec!r} is neither a task nor a YAML file. {did_you_mean(spec, TASKS)}")
    return _make_task({"name": path.stem, **read_mapping(path, f"data.task: {spec}")}, spec)


def _make_task(values: dict[str, Any], where: str) -> Task:
    """Check `values` and make them a task; `where` is the file or the flag that errors name."""
    _check_keys(values, Task, where)
    name = _read_task_name(values, where)
    text_fields = _read_fields(values, where)
    regression = values.get("score_range") is not None
    if regression == bool(values.get("labels")):
        raise UserError(f"{where}: give either labels (a list of names) or score_range (the lowest and highest score).")
    labels = () if regression else _read_names(values, "labels", where, at_least=2)
    prompt = " ".join(f"{{{name}}}" for name in text_fields) + " It was {mask}"
    return Task(
        name=name,
        fields=text_fields,
        labels=labels,
        label_words=_read_label_words(values, labels or _SCORE_WORDS, where),
        cloze=_read_text(values, "cloze", prompt + ".", where),
        prefix=_read_text(values, "prefix", prompt, where),
        metrics=_read_metrics(values, regression, where),
        columns=_read_columns(values, text_fields, where),
        files=_read_files(values["files"], where) if values.get("files") else None,
        score_range=_read_score_range(values["score_range"], where) if regression else None,
    )


def _check_keys(values: Mapping[str, Any], kind: type[Task | Files], where: str) -> None:
    """Raise a UserError if `values` has a key that `kind` does not have."""
    allowed = [item.name for item in fields(kind)]
    if unknown := [str(key) for key in values if key not in allowed]:
        raise UserError(f"{where}: unknown key {unknown[0]!r}. {did_you_mean(unknown[0], allowed)}")


def _read_task_name(values: Mapping[str, Any], where: str) -> str:
    name = values.get("name")
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name):
        raise UserError(f"{where}: name must be a word of letters, digits, '-', '_' or '.', not {name!r}.")
    return name


def _read_fields(values: Mapping[str, Any], where: str) -> tuple[str, ...]:
    names = _read_names(values, "fields", where)
    if unusable := [name for name in names if not name.isidentifier() or name in _RESERVED_FIELDS]:
        reserved = " and ".join(sorted(_RESERVED_FIELDS))
        raise UserError(
            f"{where}: fields: {unusable[0]!r} cannot name a field. Use letters, digits and '_', no digit first;"
            f" {reserved} are reserved."
        )
    return names


def _read_names(values: Mapping[str, Any], key: str, where: str, at_least: int = 1) -> tuple[str, ...]:
    """Return the list of names under `key`; integers are allowed as names, because ratings are often called 1 to 5."""
    given = values.get(key)
    if not isinstance(given, list | tuple) or len(given) < at_least:
        raise UserError(f"{where}: {key} must be a list of at least {at_least} name(s), not {given!r}.")
    for item in given:
        if isinstance(item, bool) or not isinstance(item, str | int) or not str(item).strip():
            raise UserError(f"{where}: {key}: {item!r} is not a name; in YAML, yes, no, on and off need quotes.")
    if len({str(item) for item in given}) < len(given):
        raise UserError(f"{where}: {key}: a name is repeated in {given!r}; each name must be given once.")
    return tuple(str(item) for item in given)


def _read_label_words(values: Mapping[str, Any], answers: tuple[str, ...], where: str) -> tuple[str, ...]:
    """Return one label word for each of `answers`; by default `answers` themselves."""
    words = _read_names(values, "label_words", where) if values.get("label_words") else answers
    if len(words) != len(answers):
        raise UserError(
            f"{where}: label_words: {len(words)} given, {len(answers)} needed: one for each of {', '.join(answers)}."
        )
    return words


def _read_text(values: Mapping[str, Any], key: str, default: str, where: str) -> str:
    text = values.get(key, default)
    if not isinstance(text, str):
        raise UserError(f"{where}: {key} must be a text such as {default!r}, not {text!r}.")
    return text


def _read_score_range(given: Any, where: str) -> tuple[float, float]:
    try:
        low, high = (float(item) for item in given)
    except (TypeError, ValueError):
        low, high = 0.0, 0.0
    if not low < high:
        raise UserError(f"{where}: score_range must be two numbers, the lowest and the highest score, not {given!r}.")
    return low, high


def _read_metrics(values: Mapping[str, Any], regression: bool, where: str) -> tuple[Metric, ...]:
    correlations: tuple[Metric, ...] = ("pearson", "spearman")
    allowed = correlations if regression else tuple(name for name in get_args(Metric) if name not in correlations)
    default = correlations if regression else ("accuracy",)
    chosen = _read_names(values, "metrics", where) if values.get("metrics") else default
    if unknown := [name for name in chosen if name not in allowed]:
        kind = "with a score_range" if regression else "with labels"
        raise UserError(
            f"{where}: metrics: {unknown[0]!r} is not a metric of a task {kind}. {did_you_mean(unknown[0], allowed)}"
        )
    return chosen  # type: ignore[return-value]  # each was found among the values of Metric


def _read_columns(values: Mapping[str, Any], text_fields: Iterable[str], where: str) -> dict[str, str | int]:
    given = values.get("columns") or {}
    allowed = (*text_fields, "label")
    if not isinstance(given, Mapping) or not all(isinstance(column, str | int) for column in given.values()):
        raise UserError(
            f"{where}: columns must map a field to the name or the position of its column, not {given!r}."
            f" Allowed fields: {', '.join(allowed)}."
        )
    if unknown := [str(key) for key in given if key not in allowed]:
        raise UserError(f"{where}: columns: {unknown[0]!r} is not a field. {did_you_mean(unknown[0], allowed)}")
    return dict(given)


def _read_files(given: Mapping[str, Any], where: str) -> Files:
    _check_keys(given, Files, f"{where}: files")
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    return Files(**values)
