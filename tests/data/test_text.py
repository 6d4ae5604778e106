import io
import string
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lit_spu.data import text as text_module
from lit_spu.data.text import Tokens, encode, encode_cached, render, template_of
from lit_spu.errors import UserError
from lit_spu.tasks import TASKS, Encoding, Format, Task, load_task
from tests.data.conftest import WORDS, word_encoding, words_of

NLI = {"premise": "A man sleeps.", "hypothesis": "Nobody is awake."}


def decoded(tokens: Tokens, i: int, encoding: Encoding) -> list[str]:
    """The tokens of one text, by name."""
    ids = tokens.ids[tokens.starts[i] : tokens.starts[i + 1]].tolist()
    return [str(encoding.tokenizer.convert_ids_to_tokens(one)) for one in ids]


@pytest.mark.parametrize(
    ("task", "kind", "fields", "expected"),
    [  # MeZO's tables of prompts
        ("sst2", "cloze", {"sentence": "a fine film ."}, "a fine film . It was <mask>."),
        ("sst2", "prefix", {"sentence": "a fine film ."}, "a fine film . It was"),
        ("trec", "cloze", {"sentence": "Who is it ?"}, "<mask>: Who is it ?"),
        ("snli", "cloze", NLI, "A man sleeps? <mask>, nobody is awake."),
        (
            "snli",
            "prefix",
            NLI,
            'A man sleeps.\nDoes this mean that "Nobody is awake." is true? Yes, No, or Maybe?',
        ),
        ("mrpc", "cloze", {"sentence1": "It rains.", "sentence2": "Rain falls."}, "It rains<mask>, rain falls."),
    ],
)
def test_prompts_are_those_of_the_paper(task: str, kind: str, fields: dict[str, str], expected: str) -> None:
    mask = "" if kind == "prefix" else "<mask>"
    assert render(getattr(TASKS[task], kind), fields, mask) == expected


@pytest.mark.parametrize(
    ("text", "cut"),
    [("It rains.", "It rains"), ("It rains", "It rains"), ("doesn 't fit .", "doesn 't fit"), ("...", ".."), ("", "")],
)
def test_cut_drops_one_punctuation_mark_and_no_letter(text: str, cut: str) -> None:
    assert render("{a:cut}|", {"a": text}, "") == cut + "|"


@given(st.text())
def test_braces_in_a_field_are_plain_text(text: str) -> None:
    assert render("<{a}>", {"a": text}, "") == f"<{text}>"


def test_the_named_format_is_that_of_t5() -> None:
    encoding = word_encoding("named")
    assert template_of(TASKS["sst2"], encoding) == "sst2 sentence: {sentence}"
    assert template_of(TASKS["mnli"], encoding) == "mnli hypothesis: {hypothesis} premise: {premise}"
    assert template_of(TASKS["qnli"], encoding) == "qnli question: {question} sentence: {sentence}"


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
@pytest.mark.parametrize("form", ["pair", "named", "cloze", "prefix"])
def test_every_task_has_a_template_for_every_backbone(task: Task, form: Format) -> None:
    template = template_of(task, word_encoding(form))
    assert (template is None) == (form == "pair")
    for name in task.fields:
        assert template is None or f"{{{name}" in template


