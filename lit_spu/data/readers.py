"""Readers of files: a file becomes a table of cells, and a table becomes the rows of a task.

A row that cannot be used is an error that names the file and the line. Exception: if the official files of a task are
known to be incomplete, the incomplete rows are skipped, counted and logged.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning.pytorch.utilities import rank_zero_info

from lit_spu.data.text import Row
from lit_spu.errors import UserError
from lit_spu.tasks import Split, Task

if TYPE_CHECKING:
    import datasets

Lines = list[tuple[int, Sequence[Any]]]
"""Line numbers and the cells of each line."""

LabelReader = Callable[[str], int | float | None]
"""Function that returns the label for the text of a cell, or None if the text is not a label."""

_NO_LABEL = ("-1", "-1.0", "-", "")


class Table(NamedTuple):
    """Cells of a file; `header` is None if the file has none."""

    name: str
    header: list[str] | None
    rows: Lines


class _Gap(Exception):
    """Error for a row without a text, a column or an agreed label, which an incomplete dataset may have."""


# --- From a table to rows --------------------------------------------------------------------------------------------


def read_rows(task: Task, table: Table, split: Split) -> list[Row]:
    """Return the examples of a table.

    Raises:
        UserError: if a row has the wrong number of cells, no text or no known label.
    """
    if not table.rows:
        raise UserError(f"{table.name}: no examples found.")
    width = len(table.header or table.rows[0][1])
    columns = _find_columns(task, table, width, split)
    read_label = _label_reader(task)
    rows: list[Row] = []
    gaps: list[int] = []
    for line, cells in table.rows:
        where = f"{table.name}, line {line}"
        try:
            if len(cells) != width:
                raise _Gap(f"{len(cells)} columns found, {width} expected")
            rows.append(_make_row(task, cells, columns, read_label, split, where))
        except _Gap as gap:
            if not (task.files and task.files.incomplete):
                raise UserError(f"{where}: {gap}.") from gap
            gaps.append(line)
    rank_zero_info(f"{task.name} {split}: {len(rows)} examples of {table.name}{_describe_gaps(gaps)}")
    return rows


def _make_row(
    task: Task, cells: Sequence[Any], columns: Mapping[str, int], read_label: LabelReader, split: Split, where: str
) -> Row:
    row: Row = {field: str(cells[column]).strip() for field, column in columns.items()}
    given = row.get("label", "")
    label = read_label(given)
    if label is None and given not in _NO_LABEL:
        raise UserError(f"{where}: {given!r} is not a label of {task.name}; {_allowed_labels(task)}.")
    if label is None and split != "test":
        raise _Gap(f"the label {given!r} means unknown, only allowed in a test split; {_allowed_labels(task)}")
    if empty := [field for field in task.fields if not row[field]]:
        raise _Gap(f"the {empty[0]} is empty; a text was expected")
    row["label"] = label
    return row


def _describe_gaps(gaps: Sequence[int]) -> str:
    if not gaps:
        return ""
    lines = ", ".join(map(str, gaps[:5])) + ", …" * (len(gaps) > 5)
    return f"; {len(gaps)} skipped (missing text, column or agreed label; lines {lines})"


def _find_columns(task: Task, table: Table, width: int, split: Split) -> dict[str, int]:
    """Return the position of each field and of the label; the label may be missing in a test split."""
    columns: dict[str, int] = {}
    for field in (*task.fields, "label"):
        names = _column_names(task, field)
        if table.header is None:
            found = [name for name in names if isinstance(name, int) and name < width]
        else:
            found = [table.header.index(name) for name in names if isinstance(name, str) and name in table.header]
        if found:
            columns[field] = found[0]
        elif field != "label" or split != "test":
            raise UserError(_describe_missing_column(task, field, table, width))
    return columns


def _describe_missing_column(task: Task, field: str, table: Table, width: int) -> str:
    wanted = " or ".join(map(repr, _column_names(task, field)))
    given = f"{width} columns and no header" if table.header is None else f"the columns {', '.join(table.header)}"
    return (
        f"{table.name}, line 1: there are {given}, but the {field} of {task.name} was expected in column {wanted}."
        " A YAML task can name its `columns`."
    )


def _column_names(task: Task, field: str) -> list[str | int]:
    """Return the names that the column of a field may have: the official one, that on the hub, the field's own."""
    hub = task.files.hub_columns if task.files else {}
    return list(dict.fromkeys((task.columns.get(field, field), hub.get(field, field), field)))


def _label_reader(task: Task) -> LabelReader:
    """Return a function that reads a score, or a label by its name, its official spelling or its position."""
    if task.score_range is not None:
        low, high = task.score_range

        def read_score(given: str) -> float | None:
            try:
                return float(given) if low <= float(given) <= high else None
            except ValueError:
                return None

        return read_score
    known = {str(i): i for i in range(len(task.labels))}
    known |= {name: i for i, name in enumerate(task.files.spelling)} if task.files else {}
    known |= {name: i for i, name in enumerate(task.labels)}  # last, because a label's name may be a number
    return known.get


