"""Tables of cells, read from files of every format.

A table is read as it is written: what is not text or a number is left for the reader of the rows to refuse. Of parquet
files, JSON lines and datasets of the hub, only the wanted columns are read.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lit_spu.errors import UserError

if TYPE_CHECKING:
    import datasets

Cells = Sequence[Any] | Mapping[str, Any]
"""Cells of a row by position, or the wanted ones by the name of their column."""

Lines = list[tuple[int, Cells]]
"""Line numbers and the cells of each line."""


class Table(NamedTuple):
    """Cells of a file; `header` has the names of all columns, None if the file has none."""

    name: str
    header: list[str] | None
    rows: Lines


# --- Delimited text --------------------------------------------------------------------------------------------------

csv.field_size_limit(2**31 - 1)  # a text may be longer than the 131,072 characters of the default

_QUOTED_ROWS = re.compile(r'(?:(?:"[^"]*(?:""[^"]*)*"|[^"\t\r\n]*)(?:\t|\r?\n|\Z))*+')


def read_tsv(path: Path, wanted: Collection[str]) -> Table:
    """Read tab-separated values. Quotation marks are plain text, unless the file was written with quoted cells."""
    text = read_text(path)
    if '"' in text and _has_quoted_cells(text):
        return _read_delimited(path, text, "\t")
    return Table(str(path), None, [(number, line.split("\t")) for number, line in split_lines(text)])


def read_csv(path: Path, wanted: Collection[str]) -> Table:
    """Read comma-separated values, in which a quoted cell may contain line breaks."""
    return _read_delimited(path, read_text(path), ",")


def _read_delimited(path: Path, text: str, delimiter: str) -> Table:
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    rows: Lines = []
    line = 1
    try:
        for cells in reader:
            if cells:
                rows.append((line, cells))
            line = reader.line_num + 1
    except csv.Error as error:
        name = {",": "comma", "\t": "tab"}[delimiter]
        raise UserError(f"{path}, line {line}: {error}; a row of {name}-separated values was expected.") from error
    return Table(str(path), None, rows)


def _has_quoted_cells(text: str) -> bool:
    """Return whether a writer has quoted cells, as pandas does, or the quotation marks belong to the texts.

    Every cell with a mark is then quoted, with the marks in it doubled, and the rows have the same number of cells.
    Texts with marks may meet this by chance, so one more sign is needed: lines with different numbers of tabs, a
    doubled mark in a cell of one line, or a first row that is quoted as a whole.
    """
    if not _QUOTED_ROWS.fullmatch(text):
        return False
    rows = [cells for cells in csv.reader(io.StringIO(text, newline=""), delimiter="\t") if cells]
    lines = [line for _, line in split_lines(text)]
    signs = (
        len({line.count("\t") for line in lines}) > 1,
        any('"' in cell and not re.search(r"[\t\r\n]", cell) for cells in rows for cell in cells),
        all(cell[:1] == '"' for cell in lines[0].split("\t")),
    )
    return len(set(map(len, rows))) == 1 and any(signs)


def read_trec(path: Path, wanted: Collection[str]) -> Table:
    """Read TREC's lines `COARSE:fine question`, which are distributed in Latin-1."""
    try:
        text = read_text(path)
    except UserError:
        text = read_text(path, "latin-1")
    rows: Lines = []
    for number, line in split_lines(text):
        label, _, question = line.partition(" ")
        if ":" not in label:
            raise UserError(f"{path}, line {number}: {line[:40]!r} found; `COARSE:fine question` was expected.")
        rows.append((number, (label.partition(":")[0], question)))
    return Table(str(path), None, rows)


# --- Typed cells -----------------------------------------------------------------------------------------------------


def read_jsonl(path: Path, wanted: Collection[str]) -> Table:
    """Read one JSON object from each line; the header is all of their keys."""
    header: dict[str, None] = {}
    rows: Lines = []
    for number, line in split_lines(read_text(path)):
        try:
            values = json.loads(line, object_pairs_hook=_unique_keys)
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", str(error))
            raise UserError(f"{path}, line {number}: {reason}; a JSON object was expected.") from error
        if not isinstance(values, dict):
            raise UserError(f"{path}, line {number}: {line[:40]!r} found; a JSON object was expected.")
        header |= dict.fromkeys(values)
        rows.append((number, {key: value for key, value in values.items() if key in wanted}))
    return Table(str(path), list(header), rows)


