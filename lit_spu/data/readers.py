"""Readers of rows: the table of a file becomes the examples of a task.

A row that cannot be used is an error that names the file and the line. Exception: if the official files of a task are
known to be incomplete, the incomplete rows are skipped, counted and logged.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_info

from lit_spu.data.tables import READERS, Cells, Table
from lit_spu.data.text import Row
from lit_spu.errors import UserError
from lit_spu.tasks import Split, Task, is_built_in

LabelReader = Callable[[str], int | float | None]
"""Function that returns the label for the text of a cell, or None if the text is not a label."""

_NO_LABEL = ("-1", "-1.0", "-", "")

_SURROGATE = re.compile("[\ud800-\udfff]")

_SHOWN = 12  # names of a list that an error shows


class _Gap(Exception):
    """Error for a row without a text, a column or an agreed label, which an incomplete dataset may have."""


# --- From a table to rows --------------------------------------------------------------------------------------------


def read_rows(task: Task, table: Table, split: Split) -> list[Row]:
    """Return the examples of a table. Their label is its text, until all of them are read.

    Raises:
        UserError: if a row has the wrong number of cells, no text or no known label.
    """
    if not table.rows:
        raise UserError(f"{table.name}: no examples found.")
    columns = _find_columns(task, table, split)
    readers = _label_readers(task)
    width = len(table.header or table.rows[0][1])
    rows: list[Row] = []
    lines: list[int] = []
    gaps: list[int] = []
    for line, cells in table.rows:
        where = f"{table.name}, line {line}"
        try:
            if not isinstance(cells, Mapping) and len(cells) != width:
                raise _Gap(f"{len(cells)} columns found, {width} expected")
            rows.append(_make_row(task, cells, columns, readers, split, where))
            lines.append(line)
        except _Gap as gap:
            if not (task.files and task.files.incomplete):
                raise UserError(f"{where}: {gap}.") from gap
            gaps.append(line)
    if not rows:
        raise UserError(f"{table.name}: no examples found{_describe_gaps(gaps)}.")
    _read_labels(task, rows, readers, [f"{table.name}, line {line}" for line in lines])
    rank_zero_info(f"{task.name} {split}: {len(rows)} examples of {table.name}{_describe_gaps(gaps)}")
    return rows


def _make_row(
    task: Task, cells: Cells, columns: Mapping[str, Any], readers: Sequence[LabelReader], split: Split, where: str
) -> Row:
    """Return the texts of the fields and of the label, which is None if it is unknown."""
    row: Row = {}
    for field, column in columns.items():
        try:
            cell: Any = cells[column]
        except KeyError:
            raise _Gap(f"no {column!r} found, which other lines have") from None
        if field == "label" and isinstance(cell, bool):
            cell = str(cell) if str(cell) in task.labels else str(cell).lower()
        row[field] = cell_text(cell, f"{where}: the {field}")
    label = row.setdefault("label", "")
    if label in _NO_LABEL and all(read(label) is None for read in readers):
        row["label"] = None
        if split != "test":
            allowed = _describe_labels(task)
            raise _Gap(f"the label {label!r} means unknown, only allowed in a test split; {allowed}")
    if empty := [field for field in task.fields if not row[field]]:
        raise _Gap(f"the {empty[0]} is empty; a text was expected")
    return row


def cell_text(cell: Any, where: str) -> str:
    """Return the text of a cell: of a text or a number; an absent value or NaN is an empty text.

    Raises:
        UserError: if the cell holds anything else, or text that is not Unicode. The message begins with `where`.
    """
    if cell is None or (isinstance(cell, float | Decimal) and math.isnan(cell)):
        return ""
    if isinstance(cell, bool) or not isinstance(cell, str | int | float | Decimal) or cell in (math.inf, -math.inf):
        raise UserError(f"{where} is {str(cell)[:40]!r} ({type(cell).__name__}); a text or a number was expected.")
    text = str(cell).strip()
    if half := _SURROGATE.search(text):
        raise UserError(f"{where} has {half[0]!r}, half of a character, which is not valid Unicode: {text[:40]!r}.")
    return text


def _describe_gaps(gaps: Sequence[int]) -> str:
    if not gaps:
        return ""
    lines = ", ".join(map(str, gaps[:5])) + ", …" * (len(gaps) > 5)
    return f"; {len(gaps)} skipped (missing text, column or agreed label; lines {lines})"


# --- Columns ---------------------------------------------------------------------------------------------------------


def _find_columns(task: Task, table: Table, split: Split) -> dict[str, str | int]:
    """Return the key of each field's and the label's cell in a row; the label may be missing in a test split."""
    columns: dict[str, str | int] = {}
    header, first = table.header, table.rows[0][1]
    keys: Sequence[str | int] = range(len(first)) if header is None else header
    for field in (*task.fields, "label"):
        key = next((name for name in _column_names(task, field) if name in keys), None)
        if key is not None and keys.count(key) > 1:
            raise UserError(f"{table.name}, line 1: {keys.count(key)} columns are called {key!r}; one was expected.")
        if key is not None:
            columns[field] = key if isinstance(first, Mapping) else keys.index(key)
        elif field != "label" or split != "test":
            raise UserError(_describe_missing_column(task, field, table, len(first)))
    return columns


def _describe_missing_column(task: Task, field: str, table: Table, width: int) -> str:
    wanted = " or ".join(map(repr, _column_names(task, field)))
    given = f"{width} columns and no header" if table.header is None else f"the columns {list_names(table.header)}"
    return (
        f"{table.name}, line 1: there are {given}, but the {field} of {task.name} was expected in column {wanted}."
        " A YAML task can name its `columns`."
    )


def _column_names(task: Task, field: str) -> list[str | int]:
    """Return the names that the column of a field may have: those of the task, or else the field's own.

    The files of a built-in task have the official names, those on the hub, or the fields' own.
    """
    given = (task.columns, task.files.hub_columns if task.files else {})
    named = [columns[field] for columns in given if field in columns]
    return list(dict.fromkeys([*named, field] if is_built_in(task) else named or [field]))


def list_names(names: Iterable[str]) -> str:
    """Return the first names, separated by commas, in a form that fits into an error message."""
    names = list(names)
    shown = [name if name.isprintable() and len(name) <= 40 else f"{name[:40]!r}…" for name in names[:_SHOWN]]
    return ", ".join(shown) + f", … ({len(names)} in all)" * (len(names) > _SHOWN)


# --- Labels ----------------------------------------------------------------------------------------------------------


def _read_labels(task: Task, rows: Sequence[Row], readers: Sequence[LabelReader], places: Sequence[str]) -> None:
    """Replace the labels' texts by scores or positions. One reader reads the whole file, never two by turns."""
    texts = [row["label"] for row in rows if row["label"] is not None]
    read = max(readers, key=lambda reader: next((i for i, text in enumerate(texts) if reader(text) is None), math.inf))
    for row, place in zip(rows, places, strict=True):
        text = row["label"]
        row["label"] = None if text is None else read(text)
        if text is not None and row["label"] is None:
            raise UserError(f"{place}: {text[:40]!r} is not a label of {task.name}; {_describe_labels(task)}.")


