"""Sources of examples: synthetic sample data, the Hugging Face hub, or a folder of files.

A folder holds the official files as distributed (`<source>/SST-2/train.tsv`), a part of them (`train_subset.tsv`), the
hub's parquet files, or the files of a custom task (`<source>/train.csv`).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from lightning.pytorch.utilities import rank_zero_warn

from lit_spu.data.readers import cell_text, list_names, read_rows, read_table, wanted_columns
from lit_spu.data.synthetic import generate
from lit_spu.data.tables import READERS, read_dataset
from lit_spu.data.text import Row
from lit_spu.errors import UserError, did_you_mean
from lit_spu.tasks import Files, Split, Task, is_built_in

if TYPE_CHECKING:
    import datasets

Parts = dict[str, list[Row]]
"""Examples of a split by the name of its part. The first part's name is empty; MNLI has a second, `mismatched`."""


def load_split(
    task: Task,
    source: str,
    split: Split,
    shots: int | None = None,
    split_seed: int = 42,
    held_out: float = 0.0,
    limit_train: int | None = None,
) -> Parts:
    """Return the examples of one split.

    With `shots` or `held_out`, the train and validation splits are both drawn from the train split, and the original
    validation split becomes the test split.

    Args:
        task: The task.
        source: `sample`, `hub` or a folder.
        split: The split.
        shots: Number k of examples of each label, for MeZO's few-shot protocol (https://arxiv.org/abs/2305.17333,
            appendix E). The train split is shuffled. The first k examples of each label are the new train split, the
            next k the validation split. A regression counts as one label. If `source` has a folder
            `<shots>-<split_seed>` with such splits, they are read from it.
        split_seed: Random seed of what is drawn and of the sample data.
        held_out: Share of the train split that becomes the validation split.
        limit_train: Number of examples of the train split to draw before `held_out` divides them.

    Raises:
        UserError: if the source is not available, or if it has data that the task cannot use.
    """
    try:
        return _load_split(task, source, split, shots, split_seed, held_out, limit_train)
    except OSError as error:  # a name that is too long, or a folder that may not be read
        raise UserError(f"data.source={source[:200]} cannot be read: {error.strerror}.") from error


def _load_split(
    task: Task, source: str, split: Split, shots: int | None, split_seed: int, held_out: float, limit_train: int | None
) -> Parts:
    if not (shots or held_out):
        return _load_full_split(task, source, split, split_seed)
    ready = _find_folder(task, source) / f"{shots}-{split_seed}" if source not in ("sample", "hub") else None
    if shots and ready and ready.is_dir():
        folders = (ready, ready.parent) if split == "test" else (ready,)
        return _load_from_folders(task, split, folders)
    if split == "test":
        return _load_full_split(task, source, "validation", split_seed)
    train = _load_full_split(task, source, "train", split_seed)[""]
    if shots:
        return {"": draw_few_shot_splits(task, train, shots, split_seed)[split]}
    return {"": hold_out(task, draw_rows(train, limit_train, split_seed), held_out, split_seed)[split]}


