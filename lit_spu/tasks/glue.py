"""The built-in tasks: GLUE, SNLI, TREC and SST-5.

Templates and label words are those of LM-BFF and MeZO (https://arxiv.org/abs/2305.17333, appendix E). Class names are
the ones that T5 was trained on. To add a task, add it here and give it a grammar in `lit_spu/data/synthetic.py`.
"""

from __future__ import annotations

from collections.abc import Mapping

from lit_spu.tasks.task import Files, Task

_SST_CLOZE = "{sentence} It was {mask}."
_SST_PREFIX = "{sentence} It was {mask}"
_NLI_LABELS = ("entailment", "neutral", "contradiction")
_NLI_WORDS = ("Yes", "Maybe", "No")
_NLI_CLOZE = "{premise:cut}? {mask}, {hypothesis:uncap}"
_NLI_PREFIX = '{premise}\nDoes this mean that "{hypothesis}" is true? Yes, No, or Maybe?\n{mask}'
_NLI_COLUMNS = {"premise": "sentence1", "hypothesis": "sentence2", "label": "gold_label"}
_RTE_CLOZE = "{sentence1:cut}? {mask}, {sentence2:uncap}"
_RTE_PREFIX = '{sentence1}\nDoes this mean that "{sentence2}" is true? Yes or No?\n{mask}'
_PARAPHRASE_CLOZE = "{sentence1:cut}{mask}, {sentence2:uncap}"
_PARAPHRASE_PREFIX = "{sentence1}\n{sentence2}\nDo these sentences mean the same? Yes or No?\n{mask}"

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
            cloze=_PARAPHRASE_CLOZE,
            prefix=_PARAPHRASE_PREFIX,
            metrics=("accuracy", "f1"),
            columns={"sentence1": "#1 String", "sentence2": "#2 String", "label": "Quality"},
            files=Files("MRPC", ("nyu-mll/glue", "mrpc"), spelling=("0", "1")),
        ),
        Task(
            name="stsb",
            fields=("sentence1", "sentence2"),
            labels=(),
            label_words=("No", "Yes"),
            cloze=_PARAPHRASE_CLOZE,
            prefix=_PARAPHRASE_PREFIX,
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
            columns=_NLI_COLUMNS,
            files=Files("MNLI", ("nyu-mll/glue", "mnli"), parts=("matched", "mismatched")),
        ),
        Task(
            name="qnli",
            fields=("question", "sentence"),
            labels=("entailment", "not_entailment"),
            label_words=("Yes", "No"),
            cloze="{question:cut}? {mask}, {sentence:uncap}",
            prefix='{sentence}\nDoes this answer the question "{question}"? Yes or No?\n{mask}',
            files=Files("QNLI", ("nyu-mll/glue", "qnli")),
        ),
        Task(
            name="rte",
            fields=("sentence1", "sentence2"),
            labels=("entailment", "not_entailment"),
            label_words=("Yes", "No"),
            cloze=_RTE_CLOZE,
            prefix=_RTE_PREFIX,
            files=Files("RTE", ("nyu-mll/glue", "rte")),
        ),
        Task(
            name="wnli",
            fields=("sentence1", "sentence2"),
            labels=("not_entailment", "entailment"),
            label_words=("No", "Yes"),
            cloze=_RTE_CLOZE,
            prefix=_RTE_PREFIX,
            files=Files("WNLI", ("nyu-mll/glue", "wnli"), spelling=("0", "1")),
        ),
        Task(
            name="snli",
            fields=("premise", "hypothesis"),
            labels=_NLI_LABELS,
            label_words=_NLI_WORDS,
            cloze=_NLI_CLOZE,
            prefix=_NLI_PREFIX,
            columns=_NLI_COLUMNS,
            files=Files("SNLI", ("stanfordnlp/snli", None), incomplete=True),
        ),
        Task(
            name="trec",
            fields=("sentence",),
            labels=("description", "entity", "abbreviation", "human", "location", "number"),
            label_words=("Description", "Entity", "Expression", "Human", "Location", "Number"),
            cloze="{mask}: {sentence}",
            prefix="{sentence}\nIs this about a Description, Entity, Expression, Human, Location or Number?\n{mask}",
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
            columns={"sentence": 1, "label": 0},
            files=Files("SST-5", ("SetFit/sst5", None), hub_columns={"sentence": "text"}),
        ),
    )
}


def is_built_in(task: Task) -> bool:
    """Return whether the task is one of these, with their settings."""
    return TASKS.get(task.name) == task