def _label_readers(task: Task) -> list[LabelReader]:
    """Return a function that reads a score, or one for each way of writing the labels."""
    if task.score_range is None:
        return [reading.get for reading in _label_readings(task)]
    low, high = task.score_range

    def read_score(text: str) -> float | None:
        try:
            return float(text) if low <= float(text) <= high and "_" not in text else None
        except ValueError:
            return None

    return [read_score]


def _label_readings(task: Task) -> list[Mapping[str, int]]:
    """Return the labels by their names, by their official spelling and by their positions.

    If a label's name is the position of another label, files have the names.
    """
    readings: list[Mapping[str, int]] = []
    spelling = task.files.spelling if task.files else ()
    for names in (task.labels, spelling, tuple(map(str, range(len(task.labels))))):
        reading = {name: i for i, name in enumerate(names)}
        if all(earlier.get(name, i) == i for earlier in readings for name, i in reading.items()):
            readings.append(reading)
    return [reading for reading in readings if reading]


def _describe_labels(task: Task) -> str:
    if task.score_range is not None:
        return "expected a number from {} to {}".format(*task.score_range)
    readings = dict.fromkeys(list_names(reading) for reading in _label_readings(task))
    return f"expected one of: {'; or in the whole file one of: '.join(readings)}"


# --- From a file to a table ------------------------------------------------------------------------------------------


def read_table(task: Task, path: Path) -> Table:
    """Return the cells of a file. It may lack a header only if the task has column positions.

    Raises:
        UserError: if the file is empty or not in the format that its extension promises.
    """
    table = READERS[path.suffix](path, wanted_columns(task))
    if table.header is not None:
        return table
    if not table.rows:
        raise UserError(f"{path}: the file is empty.")
    first = [str(cell).strip() for cell in table.rows[0][1]]
    has_header = all(any(name in first for name in _column_names(task, field)) for field in task.fields)
    if has_header or not any(isinstance(column, int) for column in task.columns.values()):
        return Table(table.name, first, table.rows[1:])
    return table


def wanted_columns(task: Task) -> set[str]:
    """Return the names of the columns that may hold the fields or the label."""
    return {str(name) for field in (*task.fields, "label") for name in _column_names(task, field)}