def draw_few_shot_splits(task: Task, rows: Sequence[Row], shots: int, seed: int) -> dict[str, list[Row]]:
    """Draw `shots` training and `shots` validation examples of each label, in the order of `rows`.

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
                f"data.shots={shots} needs {2 * shots} examples of each label, half for training and half for"
                f" validation, but the train split of {task.name} has {found}{name}. At most {found // 2} shots are"
                " possible."
            )
    cuts = {"train": slice(0, shots), "validation": slice(shots, 2 * shots)}
    return {
        split: [rows[i] for i in sorted(i for group in by_label.values() for i in group[cut])]
        for split, cut in cuts.items()
    }


def hold_out(task: Task, rows: Sequence[Row], share: float, seed: int) -> dict[str, list[Row]]:
    """Divide rows at random into a train and a validation split, both in the order of `rows`.

    Raises:
        UserError: if one of them would be empty.
    """
    count = round(share * len(rows))
    if not 0 < count < len(rows):
        purpose, change = ("train", "smaller") if count else ("validate", "larger")
        raise UserError(
            f"data.held_out={share:g} of {len(rows)} training examples of {task.name} leaves none to {purpose} on:"
            f" give a {change} share, or use more examples."
        )
    drawn = set(Random(seed).sample(range(len(rows)), count))
    return {
        "train": [row for i, row in enumerate(rows) if i not in drawn],
        "validation": [row for i, row in enumerate(rows) if i in drawn],
    }


def draw_rows(rows: list[Row], limit: int | None, seed: int) -> list[Row]:
    """Draw `limit` rows, in their original order. The rows of a smaller limit are among those of a larger one."""
    if limit is None or limit >= len(rows):
        return rows
    return [rows[i] for i in sorted(Random(seed).sample(range(len(rows)), len(rows))[:limit])]


def parse_lines(task: Task, lines: Iterable[str], where: str) -> list[Row]:
    """Return examples without labels, one for each line; tabs separate the fields.

    Raises:
        UserError: if a line does not have one text for each field. The message names `where` and the line.
    """
    rows = []
    for number, line in enumerate(lines, 1):
        texts = [cell_text(text, f"{where}, line {number}") for text in line.split("\t")]
        if len(texts) != len(task.fields) or not all(texts):
            raise UserError(
                f"{where}, line {number}: {line.rstrip()[:60]!r} has {sum(map(bool, texts))} text(s), but {task.name}"
                f" needs {len(task.fields)}: {' <tab> '.join(task.fields)}."
            )
        rows.append({**dict(zip(task.fields, texts, strict=True)), "label": None})
    if not rows:
        raise UserError(f"{where}: no text was given; at least one line of {' <tab> '.join(task.fields)} is needed.")
    return rows


def select_labelled(task: Task, parts: Parts) -> Parts:
    """Return the test examples that can be scored, and warn of the number of the others.

    Raises:
        UserError: if a test set has none.
    """
    for part, rows in parts.items():
        name = f"the {part} test split" if part else "the test split"
        unknown = sum(row["label"] is None for row in rows)
        if unknown == len(rows):
            raise UserError(f"None of the {unknown} examples of {name} of {task.name} has a label: use predict.")
        if unknown:
            rank_zero_warn(f"{unknown} of {len(rows)} examples of {name} of {task.name} have no label: not scored.")
    return {part: [row for row in rows if row["label"] is not None] for part, rows in parts.items()}


def _load_full_split(task: Task, source: str, split: Split, seed: int) -> Parts:
    if source == "sample":
        return {"": generate(task, split, seed)}
    if source == "hub":
        return _load_from_hub(task, split)
    return _load_from_folders(task, split, (_find_folder(task, source),))


# --- A folder --------------------------------------------------------------------------------------------------------


def _find_folder(task: Task, source: str) -> Path:
    """Return the folder of the task's files; for a custom task, this is the source itself."""
    root = Path(source)
    official = task.files.folder if task.files else ""
    names = (official, official.lower(), task.name) if is_built_in(task) else (official,)
    for name in names:
        if (root / name).is_dir():
            return root / name
    allowed = did_you_mean(source, ("sample", "hub", "a folder with the task's files"))
    raise UserError(f"data.source={source}: {_describe_missing(root, names)} {allowed}")


def _describe_missing(folder: Path, names: Sequence[str]) -> str:
    if not folder.is_dir():
        return f"there is no folder {folder}."
    wanted = " or ".join(dict.fromkeys(names))
    found = list_names(sorted(path.name + "/" * path.is_dir() for path in folder.iterdir())) or "nothing"
    return f"no {wanted} in {folder}, which contains {found}."


def _load_from_folders(task: Task, split: Split, folders: Sequence[Path]) -> Parts:
    """Read each part of `split` from the first of `folders` that has it."""
    layout = task.files or Files()
    stems = getattr(layout, split)
    parts = ("",) if split == "train" else layout.parts
    found: dict[str, list[Path]] = {}
    for folder, part in product(folders, parts):
        candidates = [files for stem in stems for files in _find_files(folder, f"{stem}_{part}" if part else stem)]
        if candidates and part not in found:
            found[part] = candidates[0]
            if others := list_names(files[0].name for files in candidates[1:]):
                name = candidates[0][0].name
                rank_zero_warn(f"The {split} split of {task.name} is read from {name}, not {others}, in {folder}.")
    if parts[0] not in found:
        names = [f"{stem}_{part}" if part else stem for stem in stems for part in parts]
        raise UserError(f"The {split} split of {task.name}: {_describe_missing_split(folders[0], names)}")
    rows = {
        part: [row for path in paths for row in read_rows(task, read_table(task, path), split)]
        for part, paths in found.items()
    }
    return {"" if part == parts[0] else part: rows[part] for part in found}


