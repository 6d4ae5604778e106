"""Where the examples come from: generated samples, the hub, or a folder of files.

A folder holds the official files as they are distributed (`<source>/SST-2/train.tsv`), a part of them
(`train_subset.tsv`), the hub's parquet files, or a user's own (`<source>/train.csv`). Nothing is dropped without a
word: a row that cannot be used is an error that names its file and line, but for the gaps that an official data set is
known to have, which are counted and logged.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple

from lightning.pytorch.utilities import rank_zero_info

from lit_spu.data.synthetic import generate
from lit_spu.errors import UserError
from lit_spu.tasks import Files, Split, Task

if TYPE_CHECKING:
    import datasets

Row = dict[str, Any]
"""An example: the text of each field, and `label`: a label's number or a score, -1 where unknown."""

Parts = dict[str, list[Row]]
"""The examples of a split; MNLI's validation and test sets have a second part, named, behind the first, unnamed."""

_UNKNOWN = ("-1", "-", "")


def load(task: Task, source: str, split: Split, shots: int | None = None, split_seed: int = 42) -> Parts:
    """The examples of one split.

    With `shots` = k this is MeZO's few-shot protocol (https://arxiv.org/abs/2305.17333, appendix E): the train split is
    shuffled, the first k examples of each label train, the next k are the validation set, and what is the validation
    split otherwise is the test set. A regression counts as one label. Where `source` holds such splits ready-made, in a
    folder `<shots>-<split_seed>`, these are read instead.

    Raises:
        UserError: if the source cannot be reached or holds what the task cannot use.
    """
    if shots is None:
        return _read(task, source, split, split_seed)
    if source not in ("sample", "hub") and (ready := _folder(task, source) / f"{shots}-{split_seed}").is_dir():
        folders = (ready, ready.parent) if split == "test" else (ready,)
        return _read_folder(task, split, folders)
    if split == "test":
        return _read(task, source, "validation", split_seed)
    return {"": few_shot(task, _read(task, source, "train", split_seed)[""], shots, split_seed)[split]}


def few_shot(task: Task, rows: Sequence[Row], shots: int, seed: int) -> dict[str, list[Row]]:
    """`shots` examples of each label to train on, and as many others to validate on, in the order of `rows`.

    Raises:
        UserError: if a label has too few examples.
    """
    by_label: dict[int, list[int]] = {}
    for i in Random(seed).sample(range(len(rows)), len(rows)):
        by_label.setdefault(0 if task.regression else rows[i]["label"], []).append(i)
    for label in range(task.num_logits):
        if (found := len(by_label.get(label, ()))) < 2 * shots:
            name = "" if task.regression else f" labelled {task.labels[label]!r}"
            raise UserError(
                f"data.shots={shots} takes {2 * shots} examples of each label, half to train and half to validate, but"
                f" the train split of {task.name} has {found}{name}. At most {found // 2} shots are possible."
            )
    cuts = {"train": slice(0, shots), "validation": slice(shots, 2 * shots)}
    return {
        split: [rows[i] for i in sorted(i for group in by_label.values() for i in group[cut])]
        for split, cut in cuts.items()
    }


def parse(task: Task, lines: Iterable[str], where: str) -> list[Row]:
    """Examples without labels, one a line, the fields of each separated by tabs.

    Raises:
        UserError: if a line has not one text for each field.
    """
    rows = []
    for number, line in enumerate(lines, 1):
        texts = [text.strip() for text in line.split("\t")]
        if len(texts) != len(task.fields) or not all(texts):
            raise UserError(
                f"{where}, line {number}: {line.rstrip()!r} has {sum(map(bool, texts))} text(s), but {task.name} takes"
                f" {len(task.fields)}: {' <tab> '.join(task.fields)}."
            )
        rows.append({**dict(zip(task.fields, texts, strict=True)), "label": unknown(task)})
    if not rows:
        raise UserError(f"{where}: nothing was given to predict.")
    return rows


def _read(task: Task, source: str, split: Split, seed: int) -> Parts:
    if source == "sample":
        return {"": generate(task, split, seed)}
    if source == "hub":
        return _read_hub(task, split)
    return _read_folder(task, split, (_folder(task, source),))


