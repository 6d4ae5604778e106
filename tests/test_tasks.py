import string
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lit_spu.errors import UserError
from lit_spu.tasks import TASKS, Task, load_task

EXAMPLE = Path(__file__).parents[1] / "examples" / "own_task" / "task.yaml"


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_a_task_can_be_saved_as_yaml_and_loaded(task: Task) -> None:
    assert load_task(yaml.safe_load(yaml.safe_dump(task.to_dict()))) == task
    assert load_task(task.name) is task


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_a_task_is_complete(task: Task) -> None:
    assert len(task.label_words) == (2 if task.regression else len(task.labels))
    assert bool(task.labels) != task.regression
    for template in (task.cloze, task.prefix):
        slots = [name for _, name, _, _ in string.Formatter().parse(template) if name is not None]
        assert sorted(slots) == sorted((*task.fields, "mask"))
    assert task.prefix.endswith("{mask}")
    assert task.files is not None
    assert len(task.files.spelling) in (0, len(task.labels))


def load_task_text(tmp_path: Path, text: str) -> Task:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return load_task(str(path))


def test_a_custom_task_has_defaults(tmp_path: Path) -> None:
    assert load_task_text(tmp_path, "fields: [title, body]\nlabels: [bad, good]") == Task(
        name="mine",
        fields=("title", "body"),
        labels=("bad", "good"),
        label_words=("bad", "good"),
        cloze="{title} {body} It was {mask}.",
        prefix="{title} {body} It was {mask}",
        metrics=("accuracy",),
    )
    scored = load_task_text(tmp_path, "fields: [essay]\nscore_range: [1, 6]")
    assert scored.score_range == (1.0, 6.0)
    assert scored.metrics == ("pearson", "spearman")
    assert scored.label_words == ("low", "high")
    assert scored.labels == ()
    assert scored.num_logits == 1


def test_numbers_may_be_labels(tmp_path: Path) -> None:
    assert load_task_text(tmp_path, "fields: [text]\nlabels: [1, 2, 3]").labels == ("1", "2", "3")


