"""Files of every format: cells that are no text, unused columns, quoted and damaged files."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lit_spu.data.sources import load_split
from lit_spu.errors import UserError
from lit_spu.tasks import TASKS, load_task
from tests.data.test_sources import OWN, WRITERS, rows_of, write_csv, write_jsonl, write_parquet

NOT_TEXT = [[], ["a"], {"a": 1}, True, False, float("inf"), b"Good", "\ud800"]


@pytest.mark.parametrize("cell", NOT_TEXT, ids=repr)
def test_a_cell_that_is_no_text_is_refused(tmp_path: Path, cell: Any) -> None:
    if not isinstance(cell, bytes):
        write_jsonl(tmp_path / "train.jsonl", [{"text": "fine", "label": "bad"}, {"text": cell, "label": "bad"}])
        with pytest.raises(UserError, match=r"train\.jsonl, line 2: the text (is|has) .*(text or a number|not valid)"):
            load_split(OWN, str(tmp_path), "train")
    if cell not in ([], "\ud800"):
        write_parquet(tmp_path / "dev.parquet", [{"text": cell, "label": "bad"}])
        with pytest.raises(UserError, match=r"dev\.parquet, line 1: the text is .*; a text or a number was expected"):
            load_split(OWN, str(tmp_path), "validation")


@pytest.mark.parametrize("cell", [None, float("nan")])
def test_a_cell_without_a_value_is_empty(tmp_path: Path, cell: Any) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"text": cell, "label": "bad"}])
    write_parquet(tmp_path / "dev.parquet", [{"text": cell, "label": "bad"}])
    for split in ("train", "validation"):
        with pytest.raises(UserError, match=r"line 1: the text is empty"):
            load_split(OWN, str(tmp_path), split)


def test_a_number_is_a_text(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [{"text": 7, "label": 0}, {"text": 2.5, "label": 1}])
    assert load_split(OWN, str(tmp_path), "train")[""] == [{"text": "7", "label": 0}, {"text": "2.5", "label": 1}]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
@pytest.mark.parametrize("labels", [["false", "true"], ["False", "True"]])
def test_a_label_may_be_true_or_false(tmp_path: Path, kind: str, labels: list[str]) -> None:
    WRITERS[kind](tmp_path / f"train.{kind}", [{"text": "a", "label": True}, {"text": "b", "label": False}])
    task = load_task({"name": "mine", "fields": ["text"], "labels": labels})
    assert [row["label"] for row in load_split(task, str(tmp_path), "train")[""]] == [1, 0]
    with pytest.raises(UserError, match="line 1: 'true' is not a label of own"):
        load_split(OWN, str(tmp_path), "train")


def test_only_wanted_columns_of_jsonl_are_read(tmp_path: Path) -> None:
    lines = [
        '{"id": 1, "text": "a", "label": "bad"}',
        '{"text": "b", "label": "good", "extra": {}}',
        '{"id": [1], "text": "c", "label": "good"}',
    ]
    assert len(rows_of(OWN, tmp_path, "train.jsonl", "\n".join(lines))) == 3
    with pytest.raises(UserError, match=r"line 1: no 'label' found, which other lines have"):
        rows_of(OWN, tmp_path, "test.jsonl", '{"text": "a"}\n{"text": "a", "label": "bad"}', "test")


def test_only_wanted_columns_of_parquet_are_read(tmp_path: Path) -> None:
    import pyarrow as pa  # type: ignore[import-untyped]  # it ships no type information
    from pyarrow import parquet

    class Unknown(pa.ExtensionType):  # type: ignore[misc]  # as above
        def __init__(self) -> None:
            super().__init__(pa.int64(), "tests.unknown")

        def __arrow_ext_serialize__(self) -> bytes:
            return b""

    unused = {
        "a_map": pa.array([[("k", 1)]], pa.map_(pa.string(), pa.int64())),
        "a_uuid": pa.array([b"0" * 16], pa.uuid()),
        "a_time": pa.array([1], pa.duration("ns")),
        "unknown": pa.ExtensionArray.from_storage(Unknown(), pa.array([1])),
        "image": pa.array([{"bytes": b"x", "path": None}]),
        "not_utf8": pa.Array.from_buffers(pa.string(), 1, pa.array([b"\xff"]).buffers()),
    }
    table = pa.table({"text": ["a"], "label": ["good"], **unused})
    features = {"image": {"_type": "Image"}, "pdf": {"_type": "Unheard"}, "text": {"dtype": "string", "_type": "Value"}}
    hub = json.dumps({"info": {"features": features}}).encode()
    parquet.write_table(table.replace_schema_metadata({b"huggingface": hub}), tmp_path / "train.parquet")
    assert load_split(OWN, str(tmp_path), "train")[""] == [{"text": "a", "label": 1}]
    parquet.write_table(table.set_column(0, "text", unused["not_utf8"]), tmp_path / "dev.parquet")
    with pytest.raises(UserError, match=r"dev\.parquet, line 1: the text cannot be read: 'utf-8' codec can't decode"):
        load_split(OWN, str(tmp_path), "validation")


# --- Quoted tab-separated values, long cells, line ends, damaged files -----------------------------------------------

QUOTED_TEXT = st.text(st.sampled_from("ab\"\t\n '"), max_size=6).map(lambda text: f"x{text}y")


@given(texts=st.lists(QUOTED_TEXT, min_size=1, max_size=6), quoting=st.sampled_from([0, 1, 2]))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_a_tsv_of_pandas_is_read_as_pandas_reads_it(tmp_path: Path, texts: list[str], quoting: int) -> None:
    import pandas as pd  # type: ignore[import-untyped]  # it ships no type information

    frame = pd.DataFrame({"text": ['say "no"', *texts], "label": "bad"})
    frame.to_csv(tmp_path / "train.tsv", sep="\t", index=False, quoting=quoting)
    assert [row["text"] for row in load_split(OWN, str(tmp_path), "train")[""]] == ['say "no"', *texts]


@pytest.mark.parametrize(
    "texts",
    [
        ['"Hello"', "so"],
        ['"Hello', 'it" was'],
        ['"Hello', 'it was"'],
        ['"', "a"],
        ['""', "a"],
        ['"a ""b"" c"', 'he said "no"'],
        ['""Hello"", he said'],
    ],
)
def test_quotation_marks_of_an_official_tsv_are_text(tmp_path: Path, texts: list[str]) -> None:
    lines = ["sentence\tlabel", *(f"{text}\t1" for text in texts)]
    rows = rows_of(TASKS["sst2"], tmp_path, "SST-2/train.tsv", "\n".join(lines))
    assert [row["sentence"] for row in rows] == texts


def test_a_cell_may_be_long(tmp_path: Path) -> None:
    text = "word " * 30_000
    write_csv(tmp_path / "train.csv", [{"text": text, "label": "bad"}])
    assert load_split(OWN, str(tmp_path), "train")[""][0]["text"] == text.strip()


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv"])
def test_a_file_without_the_columns_shows_those_it_has(tmp_path: Path, kind: str) -> None:
    WRITERS[kind](tmp_path / f"train.{kind}", [{"Text": "a", "Label": "bad"}])
    with pytest.raises(UserError, match=r"the columns Text, Label, but the text of own was expected in column 'text'"):
        load_split(OWN, str(tmp_path), "train")


def test_a_folder_that_cannot_be_read_is_an_error_of_a_line() -> None:
    with pytest.raises(UserError, match=r"data\.source=x+ cannot be read: File name too long\."):
        load_split(OWN, "x" * 300, "train")


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize(
    ("extension", "lines"),
    [
        ("tsv", ["text\tlabel", "a\tbad", "b\tgood"]),
        ("csv", ["text,label", "a,bad", "b,good"]),
        ("jsonl", ['{"text": "a", "label": "bad"}', '{"text": "b", "label": "good"}']),
    ],
)
def test_lines_may_end_in_any_way(tmp_path: Path, extension: str, lines: list[str], end: str) -> None:
    rows = rows_of(OWN, tmp_path, f"train.{extension}", end.join([*lines, ""]))
    assert rows == [{"text": "a", "label": 0}, {"text": "b", "label": 1}]


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("train.csv", gzip.compress(b"text,label\na,bad\n"), r"train\.csv, line 1: the byte 0x8b is not valid UTF-8"),
        ("train.csv", "text,label\na,bad\n".encode("utf-16"), r"line 1: the byte 0xff is not valid UTF-8"),
        ("train.csv", "text,label\na,bad\n".encode("utf-16-le"), r"there are the columns 't\\x00e"),
        ("train.csv", "text;label\na;bad\n", r"there are the columns text;label, but the text of own"),
        ("train.csv", "text\tlabel\na\tbad\n", r"there are the columns 'text\\tlabel'"),
        ("train.csv", "", r"train\.csv: the file is empty"),
        ("train.csv", "text,label\n", r"train\.csv: no examples found"),
        ("train.csv", "x" * 10_000_000 + "\ny", r"there are the columns 'x{40}'…, but"),
        ("train.csv", ",".join(map(str, range(9999))) + "\ny", r"columns 0, 1, .*, 11, … \(9999 in all\), but"),
        ("train.jsonl", "[" * 100_000, r"train\.jsonl, line 1: .*; a JSON object was expected"),
        ("train.jsonl", '{"text": ' + "9" * 5000 + "}", r"train\.jsonl, line 1: .*; a JSON object was expected"),
        ("train.jsonl", '[{"text": "a", "label": "bad"}]', r"line 1: .* found; a JSON object was expected"),
        ("train.jsonl", "", r"train\.jsonl: no examples found"),
        ("train.parquet", b"\x89PNG\r\n\x1a\n" + bytes(100), r"train\.parquet cannot be read as parquet"),
        ("train.parquet", b"", r"train\.parquet cannot be read as parquet"),
    ],
    ids=range(15),
)
def test_damaged_and_foreign_files_are_one_line(tmp_path: Path, name: str, content: str | bytes, expected: str) -> None:
    with pytest.raises(UserError, match=expected) as error:
        rows_of(OWN, tmp_path, name, content)
    assert len(str(error.value).splitlines()) == 1
    assert len(str(error.value)) < 600
