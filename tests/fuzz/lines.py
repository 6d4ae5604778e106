"""Strategies of command lines, from the flags and types of the real parsers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, cast, get_args, get_origin

from hypothesis import strategies as st
from lightning.pytorch import Callback

from lit_spu import public, ranges, registry
from lit_spu.cli import commands
from lit_spu.cli.fit import SpuCLI
from lit_spu.cli.subcommands import COMMANDS, RUNS
from lit_spu.methods.base import Method
from lit_spu.ranges import Range

Line = tuple[str, ...]

ODD = (
    *("nan", ".nan", ".inf", "-.inf", "1e400", "-1", "0", "-0.0", "1.5", "true", "null", "~"),
    *(str(2**63), str(-(10**30)), "\x1b[0m"),
    *("", " ", "''", "[]", "{}", "[[]]", "{a: 1}", "[1, 1]", "[null]", "{", "]", ":", "- a", "!!python/name:os.system"),
    *("[red]x[/red]", "[/]", "{seed}", "%s", "<b>&", "$HOME", "`id`", "é", "日本", "\u202e", "a\tb", "a\nb", "😀"),
    *("missing.yaml", "missing/folder", ".", "..", "/", "folder", "file.txt", "/dev/null", "-", "--", "*", "&a [*a]"),
)
"""Values that are wrong for most settings."""


class _ParserReady(BaseException):
    """The parser of the runs is made."""


class _ParseOnly(SpuCLI):
    def parse_arguments(self, parser: Any, args: Any) -> None:
        raise _ParserReady(parser)


@cache
def flags() -> Mapping[str, Mapping[str, Any]]:
    """Return the flags of every subcommand, and their types."""
    try:
        _ParseOnly(["fit"], ExitStack())
    except _ParserReady as ready:
        (runs,) = ready.args
    choices = next(action for action in runs._actions if action.dest == "subcommand").choices
    parsers = {name: choices[name] for name in RUNS}
    parsers |= {name: commands._parser(name, function) for name, function in commands.FUNCTIONS.items()}
    return {name: dict(sorted(_flags_of(parser))) for name, parser in parsers.items()}


def _flags_of(parser: Any) -> Iterator[tuple[str, Any]]:
    for action in parser._actions:
        hint = getattr(action, "_typehint", None) or action.type or str
        for flag in action.option_strings:
            if flag.startswith("--") and not flag.endswith("help") and not flag.startswith("--print_"):
                yield flag, hint


@cache
def classes() -> Mapping[str, Mapping[str, Any]]:
    """Return the settings of every method and callback, and their types."""
    found = {}
    for cls in public.public_classes():
        if issubclass(cls, Method | Callback):
            hints = ranges.declared(cast(Any, cls))
            found[cls.__name__] = {
                name: hints.get(name, p.annotation) for name, (_, p) in registry.settings(cls).items()
            }
    return found


METHODS = tuple(cls.__name__ for cls in public.public_classes() if issubclass(cls, Method))
CALLBACKS = tuple(cls.__name__ for cls in public.public_classes() if issubclass(cls, Callback))


def values(hint: Any) -> st.SearchStrategy[str]:
    """Return a strategy of the texts of a flag's value: allowed ones, those at a border, and odd ones."""
    return st.one_of(_allowed(hint), _allowed(hint), st.sampled_from(ODD))


def _allowed(hint: Any) -> st.SearchStrategy[str]:
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        borders = [str(number) for limit in hint.__metadata__ if isinstance(limit, Range) for number in _borders(limit)]
        return st.sampled_from(borders) if borders else _allowed(parts[0])
    if origin is Literal:
        return st.sampled_from([str(part) for part in parts])
    if origin in (Union, UnionType):
        return st.one_of([_allowed(part) for part in parts])
    if origin in (list, Sequence, set) and parts:
        return st.lists(_allowed(parts[0]), max_size=3).map(lambda items: f"[{', '.join(items)}]")
    if origin in (dict, Mapping):
        return st.sampled_from(["{}", "{a: 1}", "{k: 1}", "{lr: nan}"])
    numbers = {
        bool: ("true", "false"),
        int: ("0", "1", "2", "3", "7", "-1"),
        float: ("0", "0.0", "0.5", "1e-3", "2", "1e9"),
        NoneType: ("null",),
    }
    return st.sampled_from(numbers.get(hint, ("mini-bert", "sst2", "sample", "32", "auto", "cpu")))


def _borders(limit: Range) -> list[float]:
    """Return the ends of a range, their neighbours, and small numbers within."""
    ends = [limit.low, limit.high]
    whole = [number for end in ends for number in (end - 1, end, end + 1)]
    return [*whole, *(math.nextafter(end, way) for end in ends for way in (-math.inf, math.inf)), 1, 2, 4, 0.5]


@st.composite
def lines(draw: st.DrawFn) -> Line:
    """Draw a command line: one or two flags with drawn values, and seldom a mistake in writing."""
    name = draw(st.sampled_from([*RUNS, "fit", "fit", "fit", *(name for name in COMMANDS if name != "doctor")]))
    words = [name]
    if name in RUNS:
        method = draw(st.sampled_from(METHODS))
        words += [f"--model={method}"] if draw(st.integers(0, 9)) else []
        for _ in range(draw(st.integers(0, 2))):
            words.append(draw(_setting("--model", classes()[method])))
        if draw(st.integers(0, 3)) == 0:
            callback = draw(st.sampled_from(CALLBACKS))
            words.append(f"--trainer.callbacks+={callback}")
            words += [draw(_setting("--trainer.callbacks", classes()[callback]))] if classes()[callback] else []
    known = flags()[name]
    for _ in range(draw(st.integers(0 if len(words) > 2 else 1, 2))):
        flag = draw(st.sampled_from(sorted(known)))
        words.append(f"{flag}={draw(values(known[flag]))}")
    if draw(st.integers(0, 5)) == 0:
        words = draw(_misspelt(words))
    return (*words, *_safe(name))


def _safe(name: str) -> list[str]:
    """Return the flags that keep a line from running a study, or reading a huge model."""
    return ["--dry_run"] if name == "compare" else []


@st.composite
def _setting(draw: st.DrawFn, prefix: str, settings: Mapping[str, Any]) -> str:
    name = draw(st.sampled_from(sorted(settings)))
    return f"{prefix}.{name}={draw(values(settings[name]))}"


@st.composite
def _misspelt(draw: st.DrawFn, words: list[str]) -> list[str]:
    """Draw a mistake: a letter missing or doubled, a flag repeated or without a value, a stray word."""
    index = draw(st.integers(0, len(words) - 1))
    word = words[index]
    letter = draw(st.integers(0, max(0, len(word) - 1)))
    flag = word.partition("=")[0]
    written = draw(
        st.sampled_from(
            [
                [word[:letter] + word[letter + 1 :]],
                [word[:letter] + word[letter : letter + 1] + word[letter:]],
                [word, f"{flag}={draw(st.sampled_from(ODD))}"],
                [flag],
                [word, draw(st.sampled_from(ODD))],
                word.split("=", 1),
                [word.replace("=", "+=", 1)],
                [],
            ]
        )
    )
    return [*words[:index], *written, *words[index + 1 :]]


def make_folder(folder: Path) -> None:
    """Make the files that odd values name."""
    (folder / "folder").mkdir()
    (folder / "file.txt").write_text("text\n")