def test_the_example_task_is_loaded() -> None:
    task = load_task(str(EXAMPLE))
    assert (task.name, task.labels, task.metrics) == ("tickets", ("can_wait", "urgent"), ("accuracy", "f1"))
    assert task.columns == {"message": "text"}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "fields: [text]\nlables: [a, b]",
            r"mine\.yaml: unknown key 'lables'\. Did you mean labels\? Allowed: .*fields",
        ),
        ("labels: [a, b]", r"fields must be a list of at least 1 name\(s\), not None"),
        ("fields: text\nlabels: [a, b]", r"fields must be a list"),
        ("fields: [text]", r"either labels .* or score_range"),
        ("fields: [text]\nlabels: [a, b]\nscore_range: [0, 1]", r"either labels .* or score_range"),
        ("fields: [text]\nlabels: [a]", r"labels must be a list of at least 2"),
        ("fields: [text]\nlabels: [a, a]", r"labels: a name is repeated"),
        ("fields: [text]\nlabels: [no, yes]", r"labels: False is not a name; in YAML, yes, no, on and off need quotes"),
        ("fields: [label]\nlabels: [a, b]", r"fields: 'label' cannot name a field"),
        ("fields: [my text]\nlabels: [a, b]", r"fields: 'my text' cannot name a field"),
        ("fields: [text]\nlabels: [a, b]\nlabel_words: [x]", r"label_words: 1 given, 2 needed"),
        ("fields: [text]\nlabels: [a, b]\nmetrics: [acuracy]", r"metrics: 'acuracy' .* Did you mean accuracy\?"),
        (
            "fields: [text]\nlabels: [a, b]\nmetrics: [pearson]",
            r"metrics: 'pearson' is not a metric of a task with labels",
        ),
        (
            "fields: [text]\nscore_range: [0, 1]\nmetrics: [f1]",
            r"metrics: 'f1' is not a metric of a task with a score_range",
        ),
        ("fields: [text]\nscore_range: [1, 1]", r"score_range must be two numbers"),
        ("fields: [text]\nscore_range: 5", r"score_range must be two numbers"),
        (
            "fields: [text]\nlabels: [a, b]\ncolumns: {txt: body}",
            r"columns: 'txt' is not a field\. Did you mean text\?",
        ),
        ("fields: [text]\nlabels: [a, b]\ncolumns: [body]", r"columns must map a field to"),
        ("fields: [text]\nlabels: [a, b]\ncloze: 3", r"cloze must be a text such as"),
        ("fields: [text]\nlabels: [a, b]\nname: 'a {b}'", r"name must be a word"),
        ("fields: [text]\nlabels: [a, b]\nname: ..", r"name must be a word of letters"),
        ("fields: [text]\nlabels: [a, b]\nname: ../x", r"name must be a word of letters"),
        ("fields: [text]\nlabels: [a, b]\nname: " + "x" * 101, r"name must be a word .* at most 100"),
        ("fields: [text]\nlabels: [a, ' a']", r"labels: a name is repeated"),
        ("fields: [text]\nlabels: []", r"either labels .* or score_range"),
        ("fields: [text]\nlabels: null\nscore_range: [0, 1]", r"labels has no value"),
        ("fields: [text]\nlabels: [a, b]\ncloze: null", r"cloze has no value: give one, or remove the key"),
        ("fields: [text]\nlabels: [a, b]\nlabel_words: []", r"label_words must be a list of at least 1"),
        ("fields: [text]\nlabels: [a, b]\nmetrics: []", r"metrics must be a list of at least 1"),
        ("fields: [text]\nscore_range: [2, 1]", r"score_range must be two numbers"),
        ("fields: [text]\nscore_range: [.nan, 1]", r"score_range must be two numbers"),
        ("fields: [text]\nscore_range: [0, .inf]", r"score_range must be two numbers"),
        ("fields: [text]\nscore_range: [false, true]", r"score_range must be two numbers"),
        ("fields: [text]\nscore_range: '05'", r"score_range must be two numbers"),
        ("fields: [text]\nscore_range: [0, 1, 2]", r"score_range must be two numbers"),
        ("fields: [text]\nlabels: [a, b]\ncloze: ''", r"cloze: \{text\} is missing"),
        ("fields: [text]\nlabels: [a, b]\ncloze: '{text}'", r"cloze must have \{mask\} once, in it"),
        ("fields: [text]\nlabels: [a, b]\ncloze: '{txt} {mask}'", r"cloze: \{txt\} is not a field\. Did you mean text"),
        ("fields: [text]\nlabels: [a, b]\nprefix: '{mask} {text}'", r"prefix must have \{mask\} once, at its end"),
        ("fields: [text]\nlabels: [a, b]\nprefix: '{text'", r"prefix: .* is not a valid template"),
        ("fields: [text]\nlabels: [a, b]\ncolumns: {label: true}", r"columns must map a field to"),
        ("fields: [text]\nlabels: [a, b]\ncolumns: {label: -1}", r"columns must map a field to"),
        ("fields: [text]\nlabels: [a, b]\ncolumns: {label: text}", r"two fields are read from the column 'text'"),
        ("fields: [text]\nlabels: [a, b]\nfiles: []", r"files must map keys"),
        ("fields: [text]\nlabels: [a, b]\nfiles: {foldr: x}", r"files: unknown key 'foldr'\. Did you mean folder"),
        ("fields: [text]\nlabels: [a, b]\nfiles: {folder: ../secret}", r"'\.\./secret' is not a name inside"),
        ("fields: [text]\nlabels: [a, b]\nfiles: {folder: /etc}", r"'/etc' is not a name inside"),
        ("fields: [text]\nlabels: [a, b]\nfiles: {folder: 3}", r"3 is not a name inside"),
        ("fields: [text]\nlabels: [a, b]\nfiles: {train: [../x]}", r"'\.\./x' is not a name inside"),
        ("fields: [text]\nlabels: [a, b]\nfiles: {train: name}", r"train must be a list"),
        ("fields: [text]\nlabels: [a, b]\nfiles: {parts: [../x]}", r"'\.\./x' is not a name inside"),
        ("fields: [text]\nlabels: [a, b]\nfiles: {hub: [../x, null]}", r"hub must be a dataset's name"),
        ("fields: [text]\nlabels: [a, b]\nfiles: {spelling: [b, a]}", r"spelling: 'b' is the name of another label"),
        ("fields: [text]\nlabels: [a, b]\nfiles: {spelling: [x]}", r"spelling: 1 given, 2 needed"),
        ("fields: [text]\nlabels: [a, b]\nfiles: {incomplete: 3}", r"incomplete must be true or false"),
        (f"fields: [text]\nlabels: {list(range(9999))}\nlabel_words: [x]", r"label_words: 1 given, 9999 needed"),
        ("fields: [text\nlabels", r"cannot be read as YAML"),
        ("- text", r"a mapping of names to values was expected"),
    ],
)
def test_an_invalid_task_is_explained(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected) as error:
        load_task_text(tmp_path, text)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("sst-2", r"'sst-2' is neither a task nor a YAML file\. Did you mean sst2\?"),
        ("nowhere.yaml", r"nowhere\.yaml cannot be read .*No such file"),
        ({"fields": ["text"], "labels": ["a", "b"]}, r"data\.task: name must be"),
    ],
)
def test_an_unknown_task_is_explained(spec: str | dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        load_task(spec)


NAMES = st.lists(st.from_regex(r"[a-z]{1,8}", fullmatch=True), min_size=2, max_size=4, unique=True)


@given(labels=NAMES, words=NAMES, low=st.integers(-5, 5), column=st.integers(0, 9) | st.text(max_size=5))
def test_any_custom_task_can_be_saved_as_yaml_and_loaded(
    labels: list[str], words: list[str], low: int, column: str | int
) -> None:
    common: dict[str, Any] = {"name": "mine", "fields": ["left", "right"], "columns": {"left": column}}
    if len(labels) == len(words):
        task = load_task({**common, "labels": labels, "label_words": words})
        assert load_task(yaml.safe_load(yaml.safe_dump(task.to_dict()))) == task
        assert task.label_words == tuple(words)
    scored = load_task({**common, "score_range": [low, low + 1]})
    assert load_task(yaml.safe_load(yaml.safe_dump(scored.to_dict()))) == scored
    assert replace(scored, score_range=None) != scored
