"""Small valid files of every format, damaged at random: examples that fit the task, or an error of a line."""

from __future__ import annotations

import csv
import io
import json
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lit_spu.data.sources import load_split
from lit_spu.errors import UserError
from lit_spu.tasks import Split, Task, load_task

CLASSES = load_task({"name": "mine", "fields": ["text"], "labels": ["bad", "good"]})
SCORES = load_task({"name": "mine", "fields": ["text"], "score_range": [0, 5]})
STEMS: dict[Split, str] = {"train": "train", "validation": "dev", "test": "test"}


def valid_file(kind: str, task: Task) -> bytes:
    """Return a file of three examples; `quoted.tsv` is a TSV with quoted cells."""
    rows = [
        {"id": i, "text": f'A "film", é {i}', "label": str(i) if task.regression else task.labels[i % 2]}
        for i in range(3)
    ]
    if kind == "parquet":
        import pyarrow as pa  # type: ignore[import-untyped]  # it ships no type information
        from pyarrow import parquet

        sink = pa.BufferOutputStream()
        parquet.write_table(pa.Table.from_pylist(rows), sink)
        content: bytes = sink.getvalue().to_pybytes()
        return content
    if kind == "jsonl":
        return "".join(f"{json.dumps(row)}\n" for row in rows).encode()
    if kind == "tsv":
        return "".join("\t".join(map(str, cells)) + "\n" for cells in (rows[0], *map(dict.values, rows))).encode()
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0], delimiter="," if kind == "csv" else "\t")
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue().encode()


CUT = st.tuples(st.floats(0, 1), st.sampled_from([0, 0, 0, 1, 2, 50]))
NEW = st.binary(max_size=3) | st.sampled_from(
    [b"\n", b"\r", b"\t", b'"', b"\x00", b"\xed\xa0\x80", b"\xff\xfe", b"\\u"]
)


def damage(content: bytes, changes: list[tuple[tuple[float, int], bytes]]) -> bytes:
    """Replace pieces of a file: each change is a place from 0 to 1, the length of the piece, and the new bytes."""
    for (place, length), new in changes:
        start = round(place * len(content))
        content = content[:start] + new + content[start + length :]
    return content


def check_file(folder: Path, name: str, task: Task, split: Split, content: bytes) -> None:
    """Check that a file is read as examples that fit the task, or refused in a few lines that name the file."""
    path = folder / name
    path.write_bytes(content)
    start = time.monotonic()
    message, rows = None, []
    try:
        rows = load_split(task, str(folder), split)[""]
    except UserError as error:
        message = str(error)
    assert time.monotonic() - start < 10
    path.unlink()
    assert message is None or (str(folder) in message and len(message) < 700 and "\n" not in message)
    for row in rows:
        assert row["text"].encode()
        if row["label"] is None:
            assert split == "test"
        else:
            assert 0 <= row["label"] <= 5 if task.regression else row["label"] in (0, 1)


@pytest.mark.parametrize(
    "examples",
    [15, pytest.param(500, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize("kind", ["csv", "tsv", "quoted.tsv", "jsonl", "parquet"])
def test_a_damaged_file_is_read_or_refused(tmp_path: Path, kind: str, examples: int) -> None:
    files = {task.regression: valid_file(kind, task) for task in (CLASSES, SCORES)}

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck))
    @given(
        st.sampled_from([CLASSES, SCORES]),
        st.sampled_from(list(STEMS)),
        st.lists(st.tuples(CUT, NEW), max_size=4),
    )
    def check(task: Task, split: Split, changes: list[tuple[tuple[float, int], bytes]]) -> None:
        name = f"{STEMS[split]}.{kind.split('.')[-1]}"
        check_file(tmp_path, name, task, split, damage(files[task.regression], changes))

    check()


@pytest.mark.parametrize("kind", ["csv", "tsv", "quoted.tsv", "jsonl", "parquet"])
def test_a_file_that_is_cut_off_anywhere_is_read_or_refused(tmp_path: Path, kind: str) -> None:
    content = valid_file(kind, CLASSES)
    for length in range(0, len(content), 1 if kind != "parquet" else 17):
        check_file(tmp_path, f"train.{kind.split('.')[-1]}", CLASSES, "train", content[:length])
