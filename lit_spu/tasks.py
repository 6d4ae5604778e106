"""The tasks as data: what an example holds, what the answers are called, how it is asked and how it is scored.

Templates and label words are those of LM-BFF and MeZO (https://arxiv.org/abs/2305.17333, appendix E); class names are the
ones that T5 was trained on. Nothing outside this file knows a task's name.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal

from lit_spu.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Metric = Literal["accuracy", "f1", "matthews", "pearson", "spearman"]
Split = Literal["train", "validation", "test"]

Format = Literal["pair", "named", "cloze", "prefix"]
"""How an example becomes text: the bare fields; T5's `task field: …`; a prompt with a blank; a prompt that the answer follows."""


@dataclass(frozen=True)
class Encoding:
    """What a backbone tells the data module: its tokenizer, the format that it expects and the text of its blank."""

    tokenizer: PreTrainedTokenizerBase
    format: Format
    mask: str


@dataclass(frozen=True)
class Files:
    """Where a task lies in the official layout (GLUE's folders, `<source>/<folder>/<name>.tsv`) and on the hub.

    `columns` maps each field and `label` to a header name, or to a position where the file has no header.
    `names` lists the file stems of a split, best first; of validation splits that are several, all are read.
    """

    folder: str
    hub: tuple[str, str | None]
    columns: Mapping[str, str | int]
    train: tuple[str, ...] = ("train",)
    validation: tuple[str, ...] = ("dev",)
    test: tuple[str, ...] = ("test",)
    spelling: tuple[str, ...] = ()