@pytest.mark.parametrize(
    ("form", "template", "expected"),
    [
        ("pair", "clozed", r"data\.template: 'clozed' is neither a format .*Did you mean cloze\?"),
        ("pair", "{sentense}", r"data\.template: \{sentense\} is not a field\. Did you mean sentence\?"),
        ("pair", "Well {mask}", r"data\.template: \{sentence\} is missing"),
        ("pair", "{sentence", r"data\.template: .* is not a valid template"),
        ("pair", "{sentence!r}", r"accepts only :cut or :uncap"),
        ("pair", "{sentence:>9}", r"accepts only :cut or :uncap"),
        ("pair", "{sentence.lower}", r"\{sentence\.lower\} is not a field"),
        ("cloze", "{sentence} so.", r"answers at \{mask\}, so the template must contain \{mask\} once"),
        ("cloze", "{mask} {sentence} {mask}", r"must contain \{mask\} once"),
        ("cloze", "pair", r"the pair template of sst2: .* must contain \{mask\} once"),
        ("prefix", "cloze", r"the cloze template of sst2: .* must end in \{mask\}"),
    ],
)
def test_unusable_templates_are_explained(form: Format, template: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        template_of(TASKS["sst2"], word_encoding(form), template)


def test_fields_are_tokenised_as_a_pair(encoding: Encoding) -> None:
    rows = [{"sentence1": "w1 w2", "sentence2": "w3"}, {"sentence1": "w4 " * 30, "sentence2": "w5 " * 4}]
    tokens = encode(rows, TASKS["rte"], encoding, None, 16)
    assert tokens.types is not None
    for i, row in enumerate(rows):
        oracle = encoding.tokenizer(row["sentence1"], row["sentence2"], truncation=True, max_length=16)
        part = slice(tokens.starts[i], tokens.starts[i + 1])
        assert tokens.ids[part].tolist() == oracle["input_ids"]
        assert tokens.types[part].tolist() == oracle["token_type_ids"]
    assert tokens.lengths.tolist() == [6, 16]


def test_rows_are_tokenised_in_chunks(encoding: Encoding, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"sentence": f"w{i} " * (i + 1)} for i in range(7)]
    whole = encode(rows, TASKS["sst2"], encoding, None, 128)
    monkeypatch.setattr(text_module, "_CHUNK", 3)
    parts = encode(rows, TASKS["sst2"], encoding, None, 128)
    assert np.array_equal(whole.ids, parts.ids)
    assert np.array_equal(whole.starts, parts.starts)


PAIR = load_task({"name": "own", "fields": ["one", "two"], "labels": ["a", "b"]})
TEXTS = st.lists(st.sampled_from(WORDS), min_size=1, max_size=40)


@given(one=TEXTS, two=TEXTS, available=st.integers(2, 60))
def test_a_long_prompt_loses_the_ends_of_its_longest_fields(one: list[str], two: list[str], available: int) -> None:
    encoding = word_encoding("cloze", [*WORDS, "It", "was", "?", "."])
    template = "{one}? It was {mask}. {two}"
    fixed = ["?", "It", "was", "[MASK]", "."]
    max_length = len(fixed) + 2 + available
    tokens = encode([{"one": " ".join(one), "two": " ".join(two)}], PAIR, encoding, template, max_length)
    # the largest common length at which both fit
    cap = max(c for c in range(1, 41) if min(len(one), c) + min(len(two), c) <= available)
    assert decoded(tokens, 0, encoding) == ["[CLS]", *one[:cap], *fixed, *two[:cap], "[SEP]"]


@given(st.text(alphabet=string.printable, max_size=80), st.integers(11, 20))
def test_any_text_can_be_cut(text: str, max_length: int) -> None:
    encoding = word_encoding("cloze")
    text = text.replace("[MASK]", "") + " word"
    tokens = encode([{"sentence": text}], TASKS["sst2"], encoding, "{sentence} It was {mask}.", max_length)
    assert tokens.lengths[0] <= max_length
    assert decoded(tokens, 0, encoding).count("[MASK]") == 1


def test_a_real_tokenizer_cuts_no_more_than_needed(shared: Path) -> None:
    from transformers import AutoTokenizer

    for name, mask in (("minilm-mlm", "[MASK]"), ("t5-tokenizer", "<extra_id_0>")):
        encoding = Encoding(AutoTokenizer.from_pretrained(shared / "models" / name), "cloze", mask)
        rows = [
            {"premise": "Unbelievably overcomplicated. " * n, "hypothesis": "So it is, surely!" * n}
            for n in range(1, 30)
        ]
        task = TASKS["snli"]
        tokens = encode(rows, task, encoding, task.cloze, 64)
        blank = encoding.tokenizer.convert_tokens_to_ids(mask)
        assert tokens.lengths.max() <= 64
        assert tokens.lengths[5:].min() >= 62  # no more is cut than needed
        for i in range(len(rows)):
            assert (tokens.ids[tokens.starts[i] : tokens.starts[i + 1]] == blank).sum() == 1