def _describe_missing_split(folder: Path, names: Sequence[str]) -> str:
    extensions = ",".join(extension[1:] for extension in READERS)
    description = _describe_missing(folder, [f"{name}.{{{extensions}}}" for name in names])
    if any(path.is_dir() for path in folder.iterdir()):
        description += " To use ready-made few-shot splits, set --data.shots and --data.split_seed."
    return description


def _find_files(folder: Path, name: str) -> Iterator[list[Path]]:
    """Yield the file of that name, a part of it (`<name>_subset`), and its shards as the hub names them."""
    for extension in READERS:
        for stem in (name, f"{name}_subset"):
            if (folder / f"{stem}{extension}").is_file():
                yield [folder / f"{stem}{extension}"]
        if shards := _find_shards(folder, name, extension):
            yield shards


def _find_shards(folder: Path, name: str, extension: str) -> list[Path]:
    """Return the files `<name>-00000-of-00002<extension>` and so on, in their order.

    Raises:
        UserError: if one is missing, or if there are two of a number.
    """
    shard = re.compile(rf"{re.escape(Path(name).name)}-(\d+)-of-(\d+)(-[0-9a-f]+)?{re.escape(extension)}")
    place = (folder / name).parent
    found = [(int(match[1]), int(match[2]), path) for path in place.glob("*") if (match := shard.fullmatch(path.name))]
    found.sort()
    if any(total != len(found) or number != i for i, (number, total, _) in enumerate(found)):
        raise UserError(
            f"{place / name}-*-of-*{extension}: the parts are not complete, or some are given twice:"
            f" {list_names(path.name for *_, path in found)}. A split needs each part once, from 0 to the total less 1."
        )
    return [path for *_, path in found]


# --- The hub ---------------------------------------------------------------------------------------------------------


def _load_from_hub(task: Task, split: Split) -> Parts:
    """Return the split from the hub. A dataset without a validation split, such as TREC's, uses its test split."""
    if task.files is None or not task.files.hub[0]:
        raise UserError(
            f"data.source=hub: {task.name} is a custom task, which the hub does not have. Set --data.source to the"
            " folder of its files."
        )
    hub = _download(*task.files.hub)
    parts = ("",) if split == "train" else task.files.parts
    names = {part: f"{split}_{part}" if part else split for part in parts}
    if split == "validation" and not set(names.values()) & set(hub):
        names = {parts[0]: "test"}
    dataset = " ".join(filter(None, task.files.hub))
    if missing := [name for name in names.values() if name not in hub]:
        raise UserError(f"data.source=hub: {dataset} has no split {missing[0]!r}, only {', '.join(hub)}.")
    wanted = wanted_columns(task)
    return {
        "" if part == parts[0] else part: read_rows(task, read_dataset(f"{dataset} {name}", hub[name], wanted), split)
        for part, name in names.items()
    }


def _download(path: str, config: str | None) -> Mapping[str, datasets.Dataset]:
    """Return all splits of a dataset, from the cache of an earlier download if the hub is unreachable."""
    import datasets
    from huggingface_hub import HfApi

    offline, reason = datasets.config.HF_HUB_OFFLINE, ""
    try:
        # `datasets` retries an unreachable hub for 23 seconds, whatever its settings. So send one request, and if it
        # fails, let `datasets` read only its cache.
        HfApi().dataset_info(path, timeout=5)
    except Exception as error:  # the hub's client raises the errors of its HTTP library
        reason = str(error)
        datasets.config.HF_HUB_OFFLINE = True
    try:
        hub: Mapping[str, datasets.Dataset] = datasets.load_dataset(path, config)
    except Exception as error:
        raise UserError(
            f"data.source=hub: {path} is not available from the hub"
            f" ({' '.join((reason or str(error)).split())[:200]})."
            " Use --data.source=<folder of the official files>, or --data.source=sample for synthetic data."
        ) from error
    finally:
        datasets.config.HF_HUB_OFFLINE = offline
    return hub