# --- What every source has in common: tables of cells, turned into examples -------------------------------------------


class _Table(NamedTuple):
    """The cells of a file: `rows` are pairs of a line's number and its cells."""

    name: str
    header: list[str] | None
    rows: list[tuple[int, Sequence[Any]]]


def _rows(task: Task, table: _Table, split: Split) -> list[Row]:
    """The examples of a table.

    Raises:
        UserError: if a row has the wrong number of cells, no text or no known label.
    """
    if not table.rows:
        raise UserError(f"{table.name}: no examples found.")
    width = len(table.header or table.rows[0][1])
    columns = _columns(task, table, width, split)
    read_label = _label_reader(task)
    rows: list[Row] = []
    gaps: list[int] = []
    for line, cells in table.rows:
        problem = ""
        row: Row = {}
        if len(cells) != width:
            problem = f"{len(cells)} columns found, {width} expected"
        else:
            row = {field: str(cells[column]).strip() for field, column in columns.items()}
            if empty := [field for field in task.fields if not row[field]]:
                problem = f"the {empty[0]} is empty; a text was expected"
            given = row.get("label", "")
            row["label"] = read_label(given)
            if row["label"] is None and given not in _UNKNOWN:
                raise UserError(f"{table.name}, line {line}: {given!r} is no label of {task.name}; {_allowed(task)}.")
            if row["label"] is None and split != "test":
                problem = f"the label {given!r} says nothing; only a test split may go without. {_allowed(task)}"
        if not problem:
            if row["label"] is None:
                row["label"] = unknown(task)
            rows.append(row)
        elif task.files and task.files.incomplete:
            gaps.append(line)
        else:
            raise UserError(f"{table.name}, line {line}: {problem}.")
    left_out = ""
    if gaps:
        lines = ", ".join(map(str, gaps[:5])) + ", …" * (len(gaps) > 5)
        left_out = f"; {len(gaps)} left out for want of a text, a column or an agreed label (lines {lines})"
    rank_zero_info(f"{task.name} {split}: {len(rows)} examples of {table.name}{left_out}")
    return rows


def _columns(task: Task, table: _Table, width: int, split: Split) -> dict[str, int]:
    """The position of each field and of the label, which a test split may lack."""
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
            there = (
                f"{width} columns and no header" if table.header is None else f"the columns {', '.join(table.header)}"
            )
            raise UserError(
                f"{table.name}, line 1: there are {there}; the {field} of {task.name} was expected as"
                f" {' or '.join(map(repr, names))}. A YAML task can name its `columns`."
            )
    return columns


def _column_names(task: Task, field: str) -> list[str | int]:
    """What the column of a field goes by: officially, on the hub, or by the field's own name."""
    hub = task.files.hub_columns if task.files else {}
    return list(dict.fromkeys((task.columns.get(field, field), hub.get(field, field), field)))


def _label_reader(task: Task) -> Callable[[str], int | float | None]:
    """Reads a label's name, its official spelling or its number, or a score; None if it is none of these."""
    if task.score_range is not None:
        low, high = task.score_range

        def score(given: str) -> float | None:
            try:
                return float(given) if low <= float(given) <= high else None
            except ValueError:
                return None

        return score
    known = {str(i): i for i in range(len(task.labels))}
    known |= {name: i for i, name in enumerate(task.files.spelling)} if task.files else {}
    known |= {name: i for i, name in enumerate(task.labels)}  # last: a label may be called by another's number
    return known.get


def _allowed(task: Task) -> str:
    if task.score_range is not None:
        return "expected a number from {} to {}".format(*task.score_range)
    return f"expected {', '.join(task.labels)}, or 0 to {len(task.labels) - 1}"


def unknown(task: Task) -> int | float:
    """The label of an example without one."""
    return -1.0 if task.regression else -1


# --- A folder --------------------------------------------------------------------------------------------------------


def _folder(task: Task, source: str) -> Path:
    """The folder of the task's files: the source itself for a task of the user's own."""
    root = Path(source)
    names = (task.files.folder, task.files.folder.lower(), task.name) if task.files else ("",)
    for name in names:
        if (root / name).is_dir():
            return root / name
    raise UserError(
        f"data.source={source}: {_missing(root, names)}"
        " Give a folder that holds the task's files, or `sample`, or `hub`."
    )