def _unique_keys(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        raise ValueError("a key is given twice")
    return values


def read_parquet(path: Path, wanted: Collection[str]) -> Table:
    """Read a parquet file, as the hub distributes them."""
    from pyarrow import parquet  # type: ignore[import-untyped]  # it ships no type information

    try:
        file = parquet.ParquetFile(path, page_checksum_verification=True)
        header = file.schema_arrow.names
        read = file.read(columns=[name for name in header if name in wanted])
        features = json.loads((file.schema_arrow.metadata or {}).get(b"huggingface", "{}")).get("info", {})
        names = {name: features.get("features", {}).get(name, {}).get("names") for name in read.column_names}
    except Exception as error:  # pyarrow's errors are of many kinds
        raise UserError(f"{path} cannot be read as parquet: {' '.join(str(error).split())[:200]}") from error
    columns = {
        name: [_read_cell(cell, f"{path}, line {line}: the {name}") for line, cell in enumerate(column, 1)]
        for name, column in zip(read.column_names, read.columns, strict=True)
    }
    return _typed_table(str(path), header, read.num_rows, columns, names)


def _read_cell(cell: Any, where: str) -> Any:
    try:
        return cell.as_py()
    except ValueError as error:  # bytes that are not UTF-8, a time beyond all calendars
        raise UserError(f"{where} cannot be read: {error}.") from error


def read_dataset(name: str, dataset: datasets.Dataset, wanted: Collection[str]) -> Table:
    """Read a dataset of the hub."""
    columns = {column: dataset[column][:] for column in dataset.features if column in wanted}
    names = {column: getattr(dataset.features[column], "names", None) for column in columns}
    return _typed_table(name, list(dataset.features), len(dataset), columns, names)


def _typed_table(
    name: str,
    header: list[str],
    num_rows: int,
    columns: Mapping[str, list[Any]],
    names: Mapping[str, Sequence[str] | None],
) -> Table:
    """Return a table with class numbers as names, because the hub orders TREC's classes differently."""
    named = [_name_classes(values, names[column] or ()) for column, values in columns.items()]
    rows = zip(*named, strict=True) if named else [()] * min(num_rows, 1)  # without columns, one row for the error
    return Table(name, header, [(line, dict(zip(columns, cells, strict=True))) for line, cells in enumerate(rows, 1)])


def _name_classes(values: list[Any], names: Sequence[str]) -> list[Any]:
    if not names:
        return values
    return [names[value] if isinstance(value, int) and 0 <= value < len(names) else value for value in values]


# --- Text ------------------------------------------------------------------------------------------------------------

READERS: Mapping[str, Callable[[Path, Collection[str]], Table]] = {
    ".tsv": read_tsv,
    ".csv": read_csv,
    ".jsonl": read_jsonl,
    ".parquet": read_parquet,
    ".label": read_trec,
}
"""Reader of each file extension, the preferred extension first."""


def read_text(path: Path, encoding: str = "utf-8-sig") -> str:
    """Return the text of a file without its byte order mark, which some official files have.

    Raises:
        UserError: if the file cannot be read, or if it is not in this encoding.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    return decode(content, str(path), encoding)


def decode(content: bytes, name: str, encoding: str = "utf-8-sig") -> str:
    """Return `content` as text.

    Raises:
        UserError: if it is not in this encoding. The message names `name` and the line.
    """
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{name}, line {line}: the byte 0x{content[error.start]:02x} is not valid UTF-8: convert it to UTF-8."
        ) from error


def split_lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield the number and the text of each line that is not empty.

    Only a line feed ends a line, or a carriage return if there is no line feed: texts contain other characters that
    `str.splitlines` takes for line ends.
    """
    for number, line in enumerate(text.split("\n" if "\n" in text else "\r"), 1):
        if line.strip("\r"):
            yield number, line.removesuffix("\r")