def test_a_too_small_max_length_is_explained(encoding: Encoding) -> None:
    with pytest.raises(UserError, match=r"data\.max_length=6 leaves no tokens"):
        encode([{"sentence": "w1 w2"}], TASKS["sst2"], encoding, "{sentence} It was {mask}.", 6)


def test_a_text_with_the_mask_token_is_explained(encoding: Encoding) -> None:
    with pytest.raises(UserError, match=r"The sentence 'a \[MASK\]' contains '\[MASK\]'"):
        encode([{"sentence": "a [MASK]"}], TASKS["sst2"], encoding, "{sentence} {mask}", 16)


def test_words_of_agrees_with_the_tokenizer(encoding: Encoding) -> None:
    text = "w1 w2, w3 [MASK]."
    assert len(encoding.tokenizer(text, add_special_tokens=False)["input_ids"]) == len(words_of(text))


# --- The cache -------------------------------------------------------------------------------------------------------

ROWS = [{"sentence1": f"w{i} w1", "sentence2": "w2"} for i in range(20)]
Cached = Callable[..., Tokens]


@pytest.fixture
def cached(tmp_path: Path, encoding: Encoding) -> Cached:
    def tokens(
        rows: list[dict[str, str]] = ROWS,
        task: Task = TASKS["rte"],
        encoding: Encoding = encoding,
        template: str | None = None,
        max_length: int = 16,
    ) -> Tokens:
        return encode_cached(rows, task, encoding, template, max_length, tmp_path)

    return tokens


def same(one: Tokens, other: Tokens) -> bool:
    return all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ("ids", "starts", "types"))


def test_rows_are_tokenised_once(cached: Cached, encoding: Encoding, monkeypatch: pytest.MonkeyPatch) -> None:
    first = cached()
    assert same(first, encode(ROWS, TASKS["rte"], encoding, None, 16))
    encoding.tokenizer("another use of it", truncation=True, max_length=4)  # changes the state of the tokenizer
    monkeypatch.setattr(text_module, "encode", None)
    assert same(first, cached())


def test_every_setting_is_part_of_the_cache_key(cached: Cached, tmp_path: Path) -> None:
    cached()
    cached(rows=[*ROWS[:-1], {"sentence1": "w19", "sentence2": " w1w2"}])  # the same words, cut apart elsewhere
    cached(rows=ROWS[::-1])
    cached(max_length=15)
    cached(template="{sentence1} {sentence2}")
    cached(template="{sentence2} {sentence1}")
    cached(encoding=word_encoding(words=WORDS[::-1]))
    cached(encoding=replace(word_encoding(), mask="[UNK]"))
    assert len(list(tmp_path.iterdir())) == 8


def test_labels_are_no_part_of_the_cache_key(cached: Cached, tmp_path: Path) -> None:
    cached()
    cached(rows=[{**row, "label": "1"} for row in ROWS])
    assert len(list(tmp_path.iterdir())) == 1


def test_a_damaged_cache_file_is_written_again(cached: Cached, tmp_path: Path) -> None:
    first = cached()
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    half = len(whole) // 2
    for damaged in (b"", b"no archive", whole[:half], whole[:-1], whole[:300] + bytes([whole[300] ^ 1]) + whole[301:]):
        file.write_bytes(damaged)
        assert same(cached(), first)
        assert file.read_bytes() == whole  # and written again
    foreign = io.BytesIO()
    np.savez(foreign, ids=np.ones(3, np.int32), starts=np.array([0, 3]))
    array = io.BytesIO()
    np.save(array, np.ones(3))
    for other in (foreign, array):
        file.write_bytes(other.getvalue())
        assert same(cached(), first)
    assert list(tmp_path.iterdir()) == [file]  # no temporary file is left


def test_a_cache_that_cannot_be_written_is_a_warning(tmp_path: Path, encoding: Encoding) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    with pytest.warns(UserWarning, match=r"data\.cache="):
        tokens = encode_cached(ROWS, TASKS["rte"], encoding, None, 16, blocked / "folder")
    assert len(tokens) == len(ROWS)