def _missing(folder: Path, looked_for: Sequence[str]) -> str:
    wanted = " or ".join(dict.fromkeys(name or "." for name in looked_for))
    if not folder.is_dir():
        return f"there is no folder {folder}."
    there = ", ".join(sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())) or "nothing"
    return f"looked in {folder} for {wanted}; there is {there}."


def _read_folder(task: Task, split: Split, folders: Sequence[Path]) -> Parts:
    """Read `split` from the first of `folders` that has it."""
    layout = task.files or Files("", ("", None))
    stems = getattr(layout, split)
    parts = ("",) if split == "train" else layout.parts
    found: dict[str, list[Path]] = {}
    for folder in folders:
        for part in parts:
            for stem in stems:
                if part not in found and (paths := _files(folder, f"{stem}_{part}" if part else stem)):
                    found[part] = paths
    if parts[0] not in found:
        kinds = ",".join(kind[1:] for kind in _READERS)
        wanted = [f"{stem}_{part}" if part else stem for stem in stems for part in parts]
        looked_for = [f"{name}.{{{kinds}}}" for name in wanted]
        hint = ""
        if any(path.is_dir() for path in folders[0].iterdir()):
            hint = " Ready-made few-shot splits are chosen by --data.shots and --data.split_seed."
        raise UserError(f"The {split} split of {task.name}: {_missing(folders[0], looked_for)}{hint}")
    rows = {
        part: [row for path in paths for row in _rows(task, _table(task, path), split)] for part, paths in found.items()
    }
    return {"" if part == parts[0] else part: rows[part] for part in found}


def _files(folder: Path, name: str) -> list[Path]:
    """The file of that name, a part of it, or its shards as the hub names them."""
    for kind in _READERS:
        for stem in (name, f"{name}_subset"):
            if (folder / f"{stem}{kind}").is_file():
                return [folder / f"{stem}{kind}"]
    return sorted(folder.glob(f"{name}-*-of-*.parquet"))


def _table(task: Task, path: Path) -> _Table:
    """The cells of a file, which may lack a header only where the task knows its columns by position."""
    table = _READERS[path.suffix](path)
    if table.header is not None:
        return table
    if not table.rows:
        raise UserError(f"{path}: the file is empty.")
    first = [cell.strip() for cell in table.rows[0][1]]
    named = all(any(name in first for name in _column_names(task, field)) for field in task.fields)
    if named or not any(isinstance(column, int) for column in task.columns.values()):
        return _Table(table.name, first, table.rows[1:])
    return table


