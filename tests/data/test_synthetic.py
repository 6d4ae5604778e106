"""Tests of the synthetic examples: correct by solvers that read only the text, reproducible, and not in the corpus."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from hashlib import sha256
from typing import Any

import pytest

from lit_spu.data import synthetic
from lit_spu.data.synthetic import SIZES, corpus, generate
from lit_spu.data.text import Row
from lit_spu.errors import UserError
from lit_spu.tasks import TASKS


@cache
def examples(name: str, split: str, seed: int = 0) -> list[dict[str, Any]]:
    return generate(TASKS[name], split, seed)


def one_of(names: str) -> str:
    return rf"(?:{names.replace(' ', '|')})"


# --- Solvers ---------------------------------------------------------------------------------------------------------


def opinion(row: Row) -> int:
    """Return the opinion of the main clause, from -2 to 2; a negation changes its sign."""
    text = row["sentence"].lower().rstrip(".")
    though = one_of("although though while")
    main = re.sub(rf"^({though}|despite) .*, |^.*, but |, {though} .*$| despite .*$", "", text)
    words = set(main.split())
    good, bad, fair = (words & set(synthetic._WORDS[kind].split()) for kind in ("good", "bad", "fair"))
    if fair or (good and bad):
        return 0
    sign = 1 if good else -1
    if re.search(r"\b(not|never|hardly|far from|anything but)\b", main):
        sign = -sign
    return 2 * sign if words & set(synthetic._WORDS["very"].split()) else sign


def acceptable(row: Row) -> int:
    one, near, verb, place = (one_of(synthetic._WORDS[slot]) for slot in ("one", "near", "does", "place"))
    shape = rf"The {one}(?P<many>s?)(?: {near} the {one}s?)? {verb}(?P<one>s?) the {one}s? {near} the {place}\."
    match = re.fullmatch(shape, row["sentence"])
    return int(match is not None and bool(match["many"]) != bool(match["one"]))


Facts = dict[str, set[int]]


def facts(text: str) -> Facts:
    """Return the groups that each fact of a text may have: one, or several if the text has only their class name."""
    found: Facts = {}
    for fact, groups in synthetic._EVENTS.items():
        for group, names in enumerate(groups):
            if any(re.search(rf"\b{name}\b", text.lower()) for name in names):
                found.setdefault(fact, set()).add(group)
    return found


def inference(row: Row) -> int:
    premise, hypothesis = (row[field] for field in row if field != "label")
    denied = [" will not " in text for text in (premise, hypothesis)]
    known, claimed = facts(premise), facts(hypothesis)
    follows = all(known.get(fact, set()) and known[fact] <= groups for fact, groups in claimed.items())
    if denied[0]:
        follows = known == claimed
    return 1 if not follows else 2 * (denied[0] != denied[1])


def same(row: Row) -> int:
    first, second = (row[field] for field in row if field != "label")
    return int(
        facts(first) == facts(second)
        and ("reason" in first.lower() or "Why" in first) == ("reason" in second.lower() or "Why" in second)
    )


def similarity(row: Row) -> float:
    first, second = facts(row["sentence1"]), facts(row["sentence2"])
    return 5.0 - sum(first[fact] != second[fact] for fact in first)


def answered(row: Row) -> int:
    asked, stated = row["question"].split()[0].lower(), facts(row["sentence"])
    about = all(stated[fact] == groups for fact, groups in facts(row["question"]).items())
    return int(not (about and asked in stated))


def asked_for(row: Row) -> int:
    question = row["sentence"].lower()
    for label, shape in (
        (2, r"\b(stand for|short for|full form)\b"),
        (5, r"\bhow (many|old)\b|\bwhat year\b"),
        (4, rf"\bwhere\b|\bwhich country\b|\bwhat {one_of(synthetic._WORDS['place'])}\b"),
        (3, rf"\bwho\b|\b(which|what) {one_of(synthetic._WORDS['one'])}\b"),
        (1, rf"\b(which|what) {one_of(synthetic._WORDS['creature'] + ' ' + synthetic._WORDS['thing'])}\b"),
    ):
        if re.search(shape, question):
            return label
    return 0


def meant(row: Row) -> int:
    text, claim = row["sentence1"], row["sentence2"]
    first = one_of("big getting rich fast weak afraid learned")
    named = re.findall(
        rf"\b{one_of(synthetic._WORDS['name'] + ' ' + synthetic._WORDS['item'] + ' ' + synthetic._WORDS['box'])}\b",
        text,
    )
    return int(named[0 if re.search(rf"\b{first}\b", text) else 1] in claim)


SOLVERS: Mapping[str, Callable[[Row], float]] = {
    "sst2": lambda row: int(opinion(row) > 0),
    "sst5": lambda row: opinion(row) + 2,
    "cola": acceptable,
    "trec": asked_for,
    "mrpc": same,
    "qqp": same,
    "stsb": similarity,
    "mnli": inference,
    "snli": inference,
    "rte": lambda row: min(inference(row), 1),
    "qnli": answered,
    "wnli": meant,
}


@pytest.mark.parametrize("name", TASKS)
def test_solvers_find_the_labels_in_the_texts(name: str) -> None:
    for split in SIZES:
        for row in examples(name, split):
            assert SOLVERS[name](row) == row["label"], row


DIGEST = "c0880cfb6350"


# --- Data ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_splits_have_the_tasks_fields_and_labels_and_share_no_text(name: str) -> None:
    task = TASKS[name]
    splits = {(split, seed): examples(name, split, seed) for split in SIZES for seed in (0, 1)}
    texts = {key: {tuple(row[field] for field in task.fields) for row in rows} for key, rows in splits.items()}
    for (split, seed), rows in splits.items():
        assert len(texts[split, seed]) == len(rows) == SIZES[split]
        assert all(list(row) == [*task.fields, "label"] for row in rows)
        assert all(type(row["label"]) is (float if task.regression else int) for row in rows)
        labels = Counter(row["label"] for row in rows)
        assert set(labels) == set(range(6 if task.regression else len(task.labels)))
        assert min(labels.values()) > 0.4 * len(rows) / len(labels)
    for split in SIZES:
        others = set().union(*(texts[other, seed] for other in SIZES for seed in (0, 1) if other != split))
        assert not others & texts[split, 0]
        assert texts[split, 0] != texts[split, 1]


@pytest.mark.slow
def test_the_same_on_every_platform() -> None:
    """The digest is recorded. It may change only if the grammars change."""
    code = (
        "from lit_spu.data.synthetic import *; from lit_spu.tasks import TASKS; from hashlib import sha256;"
        "print(sha256(repr(([generate(t, 'test') for t in TASKS.values()], [*corpus(500)])).encode()).hexdigest())"
    )
    other = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": "7"}
    )
    here = sha256(repr(([generate(task, "test") for task in TASKS.values()], [*corpus(500)])).encode()).hexdigest()
    assert here == other.stdout.strip()
    assert here.startswith(DIGEST)


def test_single_words_do_not_reveal_the_label() -> None:
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    train, held_out = (examples("sst2", split) for split in ("train", "validation"))
    words = CountVectorizer().fit([row["sentence"] for row in train])

    def features(rows: list[dict[str, Any]]) -> Any:
        return words.transform([row["sentence"] for row in rows])

    probe = LogisticRegression(max_iter=1000).fit(features(train), [row["label"] for row in train])
    assert 0.6 < probe.score(features(held_out), [row["label"] for row in held_out]) < 0.8


def test_the_corpus_has_no_validation_or_test_example() -> None:
    texts = set(corpus(20_000, seed=3))
    for task in TASKS.values():
        for row in (
            row for split in ("validation", "test") for seed in (0, 1) for row in examples(task.name, split, seed)
        ):
            assert " ".join(row[field] for field in task.fields) not in texts
            if len(task.fields) == 1:
                prompts = {task.cloze.format_map({**row, "mask": word}) for word in task.label_words}
                assert not prompts & texts


def test_most_prompts_of_the_corpus_have_the_right_answer() -> None:
    texts = list(corpus(20_000, seed=4))
    prompt = re.compile(r"(?P<sentence>[^.]*\.) It was (?P<word>terrible|great)\.")
    matches = [match for match in map(prompt.fullmatch, texts) if match]
    clear = [match for match in matches if opinion({"sentence": match["sentence"]})]
    right = sum((opinion({"sentence": match["sentence"]}) > 0) == (match["word"] == "great") for match in clear)
    assert len(clear) > 500
    assert 0.85 < right / len(clear) < 1


def test_a_custom_task_has_no_synthetic_data() -> None:
    with pytest.raises(UserError, match=r"no synthetic sample data for the task 'mine'.*Set --data.source"):
        generate(replace(TASKS["sst2"], name="mine"), "train")
    with pytest.raises(UserError, match=r"no synthetic sample data for the task 'sst2' with these fields and labels"):
        generate(replace(TASKS["sst2"], labels=("positive", "negative")), "train")
    assert generate(replace(TASKS["sst2"], cloze="{sentence} {mask}"), "train") == generate(TASKS["sst2"], "train")
