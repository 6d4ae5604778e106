"""YAML and JSON as plain values: nothing that runs, expands beyond measure or nests beyond what a parser can bear."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from lit_spu.errors import UserError

MAX_NODES = 100_000
"""Largest number of values in a document, with each alias counted as what it stands for."""

MAX_DEPTH = 50
"""Largest depth of lists and mappings in each other."""


def check_size(text: str) -> None:
    """Check a document without building it.

    Raises:
        yaml.YAMLError: if it is not YAML, contains itself, or has more than `MAX_NODES` values or `MAX_DEPTH` levels.
    """
    sizes: dict[str | None, tuple[int, int]] = {}  # nodes and levels of what each anchor stands for
    open_nodes: list[tuple[str | None, int, int]] = [(None, 1, 1)]  # anchor, nodes and levels so far, innermost last
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, 1, 1))
            sizes.pop(event.anchor, None)
            size, depth = 0, 0
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, size, depth = open_nodes.pop()
            sizes[anchor] = size, depth
        elif isinstance(event, yaml.AliasEvent):
            if event.anchor not in sizes and any(event.anchor == anchor for anchor, *_ in open_nodes):
                raise yaml.YAMLError(f"*{event.anchor} contains itself {event.start_mark}")
            size, depth = sizes.get(event.anchor, (1, 0))
        elif isinstance(event, yaml.ScalarEvent):
            size, depth = 1, 0
        else:
            continue
        anchor, nodes, levels = open_nodes.pop()
        open_nodes.append((anchor, nodes + size, max(levels, depth + 1)))
        if len(open_nodes) + depth > MAX_DEPTH or sum(nodes for _, nodes, _ in open_nodes) > MAX_NODES:
            raise yaml.YAMLError(f"more than {MAX_DEPTH} levels or {MAX_NODES:,} values {event.start_mark}")


def load_checked(load: Callable[[str], Any], text: str) -> Any:
    """Return what `load` makes of a document, once its size is checked.

    Raises:
        yaml.YAMLError: as `check_size`, or if `load` fails.
    """
    try:
        check_size(text)
        return load(text)
    except yaml.YAMLError:
        raise
    except Exception as error:  # PyYAML raises errors of many kinds for dates, numbers and binary data
        raise yaml.YAMLError(str(error)) from error


def parse_yaml(text: str, name: str) -> Any:
    """Return the plain values of a document.

    Raises:
        UserError: if it is not YAML or too large. The message begins with `name`.
    """
    try:
        return load_checked(yaml.safe_load, text)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).replace('"<unicode string>", ', "").split())
        raise UserError(f"{name} cannot be read as YAML: {reason[:300]}") from error


def parse_json(text: str | bytes) -> Any:
    """Return the plain values of a JSON document. A number beyond the range of floats is infinite.

    Raises:
        ValueError: if it is not JSON, or nested too deep for the parser.
    """
    try:
        return json.loads(text, parse_int=_parse_integer)
    except RecursionError as error:
        raise ValueError("too many levels of lists and objects") from error


def _parse_integer(text: str) -> int | float:
    number = float(text)
    return number if math.isinf(number) else int(text)


def read_mapping(path: str | Path, name: str | None = None) -> dict[str, Any]:
    """Return the mapping that a file holds.

    Raises:
        UserError: if it cannot be read, is not YAML or too large, or holds no mapping. The message begins with `name`,
            or with the path.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(f"{name or path} cannot be read ({reason}).") from error
    values = parse_yaml(text, name or str(path))
    if not isinstance(values, dict):
        raise UserError(f"{name or path}: a mapping of names to values was expected, not {str(values)[:40]!r}.")
    return values