def _text(path: Path, encoding: str = "utf-8-sig") -> str:
    """The text of a file, without the byte order mark that some official files start with."""
    content = path.read_bytes()
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UserError(
            f"{path}, line {line}: the byte 0x{content[error.start]:02x} found is no UTF-8, which was expected; convert"
            " the file."
        ) from error


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Numbered lines; only line feeds end one, for texts hold other characters that Python takes for line ends."""
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip("\r"):
            yield number, line.removesuffix("\r")


def _read_tsv(path: Path) -> _Table:
    """Tabs separate, and nothing is quoted: quotation marks are text, and so are NA, null and the like."""
    return _Table(str(path), None, [(number, line.split("\t")) for number, line in _lines(_text(path))])


def _read_csv(path: Path) -> _Table:
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    rows: list[tuple[int, Sequence[Any]]] = []
    line = 1
    try:
        for cells in reader:
            if cells:
                rows.append((line, cells))
            line = reader.line_num + 1
    except csv.Error as error:
        raise UserError(f"{path}, line {line}: {error}; a row of comma-separated values was expected.") from error
    return _Table(str(path), None, rows)


def _read_jsonl(path: Path) -> _Table:
    header: list[str] = []
    rows: list[tuple[int, Sequence[Any]]] = []
    for number, line in _lines(_text(path)):
        try:
            values = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}: {error.msg}; a JSON object was expected.") from error
        if not isinstance(values, dict):
            raise UserError(f"{path}, line {number}: {line[:40]!r} found; a JSON object was expected.")
        header = header or list(values)
        if missing := [key for key in header if key not in values]:
            raise UserError(f"{path}, line {number}: no {missing[0]!r} found; it was expected, as in the first line.")
        rows.append((number, ["" if values[key] is None else values[key] for key in header]))
    return _Table(str(path), header, rows)


def _read_trec(path: Path) -> _Table:
    """Lines of `COARSE:fine question`, in Latin-1 as distributed."""
    try:
        text = _text(path)
    except UserError:
        text = _text(path, "latin-1")
    rows: list[tuple[int, Sequence[Any]]] = []
    for number, line in _lines(text):
        label, _, question = line.partition(" ")
        if ":" not in label:
            raise UserError(f"{path}, line {number}: {line[:40]!r} found; `COARSE:fine question` was expected.")
        rows.append((number, (label.partition(":")[0], question)))
    return _Table(str(path), None, rows)


def _read_parquet(path: Path) -> _Table:
    import datasets
    from pyarrow import ArrowException, parquet  # type: ignore[import-untyped]  # it ships no type information

    try:
        table = parquet.read_table(path)
    except (ArrowException, OSError) as error:
        raise UserError(f"{path} cannot be read as parquet: {' '.join(str(error).split())}") from error
    return _records(str(path), datasets.Dataset(table))


def _records(name: str, dataset: datasets.Dataset) -> _Table:
    """A data set's cells, its class numbers turned into names: the hub orders TREC's classes in a way of its own."""
    columns = []
    for column, feature in dataset.features.items():
        names: Sequence[str] = getattr(feature, "names", ())
        values = dataset[column][:]
        columns.append([names[value] if 0 <= value < len(names) else value for value in values] if names else values)
    cells = (["" if value is None else value for value in row] for row in zip(*columns, strict=True))
    return _Table(name, list(dataset.features), list(enumerate(cells, 1)))


_READERS: Mapping[str, Callable[[Path], _Table]] = {
    ".tsv": _read_tsv,
    ".csv": _read_csv,
    ".jsonl": _read_jsonl,
    ".parquet": _read_parquet,
    ".label": _read_trec,
}


# --- The hub ---------------------------------------------------------------------------------------------------------


def _read_hub(task: Task, split: Split) -> Parts:
    """The split as the hub has it; where it has no validation split its test split stands in, as TREC's does."""
    if task.files is None:
        raise UserError(f"data.source=hub: {task.name} is a task of your own. Give the folder of its files.")
    hub = _download(*task.files.hub)
    parts = ("",) if split == "train" else task.files.parts
    names = {part: f"{split}_{part}" if part else split for part in parts}
    if split == "validation" and not set(names.values()) & set(hub):
        names = {parts[0]: "test"}
    where = " ".join(filter(None, task.files.hub))
    if missing := [name for name in names.values() if name not in hub]:
        raise UserError(f"data.source=hub: {where} has no split {missing[0]!r}, only {', '.join(hub)}.")
    return {
        "" if part == parts[0] else part: _rows(task, _records(f"{where} {name}", hub[name]), split)
        for part, name in names.items()
    }


def _download(path: str, config: str | None) -> Mapping[str, datasets.Dataset]:
    """All splits of a data set, from the cache of an earlier download where the hub cannot be reached.

    Raises:
        UserError: if neither has it.
    """
    import datasets
    from huggingface_hub import HfApi

    offline, reason = datasets.config.HF_HUB_OFFLINE, ""
    try:
        # `datasets` asks an unreachable hub again and again for 23 seconds, whatever its settings: ask once, and if
        # there is no answer, let it look into its cache only
        HfApi().dataset_info(path, timeout=5)
    except Exception as error:  # the client of the hub raises those of its transport
        reason = str(error)
        datasets.config.HF_HUB_OFFLINE = True
    try:
        hub: Mapping[str, datasets.Dataset] = datasets.load_dataset(path, config)
    except Exception as error:
        raise UserError(
            f"data.source=hub: {path} cannot be had from the hub ({' '.join((reason or str(error)).split())[:200]})."
            " Use --data.source=<folder of the official files>, or --data.source=sample for synthetic data."
        ) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = offline
    return hub