@dataclass(frozen=True)
class Task:
    """One task. `labels` is empty for a regression, whose answers then lie in `score_range`.

    `label_words` answer the prompts, one a label; a regression has two, the poles of its range. In templates `{field}` is a
    text field and `{mask}` the blank; `{field:cut}` drops the final punctuation mark, `{field:uncap}` lowers the first letter.
    The first of `metrics` selects the best checkpoint.
    """

    name: str
    fields: tuple[str, ...]
    labels: tuple[str, ...]
    label_words: tuple[str, ...]
    cloze: str
    prefix: str
    metrics: tuple[Metric, ...]
    files: Files | None = None
    score_range: tuple[float, float] | None = None

    @property
    def regression(self) -> bool:
        """Whether the answer is a number rather than one of `labels`."""
        return self.score_range is not None

    @property
    def scores(self) -> int:
        """Width of the scores that a backbone gives: one a label, or one number."""
        return 1 if self.regression else len(self.labels)

    @property
    def monitor(self) -> str:
        """The logged name of the metric that selects the best checkpoint."""
        return f"val/{self.metrics[0]}"

    def to_dict(self) -> dict[str, Any]:
        """This task as plain values, as a YAML file of the user's own would give it; `load_task` reads it back."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}


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
            files=Files("SST-2", ("nyu-mll/glue", "sst2"), {"sentence": "sentence", "label": "label"}),
        ),
        Task(
            name="cola",
            fields=("sentence",),
            labels=("unacceptable", "acceptable"),
            label_words=("incorrect", "correct"),
            cloze="{sentence} This is {mask}.",
            prefix="{sentence} This is {mask}",
            metrics=("matthews", "accuracy"),
            files=Files("CoLA", ("nyu-mll/glue", "cola"), {"sentence": 3, "label": 1}),
        ),
        Task(
            name="mrpc",
            fields=("sentence1", "sentence2"),
            labels=("not_equivalent", "equivalent"),
            label_words=("No", "Yes"),
            cloze=_PAIR_CLOZE,
            prefix="{sentence1}\n{sentence2}\nDo these sentences mean the same? Yes or No?\n{mask}",
            metrics=("accuracy", "f1"),
            files=Files(
                "MRPC", ("nyu-mll/glue", "mrpc"), {"sentence1": "#1 String", "sentence2": "#2 String", "label": "Quality"}
            ),
        ),
        Task(
            name="stsb",
            fields=("sentence1", "sentence2"),
            labels=(),
            label_words=("No", "Yes"),
            cloze=_PAIR_CLOZE,
            prefix="{sentence1}\n{sentence2}\nDo these sentences mean the same? Yes or No?\n{mask}",
            metrics=("pearson", "spearman"),
            files=Files(
                "STS-B", ("nyu-mll/glue", "stsb"), {"sentence1": "sentence1", "sentence2": "sentence2", "label": "score"}
            ),
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
            files=Files(
                "QQP",
                ("nyu-mll/glue", "qqp"),
                {"question1": "question1", "question2": "question2", "label": "is_duplicate"},
            ),
        ),
        Task(
            name="mnli",
            fields=("premise", "hypothesis"),
            labels=_NLI_LABELS,
            label_words=_NLI_WORDS,
            cloze=_NLI_CLOZE,
            prefix=_NLI_PREFIX,
            metrics=("accuracy",),
            files=Files(
                "MNLI",
                ("nyu-mll/glue", "mnli"),
                {"premise": "sentence1", "hypothesis": "sentence2", "label": "gold_label"},
                validation=("dev_matched", "dev_mismatched"),
                test=("test_matched", "test_mismatched"),
            ),
        ),
        Task(
            name="qnli",
            fields=("question", "sentence"),
            labels=("entailment", "not_entailment"),
            label_words=("Yes", "No"),
            cloze="{question:cut}? {mask}, {sentence:uncap}",
            prefix='{sentence}\nDoes this answer the question "{question}"? Yes or No?\n{mask}',
            metrics=("accuracy",),
            files=Files(
                "QNLI", ("nyu-mll/glue", "qnli"), {"question": "question", "sentence": "sentence", "label": "label"}
            ),
        ),
        Task(
            name="rte",
            fields=("sentence1", "sentence2"),
            labels=("entailment", "not_entailment"),
            label_words=("Yes", "No"),
            cloze="{sentence1:cut}? {mask}, {sentence2:uncap}",
            prefix='{sentence1}\nDoes this mean that "{sentence2}" is true? Yes or No?\n{mask}',
            metrics=("accuracy",),
            files=Files(
                "RTE", ("nyu-mll/glue", "rte"), {"sentence1": "sentence1", "sentence2": "sentence2", "label": "label"}
            ),
        ),
        Task(
            name="wnli",
            fields=("sentence1", "sentence2"),
            labels=("not_entailment", "entailment"),
            label_words=("No", "Yes"),
            cloze="{sentence1:cut}? {mask}, {sentence2:uncap}",
            prefix='{sentence1}\nDoes this mean that "{sentence2}" is true? Yes or No?\n{mask}',
            metrics=("accuracy",),
            files=Files(
                "WNLI", ("nyu-mll/glue", "wnli"), {"sentence1": "sentence1", "sentence2": "sentence2", "label": "label"}
            ),
        ),
        Task(
            name="snli",
            fields=("premise", "hypothesis"),
            labels=_NLI_LABELS,
            label_words=_NLI_WORDS,
            cloze=_NLI_CLOZE,
            prefix=_NLI_PREFIX,
            metrics=("accuracy",),
            files=Files(
                "SNLI",
                ("stanfordnlp/snli", None),
                {"premise": "sentence1", "hypothesis": "sentence2", "label": "gold_label"},
            ),
        ),
        Task(
            name="trec",
            fields=("sentence",),
            labels=("description", "entity", "abbreviation", "human", "location", "number"),
            label_words=("Description", "Entity", "Expression", "Human", "Location", "Number"),
            cloze="{mask}: {sentence}",
            prefix="{sentence}\nIs this about a Description, Entity, Expression, Human, Location or Number?\n{mask}",
            metrics=("accuracy",),
            files=Files(
                "TREC",
                ("CogComp/trec", None),
                {"sentence": 1, "label": 0},
                train=("train_5500", "train"),
                validation=("TREC_10", "dev"),
                spelling=("DESC", "ENTY", "ABBR", "HUM", "LOC", "NUM"),
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
            files=Files("SST-5", ("SetFit/sst5", None), {"sentence": "text", "label": "label"}),
        ),
    )
}


def load_task(spec: str | Mapping[str, Any]) -> Task:
    """The task of that name, of that YAML file, or of the mapping that `Task.to_dict` gives.

    Raises:
        UserError: if no such task or file exists, or if the description does not hold.
    """
    if isinstance(spec, str) and spec in TASKS:
        return TASKS[spec]
    raise UserError(f"data.task: {spec!r} is neither a task nor a YAML file. {did_you_mean(str(spec), TASKS)}")
