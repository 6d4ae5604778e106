"""Reading and checking of custom tasks: a YAML file or a mapping becomes a `Task`."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path, PurePath
from reprlib import repr as show
from typing import Any, get_args

from lit_spu.errors import UserError, did_you_mean
from lit_spu.safe_yaml import read_mapping
from lit_spu.tasks.glue import TASKS
from lit_spu.tasks.task import Files, Metric, Task
from lit_spu.tasks.template import check_template

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
    _check_keys(values, Task, where, may_be_null=("files", "score_range"))
    name = _read_task_name(values, where)
    text_fields = _read_fields(values, where)
    regression = values.get("score_range") is not None
    if regression == bool(values.get("labels")):
        raise UserError(f"{where}: give either labels (a list of names) or score_range (the lowest and highest score).")
    labels = () if regression else _read_names(values, "labels", where, at_least=2)
    prompt = " ".join(f"{{{name}}}" for name in text_fields) + " It was {mask}"
    files = values.get("files")
    return Task(
        name=name,
        fields=text_fields,
        labels=labels,
        label_words=_read_label_words(values, labels or _SCORE_WORDS, where),
        cloze=_read_template(values, "cloze", prompt + ".", text_fields, where),
        prefix=_read_template(values, "prefix", prompt, text_fields, where),
        metrics=_read_metrics(values, regression, where),
        columns=_read_columns(values, "columns", text_fields, where),
        files=None if files is None else _read_files(files, labels, text_fields, f"{where}: files"),
        score_range=_read_score_range(values["score_range"], where) if regression else None,
    )


def _check_keys(
    values: Mapping[str, Any], kind: type[Task | Files], where: str, may_be_null: Sequence[str] = ()
) -> None:
    """Raise a UserError if `values` has a key that `kind` does not have, or null where a value is needed."""
    allowed = [item.name for item in fields(kind)]
    if unknown := [str(key) for key in values if key not in allowed]:
        raise UserError(f"{where}: unknown key {show(unknown[0])}. {did_you_mean(unknown[0], allowed)}")
    if null := [key for key, value in values.items() if value is None and key not in may_be_null]:
        raise UserError(f"{where}: {null[0]} has no value: give one, or remove the key for its default.")


def _read_task_name(values: Mapping[str, Any], where: str) -> str:
    name = values.get("name")
    if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]{0,99}", name):
        raise UserError(
            f"{where}: name must be a word of letters, digits, '-', '_' or '.', at most 100, that begins with a letter,"
            f" digit or '_', not {show(name)}."
        )
    return name


def _read_fields(values: Mapping[str, Any], where: str) -> tuple[str, ...]:
    names = _read_names(values, "fields", where)
    if unusable := [name for name in names if not name.isidentifier() or name in _RESERVED_FIELDS]:
        reserved = " and ".join(sorted(_RESERVED_FIELDS))
        raise UserError(
            f"{where}: fields: {show(unusable[0])} cannot name a field. Use letters, digits and '_', no digit first;"
            f" {reserved} are reserved."
        )
    return names


def _read_names(values: Mapping[str, Any], key: str, where: str, at_least: int = 1) -> tuple[str, ...]:
    """Return the list of names under `key`; integers are allowed as names, because ratings are often called 1 to 5."""
    given = values.get(key)
    if not isinstance(given, list | tuple) or len(given) < at_least:
        raise UserError(f"{where}: {key} must be a list of at least {at_least} name(s), not {show(given)}.")
    for item in given:
        if isinstance(item, bool) or not isinstance(item, str | int) or not str(item).strip():
            raise UserError(f"{where}: {key}: {show(item)} is not a name; in YAML, yes, no, on and off need quotes.")
    names = tuple(str(item).strip() for item in given)
    if len(set(names)) < len(names):
        raise UserError(f"{where}: {key}: a name is repeated in {show(given)}; each name must be given once.")
    return names


def _read_label_words(values: Mapping[str, Any], answers: tuple[str, ...], where: str) -> tuple[str, ...]:
    """Return one label word for each of `answers`; by default `answers` themselves."""
    words = _read_names(values, "label_words", where) if "label_words" in values else answers
    if len(words) != len(answers):
        raise UserError(
            f"{where}: label_words: {len(words)} given, {len(answers)} needed: one for each of {show(answers)}."
        )
    return words


def _read_template(values: Mapping[str, Any], key: str, default: str, text_fields: Sequence[str], where: str) -> str:
    template = values.get(key, default)
    if not isinstance(template, str):
        raise UserError(f"{where}: {key} must be a text such as {default!r}, not {show(template)}.")
    check_template(template, text_fields, f"{where}: {key}")
    if template.count("{mask}") != 1 or (key == "prefix" and not template.rstrip().endswith("{mask}")):
        place = "at its end" if key == "prefix" else "in it"
        raise UserError(f"{where}: {key} must have {{mask}} once, {place}, not {show(template)}.")
    return template


def _read_score_range(given: Any, where: str) -> tuple[float, float]:
    try:
        low, high = (math.nan if isinstance(item, bool) else float(item) for item in given)
    except (TypeError, ValueError, OverflowError):
        low, high = 0.0, 0.0
    if not (isinstance(given, list | tuple) and -math.inf < low < high < math.inf):
        raise UserError(
            f"{where}: score_range must be two numbers, the lowest and the highest score, not {show(given)}."
        )
    return low, high


def _read_metrics(values: Mapping[str, Any], regression: bool, where: str) -> tuple[Metric, ...]:
    correlations: tuple[Metric, ...] = ("pearson", "spearman")
    allowed = correlations if regression else tuple(name for name in get_args(Metric) if name not in correlations)
    default = correlations if regression else ("accuracy",)
    chosen = _read_names(values, "metrics", where) if "metrics" in values else default
    if unknown := [name for name in chosen if name not in allowed]:
        kind = "with a score_range" if regression else "with labels"
        raise UserError(
            f"{where}: metrics: {show(unknown[0])} is not a metric of a task {kind}."
            f" {did_you_mean(unknown[0], allowed)}"
        )
    return chosen  # type: ignore[return-value]  # each was found among the values of Metric


def _read_columns(values: Mapping[str, Any], key: str, text_fields: Iterable[str], where: str) -> dict[str, str | int]:
    """Return the column of each field and of the label, as far as they are given: its name, or its position from 0."""
    given = values.get(key, {})
    allowed = (*text_fields, "label")
    if not isinstance(given, Mapping) or not all(map(_is_column, given.values())):
        raise UserError(
            f"{where}: {key} must map a field to the name or the position of its column, not {show(given)}."
            f" Allowed fields: {', '.join(allowed)}."
        )
    if unknown := [str(name) for name in given if name not in allowed]:
        raise UserError(f"{where}: {key}: {show(unknown[0])} is not a field. {did_you_mean(unknown[0], allowed)}")
    columns = [given.get(name, name) for name in allowed]
    if doubled := [column for column in columns if columns.count(column) > 1]:
        raise UserError(f"{where}: {key}: two fields are read from the column {show(doubled[0])}.")
    return dict(given)


def _is_column(column: Any) -> bool:
    return isinstance(column, str) or (isinstance(column, int) and not isinstance(column, bool) and column >= 0)


# --- Files -----------------------------------------------------------------------------------------------------------


def _read_files(given: Any, labels: Sequence[str], text_fields: Sequence[str], where: str) -> Files:
    if not isinstance(given, Mapping):
        raise UserError(f"{where} must map keys such as folder to values, not {show(given)}.")
    _check_keys(given, Files, where)
    names = {key: _read_names(given, key, where) for key in ("train", "validation", "test") if key in given}
    values: dict[str, Any] = {**given, **names, "hub_columns": _read_columns(given, "hub_columns", text_fields, where)}
    if "parts" in given:
        values["parts"] = ("",) if given["parts"] in ([""], ("",)) else _read_names(given, "parts", where)
    if given.get("spelling"):
        values["spelling"] = _read_spelling(given, labels, where)
    if "hub" in given:
        values["hub"] = _read_hub(given["hub"], where)
    if not isinstance(given.get("incomplete", False), bool):
        raise UserError(f"{where}: incomplete must be true or false, not {show(given['incomplete'])}.")
    files = Files(**{**values, "spelling": tuple(values.get("spelling", ()))})
    for path in (files.folder, *files.train, *files.validation, *files.test, *files.parts):
        if not isinstance(path, str) or PurePath(path).is_absolute() or ".." in PurePath(path).parts:
            raise UserError(f"{where}: {show(path)} is not a name inside the folder of data.source.")
    return files


def _read_spelling(values: Mapping[str, Any], labels: Sequence[str], where: str) -> tuple[str, ...]:
    """Return the labels as files spell them. No spelling may be the name of another label."""
    spelling = _read_names(values, "spelling", where)
    if len(spelling) != len(labels):
        raise UserError(f"{where}: spelling: {len(spelling)} given, {len(labels)} needed: one for each label.")
    if crossed := [word for word, label in zip(spelling, labels, strict=True) if word != label and word in labels]:
        raise UserError(f"{where}: spelling: {show(crossed[0])} is the name of another label.")
    return spelling


def _read_hub(given: Any, where: str) -> tuple[str, str | None]:
    """Return the name of a dataset on the hub and of its configuration. The name is never a path."""
    name, config = given if isinstance(given, list | tuple) and len(given) == 2 else (None, None)
    valid = isinstance(name, str) and re.fullmatch(r"(\w[\w.-]*(/\w[\w.-]*)?)?", name)
    if not valid or not (config is None or isinstance(config, str)):
        raise UserError(f"{where}: hub must be a dataset's name and its configuration or null, not {show(given)}.")
    return str(name), config
