"""Types that describe a task, its files and how a backbone reads its examples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Metric = Literal["accuracy", "f1", "matthews", "pearson", "spearman"]
Split = Literal["train", "validation", "test"]

Format = Literal["pair", "named", "cloze", "prefix"]
"""A form of the input text.

`pair`: the fields as they are. `named`: T5's `task field: …`. `cloze`: a prompt that holds the mask token.
`prefix`: a prompt that ends right before the answer.
"""


@dataclass(frozen=True)
class Encoding:
    """Tokenizer and input format of a backbone.

    Attributes:
        tokenizer: The backbone's tokenizer.
        format: The input format that the backbone expects.
        mask: Text of the mask token; empty if the backbone has none.
        max_tokens: Longest input that the backbone reads, in tokens; None if there is no limit.
    """

    tokenizer: PreTrainedTokenizerBase
    format: Format
    mask: str
    max_tokens: int | None = None


@dataclass(frozen=True)
class Files:
    """Location and layout of a task's files: in a local folder as GLUE distributes them, and on the Hugging Face hub.

    Attributes:
        folder: Name of the task's folder; the files are `<source>/<folder>/<split>.tsv`.
        hub: Name of the dataset on the hub, and its configuration; an empty name if it is not there.
        train: File names of the train split without extension, the preferred one first.
        validation: The same for the validation split.
        test: The same for the test split.
        parts: Names of the evaluation sets if a task has several (`dev_matched`, `dev_mismatched`). The first one
            is the main set.
        spelling: The labels as the files spell them, in the order of `Task.labels`.
        hub_columns: Column name on the hub of each field that has another name there.
        incomplete: The official files contain rows without a text, without a column, or without a label that the
            annotators agreed on. Such rows are skipped and counted.
    """

    folder: str = ""
    hub: tuple[str, str | None] = ("", None)
    train: tuple[str, ...] = ("train",)
    validation: tuple[str, ...] = ("dev", "validation")
    test: tuple[str, ...] = ("test",)
    parts: tuple[str, ...] = ("",)
    spelling: tuple[str, ...] = ()
    hub_columns: Mapping[str, str] = field(default_factory=dict)
    incomplete: bool = False


@dataclass(frozen=True)
class Task:
    """A classification or regression task on text.

    In a template, `{field}` is replaced by the text of a field and `{mask}` by the mask token. `{field:cut}` drops the
    final punctuation mark, `{field:uncap}` makes the first letter lower case.

    Attributes:
        name: The task's name.
        fields: Names of the text fields of an example.
        labels: Names of the labels; empty for a regression.
        label_words: Words that answer the prompts, one for each label. A regression has two, for the lowest and the
            highest score.
        cloze: Template with the mask token anywhere.
        prefix: Template with the mask token at the end.
        metrics: Metrics to compute. The first one selects the best checkpoint.
        columns: Column name of each field and of `label` if it differs from the field's name; a position, counted
            from 0, if the files have no header.
        files: Location of the official files; None for a custom task.
        score_range: Lowest and highest score of a regression; None for a classification.
    """

    name: str
    fields: tuple[str, ...]
    labels: tuple[str, ...]
    label_words: tuple[str, ...]
    cloze: str
    prefix: str
    metrics: tuple[Metric, ...] = ("accuracy",)
    columns: Mapping[str, str | int] = field(default_factory=dict)
    files: Files | None = None
    score_range: tuple[float, float] | None = None

    @property
    def regression(self) -> bool:
        """True if the task predicts a score rather than one of `labels`."""
        return self.score_range is not None

    @property
    def num_logits(self) -> int:
        """Width of the logits: the number of labels, or 1 for a regression."""
        return 1 if self.regression else len(self.labels)

    @property
    def monitor(self) -> str:
        """Logged name of the metric that selects the best checkpoint."""
        return f"val/{self.metrics[0]}"

    def to_dict(self) -> dict[str, Any]:
        """Return this task as plain values that YAML and JSON can hold; `load_task` reads them."""
        plain: dict[str, Any] = _tuples_to_lists(asdict(self))
        return plain


def _tuples_to_lists(value: Any) -> Any:
    """Return `value` with every tuple in it as a list."""
    if isinstance(value, Mapping):
        return {key: _tuples_to_lists(item) for key, item in value.items()}
    return [_tuples_to_lists(item) for item in value] if isinstance(value, tuple) else value
