import csv
import json
import logging
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lit_spu.data import sources
from lit_spu.data.sources import draw_few_shot_splits, hold_out, load_split, parse_lines
from lit_spu.errors import UserError
from lit_spu.tasks import TASKS, Split, Task, load_task

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_task"
OWN = load_task({"name": "own", "fields": ["text"], "labels": ["bad", "good"]})


def put(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def rows_of(task: Task, tmp_path: Path, name: str, content: str | bytes, split: Split = "train") -> list[Any]:
    put(tmp_path, name, content)
    return load_split(task, str(tmp_path), split)[""]


# --- Official files --------------------------------------------------------------------------------------------------

COUNTS = {  # of ../shared/glue/SOURCES.md: train, validation
    "sst2": (67349, [872]),
    "cola": (8551, [1043]),
    "mrpc": (3668, [408]),
    "stsb": (5749, [1500]),
    "qqp": (23497, [8404]),
    "mnli": (15130, [9815, 1000]),
    "rte": (2490, [277]),
    "wnli": (635, [71]),
    "snli": (15203, [9842]),
    "trec": (5452, [500]),
}
LABELS = {  # of their validation sets, in the order of the task's labels; of trec's train set
    "sst2": [428, 444],
    "cola": [322, 721],
    "mrpc": [129, 279],
    "qqp": [5365, 3039],
    "mnli": [3479, 3123, 3213],
    "rte": [146, 131],
    "wnli": [40, 31],
    "snli": [3329, 3235, 3278],
    "trec": [1162, 1250, 86, 1223, 835, 896],
}


@pytest.mark.parametrize("name", COUNTS)
def test_official_files_have_the_expected_sizes_and_labels(shared: Path, name: str) -> None:
    train = load_split(TASKS[name], str(shared / "glue"), "train")
    validation = load_split(TASKS[name], str(shared / "glue"), "validation")
    assert (len(train[""]), [len(rows) for rows in validation.values()]) == COUNTS[name]
    assert list(validation) == (["", "mismatched"] if name == "mnli" else [""])
    if name in LABELS:
        counts = Counter(row["label"] for row in (train if name == "trec" else validation)[""])
        assert [counts[label] for label in range(len(TASKS[name].labels))] == LABELS[name]
    else:
        assert all(0 <= row["label"] <= 5 for row in train[""])


@pytest.mark.parametrize("name", ["sst2", "snli", "mnli", "rte", "trec"])
@pytest.mark.parametrize("seed", [13, 42])
def test_ready_made_few_shot_splits_are_found(shared: Path, name: str, seed: int) -> None:
    task, source = TASKS[name], str(shared / "glue" / "k-shot-1k-test")
    for split in ("train", "validation"):
        counts = Counter(row["label"] for row in load_split(task, source, split, 16, seed)[""])
        assert counts == dict.fromkeys(range(len(task.labels)), 16)
    test = load_split(task, source, "test", 16, seed)
    assert list(test) == (["", "mismatched"] if name == "mnli" else [""])
    assert len(test[""]) == {"sst2": 872, "rte": 277, "trec": 500}.get(name, 1000)


def test_first_rows_are_read_exactly(shared: Path) -> None:
    glue = str(shared / "glue")
    assert load_split(TASKS["cola"], glue, "train")[""][0] == {
        "sentence": "Our friends won't buy this analysis, let alone the next one we propose.",
        "label": 1,
    }
    assert load_split(TASKS["mrpc"], glue, "validation")[""][0]["sentence2"].startswith('" The foodservice pie')
    assert load_split(TASKS["stsb"], glue, "train")[""][0]["label"] == 5.0
    assert load_split(TASKS["trec"], glue, "train")[""][0] == {
        "sentence": "How did serfdom develop in and then leave Russia ?",
        "label": 0,
    }
    assert any("ð" in row["sentence"] for row in load_split(TASKS["trec"], glue, "train")[""])  # a byte of Latin-1


# --- TSV -------------------------------------------------------------------------------------------------------------

CELL = st.text(st.characters(exclude_characters="\t\n\r", exclude_categories=["Cs"]), min_size=1).filter(str.strip)


@given(texts=st.lists(CELL, min_size=1, max_size=8), bom=st.booleans(), crlf=st.booleans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_tsv_may_hold_any_text(tmp_path: Path, texts: list[str], bom: bool, crlf: bool) -> None:
    texts = ['"', "N/A", "null", "nan", "None", "a\x85b", "c\u2028d", *texts]
    end = "\r\n" if crlf else "\n"
    lines = ["sentence\tindex\tlabel", *(f"{text}\t{i}\t{i % 2}" for i, text in enumerate(texts))]
    content = ("\ufeff" if bom else "") + end.join(lines) + end
    rows = rows_of(TASKS["sst2"], tmp_path, "SST-2/train.tsv", content)
    assert rows == [{"sentence": text.strip(), "label": i % 2} for i, text in enumerate(texts)]


def test_a_header_is_recognised_where_the_task_has_none(tmp_path: Path) -> None:
    rows = rows_of(TASKS["cola"], tmp_path, "CoLA/test.tsv", "index\tsentence\n0\tBill whistled.\n", "test")
    assert rows == [{"sentence": "Bill whistled.", "label": None}]
    rows = rows_of(TASKS["cola"], tmp_path, "CoLA/dev.tsv", "gj04\t0\t*\tA sentence\n", "validation")
    assert rows == [{"sentence": "A sentence", "label": 0}]


@pytest.mark.parametrize("label", ["", "-1", "-1.0"])
def test_a_test_split_may_lack_labels(tmp_path: Path, label: str) -> None:
    content = f"sentence1\tsentence2\tscore\na\tb\t{label}\nc\td\t2.5\n"
    rows = rows_of(TASKS["stsb"], tmp_path, "STS-B/test.tsv", content, "test")
    assert [row["label"] for row in rows] == [None, 2.5]


SST2 = "SST-2/train.tsv"


@pytest.mark.parametrize(
    ("task", "file", "content", "expected"),
    [
        ("sst2", SST2, "sentence\tlabel\na\t1\nb\n", r"train\.tsv, line 3: 1 columns found, 2 expected"),
        ("sst2", SST2, "sentence\tlabel\na\tb\t1\n", r"line 2: 3 columns found, 2 expected"),
        ("sst2", SST2, "sentence\tlabel\n\n \t1\n", r"line 3: the sentence is empty; a text was expected"),
        (
            "sst2",
            SST2,
            "sentence\tlabel\na\t2\n",
            r"line 2: '2' is not a label of sst2; expected one of: negative, positive; or .* file one of: 0, 1\.",
        ),
        ("sst2", SST2, "sentence\tlabel\na\t-1\n", r"line 2: the label '-1' means unknown"),
        ("sst2", SST2, "sentence\tlabel\na\t\n", r"line 2: the label '' means unknown"),
        ("sst2", SST2, b"sentence\tlabel\na\t1\nb\xff\t0\n", r"line 3: the byte 0xff is not valid UTF-8"),
        (
            "sst2",
            SST2,
            "text\tlabel\na\t1\n",
            r"line 1: .* columns text, label, but the sentence .* column 'sentence'",
        ),
        (
            "sst2",
            SST2,
            "sentence\tlable\na\t1\n",
            r"line 1: .* columns .*, but the label of sst2 was expected",
        ),
        ("sst2", SST2, "", r"train\.tsv: the file is empty"),
        ("sst2", SST2, "sentence\tlabel\n", r"train\.tsv: no examples found"),
        (
            "stsb",
            "STS-B/train.tsv",
            "sentence1\tsentence2\tscore\na\tb\t5.1\n",
            r"'5\.1' .* a number from 0\.0 to 5\.0",
        ),
        ("stsb", "STS-B/train.tsv", "sentence1\tsentence2\tscore\na\tb\tnan\n", r"'nan' is not a label of stsb"),
        ("cola", "CoLA/train.tsv", "gj04\t1\n", r"line 1: there are 2 columns and no header, but the sentence of cola"),
        ("trec", "TREC/train.label", "NUM:dist How far ?\nwhat\n", r"line 2: 'what' found; `COARSE:fine question`"),
        ("trec", "TREC/train.label", "FOO:bar How far ?\n", r"line 1: 'FOO' is not a label of trec"),
        (
            "mnli",
            "MNLI/train.tsv",
            "sentence1\tsentence2\tgold_label\na\tb\t-\n",
            r"line 2: the label '-' means unknown",
        ),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, task: str, file: str, content: str | bytes, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        rows_of(TASKS[task], tmp_path, file, content)


def test_known_gaps_are_skipped_counted_and_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    content = "sentence1\tsentence2\tgold_label\na\tb\tneutral\nc\td\t-\ne\t\tneutral\nf\ng\th\tentailment\n"
    with caplog.at_level(logging.INFO):
        rows = rows_of(TASKS["snli"], tmp_path, "SNLI/train.tsv", content)
    assert [(row["premise"], row["label"]) for row in rows] == [("a", 1), ("g", 0)]
    assert "2 examples of" in caplog.text
    assert "3 skipped (missing text, column or agreed label; lines 3, 4, 5)" in caplog.text
    with pytest.raises(UserError, match="line 2: 'maybe' is not a label"):  # a mistake is not a gap
        rows_of(TASKS["snli"], tmp_path, "SNLI/train.tsv", "sentence1\tsentence2\tgold_label\na\tb\tmaybe\n")


def test_a_whole_split_is_preferred_to_a_part(tmp_path: Path) -> None:
    part = rows_of(TASKS["sst2"], tmp_path, "SST-2/train_subset.tsv", "sentence\tlabel\na\t1\n")
    with pytest.warns(UserWarning, match=r"is read from train\.tsv, not train_subset\.tsv"):
        whole = rows_of(TASKS["sst2"], tmp_path, "SST-2/train.tsv", "sentence\tlabel\na\t1\nb\t0\n")
    assert (len(part), len(whole)) == (1, 2)


@pytest.mark.parametrize("folder", ["SST-2", "sst-2", "sst2"])
def test_the_folder_has_several_spellings(tmp_path: Path, folder: str) -> None:
    assert len(rows_of(TASKS["sst2"], tmp_path, f"{folder}/train.tsv", "sentence\tlabel\na\t1\n")) == 1


def test_a_mistyped_source_is_corrected() -> None:
    with pytest.raises(UserError, match=r"data\.source=smaple: there is no folder smaple\. Did you mean sample\?"):
        load_split(TASKS["sst2"], "smaple", "train")


def test_allowed_labels_are_listed_once(tmp_path: Path) -> None:
    stars = load_task({"name": "stars", "fields": ["text"], "labels": ["0", "1"]})
    with pytest.raises(UserError, match=r"'2' is not a label of stars; expected one of: 0, 1\.$"):
        rows_of(stars, tmp_path, "train.csv", "text,label\na,2\n")


def test_missing_files_are_listed(tmp_path: Path) -> None:
    allowed = r"Allowed: a folder with the task's files, hub, sample\.$"
    with pytest.raises(UserError, match=rf"there is no folder .*nowhere\. {allowed}"):
        load_split(TASKS["sst2"], str(tmp_path / "nowhere"), "train")
    put(tmp_path, "RTE/x", "")
    with pytest.raises(UserError, match=r"no SST-2 or sst-2 or sst2 in .*, which contains RTE/\."):
        load_split(TASKS["sst2"], str(tmp_path), "train")
    put(tmp_path, "SST-2/notes.txt", "")
    with pytest.raises(UserError, match=r"no train\.\{tsv,.*\} in .*SST-2, which contains notes\.txt\."):
        load_split(TASKS["sst2"], str(tmp_path), "train")
    put(tmp_path, "SST-2/16-42/train.tsv", "")
    with pytest.raises(UserError, match=r"splits, set --data\.shots"):
        load_split(TASKS["sst2"], str(tmp_path), "train")
    put(tmp_path, "MNLI/dev_mismatched.tsv", "sentence1\tsentence2\tgold_label\na\tb\tneutral\n")
    with pytest.raises(UserError, match=r"no dev_matched\."):  # the second part does not replace the first
        load_split(TASKS["mnli"], str(tmp_path), "validation")


# --- A custom task, in any format ------------------------------------------------------------------------------------


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    import datasets

    datasets.Dataset.from_list(rows).to_parquet(path)


WRITERS: dict[str, Callable[[Path, list[dict[str, Any]]], None]] = {
    "csv": write_csv,
    "jsonl": write_jsonl,
    "parquet": write_parquet,
}


@pytest.mark.parametrize("kind", WRITERS)
def test_every_format_is_read_the_same(tmp_path: Path, kind: str) -> None:
    rows = [{"id": 7, "text": 'say "no",\nor\tso', "label": "bad"}, {"id": 8, "text": "null", "label": "good"}]
    WRITERS[kind](tmp_path / f"train.{kind}", rows)
    assert load_split(OWN, str(tmp_path), "train") == {
        "": [{"text": 'say "no",\nor\tso', "label": 0}, {"text": "null", "label": 1}]
    }


@pytest.mark.parametrize(
    ("labels", "given", "expected"),
    [
        (["1", "2", "3"], "1 3 2", [0, 2, 1]),
        (["1", "2", "3"], "0 1 2", r"line 2: '0' is not a label of mine; expected one of: 1, 2, 3\.$"),
        (["1", "2", "3"], "1 3 0", r"line 4: '0' is not a label"),
        (["bad", "good"], "bad good", [0, 1]),
        (["bad", "good"], "1 0", [1, 0]),
        (["bad", "good"], "bad 1", r"line 3: '1' is not .* one of: bad, good; or in the whole file one of: 0, 1\.$"),
        (["bad", "good"], "1 good 0", r"line 3: 'good' is not a label"),
        (["2", "1", "0"], "0 2", [2, 0]),
        (["0", "1", "neutral"], "0 1 2", [0, 1, 2]),
        (["0", "1", "neutral"], "2 neutral", r"line 3: 'neutral' is not a label"),
        (["-", "+"], "- +", [0, 1]),
    ],
)
def test_labels_of_a_file_are_names_or_positions(
    tmp_path: Path, labels: list[str], given: str, expected: list[int] | str
) -> None:
    task = load_task({"name": "mine", "fields": ["text"], "labels": labels})
    content = "text,label\n" + "".join(f"a,{label}\n" for label in given.split())
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            rows_of(task, tmp_path, "train.csv", content)
    else:
        assert [row["label"] for row in rows_of(task, tmp_path, "train.csv", content)] == expected


def test_a_column_that_a_task_names_must_be_there(tmp_path: Path) -> None:
    named = load_task({"name": "mine", "fields": ["text"], "labels": ["bad", "good"], "columns": {"label": "Gold"}})
    with pytest.raises(UserError, match=r"columns text, label, gold, but the label of mine .* in column 'Gold'\."):
        rows_of(named, tmp_path, "train.csv", "text,label,gold\na,bad,good\n")
    assert rows_of(named, tmp_path, "train.csv", "text,label,Gold\na,bad,good\n") == [{"text": "a", "label": 1}]
    hub = load_task({**named.to_dict(), "columns": {}, "files": {"folder": "x", "hub_columns": {"text": "Body"}}})
    with pytest.raises(UserError, match=r"but the text of mine was expected in column 'Body'"):
        rows_of(hub, tmp_path, "x/train.csv", "text,label\na,bad\n")
    with pytest.raises(UserError, match=r"no X in .*, which contains .*x/"):
        load_split(load_task({**hub.to_dict(), "files": {"folder": "X"}}), str(tmp_path), "train")


def test_a_column_that_occurs_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"line 1: 2 columns are called 'label'"):
        rows_of(OWN, tmp_path, "train.csv", "text,label,label\na,bad,good\n")
    with pytest.raises(UserError, match=r"line 1: a key is given twice"):
        rows_of(OWN, tmp_path, "dev.jsonl", '{"text": "a", "label": "bad", "label": "good"}', "validation")


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@pytest.mark.parametrize(
    ("names", "whole"),
    [
        (["00000-of-00002", "00001-of-00002"], True),
        (["00000-of-00001-a09b74b3ef9c3b56"], True),
        (["00000-of-00003", "00002-of-00003"], False),
        (["00001-of-00002"], False),
        (["00000-of-00001", "00000-of-00002", "00001-of-00002"], False),
        (["00000-of-00001-a0", "00000-of-00001-b0"], False),
        (["0-of-2", "00000-of-00002"], False),
    ],
)
def test_a_split_is_read_from_each_of_its_shards_once(tmp_path: Path, kind: str, names: list[str], whole: bool) -> None:
    for i, name in enumerate(names):
        WRITERS[kind](tmp_path / f"train-{name}.{kind}", [{"text": str(i), "label": "bad"}])
    if whole:
        rows = load_split(OWN, str(tmp_path), "train")[""]
        assert [row["text"] for row in rows] == [str(i) for i in range(len(names))]
    else:
        with pytest.raises(
            UserError, match=rf"train-\*-of-\*\.{kind}: the parts are not complete, or .*twice: train-0"
        ):
            load_split(OWN, str(tmp_path), "train")


def test_of_two_files_for_a_split_the_one_that_is_read_is_said(tmp_path: Path) -> None:
    for name in ("dev.csv", "dev_subset.csv", "validation.jsonl", "validation-00000-of-00001.csv"):
        WRITERS[name.split(".")[1]](tmp_path / name, [{"text": name, "label": "bad"}])
    expected = (
        r"The validation split of own is read from dev\.csv, not dev_subset\.csv, validation-.*csv, validation\.jsonl"
    )
    with pytest.warns(UserWarning, match=expected):
        assert load_split(OWN, str(tmp_path), "validation")[""][0]["text"] == "dev.csv"


@pytest.mark.parametrize("name", ["dev.csv", "validation.csv"])
def test_validation_files_have_two_names(tmp_path: Path, name: str) -> None:
    assert len(rows_of(OWN, tmp_path, name, "text,label\na,bad\n", "validation")) == 1


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("train.csv", 'text,label\n"a\nb",bad\nc,awful\n', r"train\.csv, line 4: 'awful' is not a label"),
        ("train.csv", 'text,label\na,bad\n"b,good\n', r"train\.csv, line 3: .*comma-separated"),
        ("train.jsonl", '{"text": "a", "label": "bad"}\n{"text": "b"}\n', r"line 2: no 'label' found"),
        ("train.jsonl", '{"text": "a", "label": "bad"}\n\n["b"]\n', r"line 3: '\[\"b\"\]' found; a JSON object"),
        ("train.jsonl", '{"text": "a"', r"line 1: .*; a JSON object was expected"),
        ("train.jsonl", '{"text": null, "label": "bad"}', r"line 1: the text is empty"),
        ("train.parquet", "no parquet", r"train\.parquet cannot be read as parquet"),
        (
            "train.tsv",
            "a\tbad\nb\tgood\n",
            r"columns a, bad, but the text of own was expected .*`columns`",
        ),
    ],
)
def test_bad_rows_of_other_formats_are_named(tmp_path: Path, file: str, content: str, expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        rows_of(OWN, tmp_path, file, content)


def test_the_example_task_can_be_read() -> None:
    task = load_task(str(EXAMPLE / "task.yaml"))
    for split, count in (("train", 16), ("validation", 8)):
        rows = load_split(task, str(EXAMPLE), split)[""]  # type: ignore[arg-type]
        assert Counter(row["label"] for row in rows) == {0: count // 2, 1: count // 2}


def test_class_numbers_of_the_hubs_parquet_files_become_labels(tmp_path: Path) -> None:
    import datasets

    hub = datasets.Dataset.from_dict(
        {"text": ["How far ?", "Who ?", "What ?"], "coarse_label": [5, 3, 2], "fine_label": [1, 2, 3]},
        features=datasets.Features(
            {
                "text": datasets.Value("string"),
                "coarse_label": datasets.ClassLabel(names=["ABBR", "ENTY", "DESC", "HUM", "LOC", "NUM"]),
                "fine_label": datasets.Value("int64"),
            }
        ),
    )
    (tmp_path / "trec").mkdir()
    hub.select([0, 1]).to_parquet(tmp_path / "trec" / "train-00000-of-00002.parquet")
    hub.select([2]).to_parquet(tmp_path / "trec" / "train-00001-of-00002.parquet")
    labels = [TASKS["trec"].labels[row["label"]] for row in load_split(TASKS["trec"], str(tmp_path), "train")[""]]
    assert labels == ["number", "human", "description"]


# --- The hub ---------------------------------------------------------------------------------------------------------


def test_an_unreachable_hub_is_an_error_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    start = time.monotonic()
    with pytest.raises(UserError, match=r"data\.source=hub: nyu-mll/glue .*--data\.source=<folder.*sample"):
        load_split(TASKS["sst2"], "hub", "train")
    assert time.monotonic() - start < 5
    assert datasets.config.HF_HUB_OFFLINE is False  # other code may still use the hub


def test_a_custom_task_is_not_on_the_hub() -> None:
    with pytest.raises(UserError, match="own is a custom task"):
        load_split(OWN, "hub", "train")


def test_the_hubs_splits_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    def split(premise: str, label: int) -> Any:
        labels = datasets.ClassLabel(names=list(TASKS["mnli"].labels))
        text = datasets.Value("string")
        return datasets.Dataset.from_dict(
            {"premise": [premise], "hypothesis": ["h"], "label": [label]},
            features=datasets.Features({"premise": text, "hypothesis": text, "label": labels}),
        )

    hub = {name: split(name, -1 if "test" in name else 2) for name in ("train", "validation_matched", "test_matched")}
    monkeypatch.setattr(sources, "_download", lambda path, config: hub)
    assert load_split(TASKS["mnli"], "hub", "train") == {"": [{"premise": "train", "hypothesis": "h", "label": 2}]}
    with pytest.raises(UserError, match="mnli has no split 'validation_mismatched', only train,"):
        load_split(TASKS["mnli"], "hub", "validation")
    hub |= {name: split(name, -1 if "test" in name else 0) for name in ("validation_mismatched", "test_mismatched")}
    validation = load_split(TASKS["mnli"], "hub", "validation")
    assert {part: (rows[0]["premise"], rows[0]["label"]) for part, rows in validation.items()} == {
        "": ("validation_matched", 2),
        "mismatched": ("validation_mismatched", 0),
    }
    assert [rows[0]["label"] for rows in load_split(TASKS["mnli"], "hub", "test").values()] == [None, None]


def test_trecs_test_split_is_used_for_validation(monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    hub = {"test": datasets.Dataset.from_dict({"text": ["Who ?"], "coarse_label": ["HUM"]})}
    monkeypatch.setattr(sources, "_download", lambda path, config: hub)
    assert load_split(TASKS["trec"], "hub", "validation")[""] == [{"sentence": "Who ?", "label": 3}]


# --- Few shots, and held-out examples ---------------------------------------------------------------------------------


@given(
    counts=st.lists(st.integers(0, 12), min_size=3, max_size=3),
    shots=st.integers(1, 5),
    seed=st.integers(0, 9),
    order=st.randoms(use_true_random=False),
)
def test_few_shot_splits_are_balanced_and_disjoint(counts: list[int], shots: int, seed: int, order: Any) -> None:
    task = TASKS["snli"]
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    order.shuffle(labels)
    rows = [{"premise": str(i), "hypothesis": "h", "label": label} for i, label in enumerate(labels)]
    if min(counts) < 2 * shots:
        with pytest.raises(UserError, match=rf"data\.shots={shots} needs {2 * shots} examples of each label"):
            draw_few_shot_splits(task, rows, shots, seed)
        return
    drawn = draw_few_shot_splits(task, rows, shots, seed)
    for split in ("train", "validation"):
        assert Counter(row["label"] for row in drawn[split]) == {0: shots, 1: shots, 2: shots}
    chosen = [row["premise"] for split in drawn.values() for row in split]
    assert len(set(chosen)) == len(chosen)
    assert draw_few_shot_splits(task, rows, shots, seed) == drawn


def test_few_shot_splits_follow_the_papers_protocol(tmp_path: Path) -> None:
    put(tmp_path, "SST-2/train.tsv", "sentence\tlabel\n" + "".join(f"t{i}\t{i % 2}\n" for i in range(40)))
    put(tmp_path, "SST-2/dev.tsv", "sentence\tlabel\n" + "".join(f"d{i}\t{i % 2}\n" for i in range(10)))
    drawn = {s: load_split(TASKS["sst2"], str(tmp_path), s, 4, 13)[""] for s in ("train", "validation", "test")}
    texts = {split: {row["sentence"] for row in rows} for split, rows in drawn.items()}
    assert {split: len(rows) for split, rows in drawn.items()} == {"train": 8, "validation": 8, "test": 10}
    assert all(text.startswith("t") for text in texts["train"] | texts["validation"])
    assert not texts["train"] & texts["validation"]
    assert texts["test"] == {f"d{i}" for i in range(10)}
    other = load_split(TASKS["sst2"], str(tmp_path), "train", 4, 14)[""]
    assert {row["sentence"] for row in other} != texts["train"]


# --- Synthetic sample data and given texts ---------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS.values(), ids=TASKS)
def test_sample_data_fit_every_task(task: Task) -> None:
    rows = load_split(task, "sample", "validation")[""]
    allowed = range(len(task.labels))
    for row in rows:
        assert set(row) == {*task.fields, "label"}
        assert (
            task.score_range[0] <= row["label"] <= task.score_range[1] if task.score_range else row["label"] in allowed
        )


def test_lines_become_examples() -> None:
    assert parse_lines(TASKS["sst2"], ["fine\n", " dull "], "here") == [
        {"sentence": "fine", "label": None},
        {"sentence": "dull", "label": None},
    ]
    assert parse_lines(TASKS["stsb"], ["a\tb"], "here") == [{"sentence1": "a", "sentence2": "b", "label": None}]


@pytest.mark.parametrize(
    ("task", "lines", "expected"),
    [
        ("rte", ["a\tb", "a"], r"here, line 2: 'a' has 1 text\(s\), but rte needs 2: sentence1 <tab> sentence2"),
        ("sst2", ["a\tb"], r"line 1: .* has 2 text\(s\), but sst2 needs 1: sentence"),
        ("sst2", ["a", "\n"], r"line 2: '' has 0 text\(s\)"),
        ("sst2", [], r"here: no text was given"),
    ],
)
def test_unusable_lines_are_explained(task: str, lines: list[str], expected: str) -> None:
    with pytest.raises(UserError, match=expected):
        parse_lines(TASKS[task], lines, "here")


@given(count=st.integers(0, 40), share=st.floats(1e-9, 1, exclude_max=True), seed=st.integers(0, 9))
def test_held_out_examples_are_a_share_of_at_least_one(count: int, share: float, seed: int) -> None:
    rows = [{"sentence": str(i), "label": i % 2} for i in range(count)]
    if round(share * count) in (0, count):
        purpose = "train on: give a smaller" if round(share * count) else "validate on: give a larger"
        with pytest.raises(
            UserError, match=rf"data\.held_out=.* of {count} training examples .* none to {purpose} share"
        ):
            hold_out(TASKS["sst2"], rows, share, seed)
        return
    drawn = hold_out(TASKS["sst2"], rows, share, seed)
    numbers = {split: [int(row["sentence"]) for row in part] for split, part in drawn.items()}
    assert all(part == sorted(part) for part in numbers.values())
    assert sorted(numbers["train"] + numbers["validation"]) == list(range(count))
    assert len(numbers["validation"]) == round(share * count)
    assert hold_out(TASKS["sst2"], rows, share, seed) == drawn
