"""The tasks as data: what an example holds, what the answers are called, how it is asked and how it is scored.

Templates and label words are those of LM-BFF and MeZO (https://arxiv.org/abs/2305.17333, appendix E); class names are
the ones that T5 was trained on. Nothing outside this file knows a task's name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from lit_spu.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Metric = Literal["accuracy", "f1", "matthews", "pearson", "spearman"]
Split = Literal["train", "validation", "test"]

Format = Literal["pair", "named", "cloze", "prefix"]
"""How an example becomes text: bare fields; T5's `task field: …`; a prompt with a blank; a prompt before its answer."""


@dataclass(frozen=True)
class Encoding:
    """What a backbone tells the data module.

    Its tokenizer, the format that it expects, the text of its blank, and the most tokens it reads (None: any number).
    """

    tokenizer: PreTrainedTokenizerBase
    format: Format
    mask: str
    max_tokens: int | None = None


@dataclass(frozen=True)
class Files:
    """Where a task lies in the official layout (GLUE's folders, `<source>/<folder>/<stem>.tsv`) and on the hub.

    `train`, `validation` and `test` are the file stems that a split goes by, best first. A task of several `parts` has
    one validation and one test set for each (`dev_matched`, `dev_mismatched`); the first part is the one that counts.
    `spelling` gives the labels as the files write them, `hub_columns` the columns that the hub names otherwise.
    `incomplete` says that the official files hold rows without a text, a column or an agreed label: those are left out
    and counted.
    """

    folder: str
    hub: tuple[str, str | None]
    train: tuple[str, ...] = ("train",)
    validation: tuple[str, ...] = ("dev", "validation")
    test: tuple[str, ...] = ("test",)
    parts: tuple[str, ...] = ("",)
    spelling: tuple[str, ...] = ()
    hub_columns: Mapping[str, str] = field(default_factory=dict)
    incomplete: bool = False


@dataclass(frozen=True)
class Task:
    """One task. `labels` is empty for a regression, whose answers then lie in `score_range`.

    `label_words` answer the prompts, one a label; a regression has two, the poles of its range. In templates `{field}`
    is a text field and `{mask}` the blank; `{field:cut}` drops the final punctuation mark, `{field:uncap}` lowers the
    first letter. The first of `metrics` selects the best checkpoint. `columns` gives the header name of each field and
    of `label` where the files call them otherwise, or their position (from 0) where the files have no header. A task of
    the user's own has no `files`.
    """

    name: str
    fields: tuple[str, ...]
    labels: tuple[str, ...]
    label_words: tuple[str, ...]
    cloze: str
    prefix: str
    metrics: tuple[Metric, ...]
    columns: Mapping[str, str | int] = field(default_factory=dict)
    files: Files | None = None
    score_range: tuple[float, float] | None = None

    @property
    def regression(self) -> bool:
        """Whether the answer is a number rather than one of `labels`."""
        return self.score_range is not None

    @property
    def num_logits(self) -> int:
        """Width of the logits: one for each label, or one number for a regression."""
        return 1 if self.regression else len(self.labels)

    @property
    def monitor(self) -> str:
        """The logged name of the metric that selects the best checkpoint."""
        return f"val/{self.metrics[0]}"

    def to_dict(self) -> dict[str, Any]:
        """This task as plain values, as a YAML file of the user's own would give it; `load_task` reads it back."""
        plain: dict[str, Any] = _plain(asdict(self))
        return plain