def _allowed_labels(task: Task) -> str:
    if task.score_range is not None:
        return "expected a number from {} to {}".format(*task.score_range)
    positions = map(str, range(len(task.labels)))
    return f"expected one of: {', '.join(dict.fromkeys((*task.labels, *positions)))}"


# --- From a file to a table ------------------------------------------------------------------------------------------


def read_table(task: Task, path: Path) -> Table:
    """Return the cells of a file. It may lack a header only if the task has column positions.

    Raises:
        UserError: if the file is empty or not in the format that its extension promises.
    """
    table = READERS[path.suffix](path)
    if table.header is not None:
        return table
    if not table.rows:
        raise UserError(f"{path}: the file is empty.")
    first = [cell.strip() for cell in table.rows[0][1]]
    has_header = all(any(name in first for name in _column_names(task, field)) for field in task.fields)
    if has_header or not any(isinstance(column, int) for column in task.columns.values()):
        return Table(table.name, first, table.rows[1:])
    return table


def read_tsv(path: Path) -> Table:
    """Read tab-separated values. Nothing is quoted: quotation marks, NA and null are plain text."""
    return Table(str(path), None, [(number, line.split("\t")) for number, line in _split_lines(_read_text(path))])


def read_csv(path: Path) -> Table:
    """Read comma-separated values, in which a quoted cell may contain line breaks."""
    reader = csv.reader(io.StringIO(_read_text(path), newline=""), strict=True)
    rows: Lines = []
    line = 1
    try:
        for cells in reader:
            if cells:
                rows.append((line, cells))
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}, line {line}: {error}; a row of comma-separated values was expected.") from error
    return Table(str(path), None, rows)


def read_jsonl(path: Path) -> Table:
    """Read one JSON object from each line; the keys of the first one are the header."""
    header: list[str] = []
    rows: Lines = []
    for number, line in _split_lines(_read_text(path)):
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: {error.msg}; a JSON object was expected.") from error
        if not isinstance(values, dict):
            raise UserError(f"{path}, line {number}: {line[:40]!r} found; a JSON object was expected.")
        header = header or list(values)
        if missing := [key for key in header if key not in values]:
            raise UserError(f"{path}, line {number}: no {missing[0]!r} found, but the first line has it.")
        rows.append((number, ["" if values[key] is None else values[key] for key in header]))
    return Table(str(path), header, rows)


def read_trec(path: Path) -> Table:
    """Read TREC's lines `COARSE:fine question`, which are distributed in Latin-1."""
    try:
        text = _read_text(path)
    except UserError:
        text = _read_text(path, "latin-1")
    rows: Lines = []
    for number, line in _split_lines(text):
        label, _, question = line.partition(" ")
        if ":" not in label:
            raise UserError(f"{path}, line {number}: {line[:40]!r} found; `COARSE:fine question` was expected.")
        rows.append((number, (label.partition(":")[0], question)))
    return Table(str(path), None, rows)


def read_parquet(path: Path) -> Table:
    """Read a parquet file, as the hub distributes them."""
    import datasets
    from pyarrow import ArrowException, parquet  # type: ignore[import-untyped]  # it ships no type information

    try:
        table = parquet.read_table(path)
    except (ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as parquet: {' '.join(str(error).split())}") from error
    return read_dataset(str(path), datasets.Dataset(table))


def read_dataset(name: str, dataset: datasets.Dataset) -> Table:
    """Read a dataset of the hub. Class numbers become names, because the hub orders TREC's classes differently."""
    columns = []
    for column, feature in dataset.features.items():
        names: Sequence[str] = getattr(feature, "names", ())
        values = dataset[column][:]
        columns.append([names[value] if 0 <= value < len(names) else value for value in values] if names else values)
    cells = (["" if value is None else value for value in row] for row in zip(*columns, strict=True))
    return Table(name, list(dataset.features), list(enumerate(cells, 1)))


READERS: Mapping[str, Callable[[Path], Table]] = {
    ".tsv": read_tsv,
    ".csv": read_csv,
    ".jsonl": read_jsonl,
    ".parquet": read_parquet,
    ".label": read_trec,
}
"""Reader of each file extension, the preferred extension first."""


def _read_text(path: Path, encoding: str = "utf-8-sig") -> str:
    """Return the text of a file without its byte order mark, which some official files have."""
    content = path.read_bytes()
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}, line {line}: the byte 0x{content[error.start]:02x} is not valid UTF-8: convert the file to UTF-8."
        ) from error


def _split_lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield the number and the text of each line that is not empty.

    Only a line feed ends a line: texts contain other characters that `str.splitlines` takes for line ends.
    """
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip("\r"):
            yield number, line.removesuffix("\r")