def _plain(value: Any) -> Any:
    """Tuples as lists, all the way down: what JSON and YAML can hold."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


_SST_CLOZE = "{sentence} It was {mask}."
_SST_PREFIX = "{sentence} It was {mask}"
_NLI_LABELS = ("entailment", "neutral", "contradiction")
_NLI_WORDS = ("Yes", "Maybe", "No")
_NLI_CLOZE = "{premise:cut}? {mask}, {hypothesis:uncap}"
_NLI_PREFIX = '{premise}\nDoes this mean that "{hypothesis}" is true? Yes, No, or Maybe?\n{mask}'
_PAIR_CLOZE = "{sentence1:cut}{mask}, {sentence2:uncap}"

TASKS: Mapping[str, Task] = {
    task.name: task
    for task in (
        Task(
            name="sst2",
            fields=("sentence",),
            labels=("negative", "positive"),
            label_words=("terrible", "great"),
            cloze=_SST_CLOZE,
            prefix=_SST_PREFIX,
            metrics=("accuracy",),
            files=Files("SST-2", ("nyu-mll/glue", "sst2"), spelling=("0", "1")),
        ),
        Task(
            name="cola",
            fields=("sentence",),
            labels=("unacceptable", "acceptable"),
            label_words=("incorrect", "correct"),
            cloze="{sentence} This is {mask}.",
            prefix="{sentence} This is {mask}",
            metrics=("matthews", "accuracy"),
            columns={"sentence": 3, "label": 1},
            files=Files("CoLA", ("nyu-mll/glue", "cola"), spelling=("0", "1")),
        ),
        Task(
            name="mrpc",
            fields=("sentence1", "sentence2"),
            labels=("not_equivalent", "equivalent"),
            label_words=("No", "Yes"),
            cloze=_PAIR_CLOZE,
            prefix="{sentence1}\n{sentence2}\nDo these sentences mean the same? Yes or No?\n{mask}",
            metrics=("accuracy", "f1"),
            columns={"sentence1": "#1 String", "sentence2": "#2 String", "label": "Quality"},
            files=Files("MRPC", ("nyu-mll/glue", "mrpc"), spelling=("0", "1")),
        ),
        Task(
            name="stsb",
            fields=("sentence1", "sentence2"),
            labels=(),
            label_words=("No", "Yes"),
            cloze=_PAIR_CLOZE,
            prefix="{sentence1}\n{sentence2}\nDo these sentences mean the same? Yes or No?\n{mask}",
            metrics=("pearson", "spearman"),
            columns={"label": "score"},
            files=Files("STS-B", ("nyu-mll/glue", "stsb")),
            score_range=(0.0, 5.0),
        ),
        Task(
            name="qqp",
            fields=("question1", "question2"),
            labels=("not_duplicate", "duplicate"),
            label_words=("No", "Yes"),
            cloze="{question1:cut}{mask}, {question2:uncap}",
            prefix="{question1}\n{question2}\nAre these questions the same? Yes or No?\n{mask}",
            metrics=("accuracy", "f1"),
            columns={"label": "is_duplicate"},
            files=Files("QQP", ("nyu-mll/glue", "qqp"), incomplete=True, spelling=("0", "1")),
        ),
        Task(
            name="mnli",
            fields=("premise", "hypothesis"),
            labels=_NLI_LABELS,
            label_words=_NLI_WORDS,
            cloze=_NLI_CLOZE,
            prefix=_NLI_PREFIX,
            metrics=("accuracy",),
            columns={"premise": "sentence1", "hypothesis": "sentence2", "label": "gold_label"},
            files=Files("MNLI", ("nyu-mll/glue", "mnli"), parts=("matched", "mismatched")),
        ),
        Task(
            name="qnli",
            fields=("question", "sentence"),
            labels=("entailment", "not_entailment"),
            label_words=("Yes", "No"),
            cloze="{question:cut}? {mask}, {sentence:uncap}",
            prefix='{sentence}\nDoes this answer the question "{question}"? Yes or No?\n{mask}',
            metrics=("accuracy",),
            files=Files("QNLI", ("nyu-mll/glue", "qnli")),
        ),
        Task(
            name="rte",
            fields=("sentence1", "sentence2"),
            labels=("entailment", "not_entailment"),
            label_words=("Yes", "No"),
            cloze="{sentence1:cut}? {mask}, {sentence2:uncap}",
            prefix='{sentence1}\nDoes this mean that "{sentence2}" is true? Yes or No?\n{mask}',
            metrics=("accuracy",),
            files=Files("RTE", ("nyu-mll/glue", "rte")),
        ),
        Task(
            name="wnli",
            fields=("sentence1", "sentence2"),
            labels=("not_entailment", "entailment"),
            label_words=("No", "Yes"),
            cloze="{sentence1:cut}? {mask}, {sentence2:uncap}",
            prefix='{sentence1}\nDoes this mean that "{sentence2}" is true? Yes or No?\n{mask}',
            metrics=("accuracy",),
            files=Files("WNLI", ("nyu-mll/glue", "wnli"), spelling=("0", "1")),
        ),
        Task(
            name="snli",
            fields=("premise", "hypothesis"),
            labels=_NLI_LABELS,
            label_words=_NLI_WORDS,
            cloze=_NLI_CLOZE,
            prefix=_NLI_PREFIX,
            metrics=("accuracy",),
            columns={"premise": "sentence1", "hypothesis": "sentence2", "label": "gold_label"},
            files=Files("SNLI", ("stanfordnlp/snli", None), incomplete=True),
        ),
        Task(
            name="trec",
            fields=("sentence",),
            labels=("description", "entity", "abbreviation", "human", "location", "number"),
            label_words=("Description", "Entity", "Expression", "Human", "Location", "Number"),
            cloze="{mask}: {sentence}",
            prefix="{sentence}\nIs this about a Description, Entity, Expression, Human, Location or Number?\n{mask}",
            metrics=("accuracy",),
            columns={"sentence": 1, "label": 0},
            files=Files(
                "TREC",
                ("CogComp/trec", None),
                train=("train_5500", "train"),
                validation=("TREC_10", "dev", "validation"),
                spelling=("DESC", "ENTY", "ABBR", "HUM", "LOC", "NUM"),
                hub_columns={"sentence": "text", "label": "coarse_label"},
            ),
        ),
        Task(
            name="sst5",
            fields=("sentence",),
            labels=("very negative", "negative", "neutral", "positive", "very positive"),
            label_words=("terrible", "bad", "okay", "good", "great"),
            cloze=_SST_CLOZE,
            prefix=_SST_PREFIX,
            metrics=("accuracy",),
            columns={"sentence": 1, "label": 0},
            files=Files("SST-5", ("SetFit/sst5", None), hub_columns={"sentence": "text"}),
        ),
    )
}


_RESERVED = {"label", "mask"}
_POLES = ("low", "high")


def load_task(spec: str | Mapping[str, Any]) -> Task:
    """The task of that name, of that YAML file, or of the mapping that `Task.to_dict` gives.

    A task of the user's own needs `fields` and either `labels` or `score_range`. Left out, `name` is that of the file,
    `label_words` are the labels (`low` and `high` for a score), the prompts are the fields followed by `It was {mask}`,
    and `metrics` are accuracy, or Pearson's and Spearman's correlation for a score.

    Raises:
        UserError: if no such task or file exists, or if the description does not hold.
    """
    if isinstance(spec, Mapping):
        return _described(dict(spec), "data.task")
    if spec in TASKS:
        return TASKS[spec]
    path = Path(spec)
    if path.suffix not in {".yaml", ".yml"}:
        raise UserError(f"data.task: {spec!r} is neither a task nor a YAML file. {did_you_mean(spec, TASKS)}")
    import yaml

    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"data.task: {spec} cannot be read as a task in YAML: {reason}") from error
    if not isinstance(values, dict):
        raise UserError(f"{spec}: a task is a mapping of keys such as fields, labels; this file holds {values!r}.")
    return _described({"name": path.stem, **values}, spec)


def _described(values: dict[str, Any], where: str) -> Task:
    """The task that `values` describe; `where` names the file or the flag in errors."""
    _check_keys(values, Task, where)
    name = values.get("name")
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name):
        raise UserError(f"{where}: name must be a word of letters, digits, '-', '_' or '.', not {name!r}.")
    text_fields = _names(values, "fields", where)
    if unusable := [name for name in text_fields if not name.isidentifier() or name in _RESERVED]:
        raise UserError(f"{where}: fields: {unusable[0]!r} is no plain name, or one of {', '.join(sorted(_RESERVED))}.")
    regression = values.get("score_range") is not None
    if regression == bool(values.get("labels")):
        raise UserError(f"{where}: give either labels (a list of names) or score_range (the lowest and highest score).")
    score_range = _score_range(values["score_range"], where) if regression else None
    labels = () if regression else _names(values, "labels", where, at_least=2)
    poles = _POLES if regression else labels
    words = _names(values, "label_words", where) if values.get("label_words") else poles
    if len(words) != len(poles):
        raise UserError(
            f"{where}: label_words: {len(words)} given, {len(poles)} needed: one for each of {list(poles)}."
        )
    prefix = " ".join(f"{{{name}}}" for name in text_fields) + " It was {mask}"
    return Task(
        name=name,
        fields=text_fields,
        labels=labels,
        label_words=words,
        cloze=_text(values, "cloze", prefix + ".", where),
        prefix=_text(values, "prefix", prefix, where),
        metrics=_metrics(values, regression, where),
        columns=_columns(values, text_fields, where),
        files=_files(values["files"], where) if values.get("files") else None,
        score_range=score_range,
    )


def _check_keys(values: Mapping[str, Any], kind: type[Task | Files], where: str) -> None:
    allowed = [item.name for item in fields(kind)]
    if unknown := [str(key) for key in values if key not in allowed]:
        raise UserError(f"{where}: unknown key {unknown[0]!r}. {did_you_mean(unknown[0], allowed)}")


def _names(values: Mapping[str, Any], key: str, where: str, at_least: int = 1) -> tuple[str, ...]:
    """The list of names under `key`; numbers stand for their digits, for ratings are often called 1 to 5."""
    given = values.get(key)
    if not isinstance(given, list | tuple) or len(given) < at_least:
        raise UserError(f"{where}: {key} must be a list of at least {at_least} name(s), not {given!r}.")
    for item in given:
        if isinstance(item, bool) or not isinstance(item, str | int) or not str(item).strip():
            raise UserError(f"{where}: {key}: {item!r} is no name; in YAML, yes, no, on and off need quotes.")
    if len({str(item) for item in given}) < len(given):
        raise UserError(f"{where}: {key}: a name stands twice in {given!r}.")
    return tuple(str(item) for item in given)


def _text(values: Mapping[str, Any], key: str, default: str, where: str) -> str:
    text = values.get(key, default)
    if not isinstance(text, str):
        raise UserError(f"{where}: {key} must be a text such as {default!r}, not {text!r}.")
    return text


def _score_range(given: Any, where: str) -> tuple[float, float]:
    try:
        low, high = (float(item) for item in given)
    except (TypeError, ValueError):
        low, high = 0.0, 0.0
    if not low < high:
        raise UserError(f"{where}: score_range must be two numbers, the lowest and the highest score, not {given!r}.")
    return low, high


def _metrics(values: Mapping[str, Any], regression: bool, where: str) -> tuple[Metric, ...]:
    correlations: tuple[Metric, ...] = ("pearson", "spearman")
    allowed = correlations if regression else tuple(name for name in get_args(Metric) if name not in correlations)
    chosen = _names(values, "metrics", where) if values.get("metrics") else allowed if regression else ("accuracy",)
    if unknown := [name for name in chosen if name not in allowed]:
        kind = "with a score_range" if regression else "with labels"
        raise UserError(
            f"{where}: metrics: {unknown[0]!r} is none for a task {kind}. {did_you_mean(unknown[0], allowed)}"
        )
    return chosen  # type: ignore[return-value]  # each was found among the values of Metric


def _columns(values: Mapping[str, Any], text_fields: Iterable[str], where: str) -> dict[str, str | int]:
    given = values.get("columns") or {}
    allowed = (*text_fields, "label")
    if not isinstance(given, Mapping) or not all(isinstance(column, str | int) for column in given.values()):
        raise UserError(f"{where}: columns must give a header name or a position for each of {', '.join(allowed)}.")
    if unknown := [str(key) for key in given if key not in allowed]:
        raise UserError(f"{where}: columns: {unknown[0]!r} is no field. {did_you_mean(unknown[0], allowed)}")
    return dict(given)


def _files(given: Mapping[str, Any], where: str) -> Files:
    _check_keys(given, Files, f"{where}: files")
    values: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    return Files(**values)
