"""The declared ranges of settings: every setting has one, and what they refuse is refused everywhere, in one line."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import pytest

from lit_spu import KLadder, public, ranges, registry
from lit_spu.callbacks.policies import Policy
from lit_spu.cli.commands import FUNCTIONS
from lit_spu.cli.fit import SpuCLI
from lit_spu.cli.parser import Parser
from lit_spu.data.glue import GLUE
from lit_spu.errors import UserError
from lit_spu.methods.base import Method
from lit_spu.ranges import Checked, Count, Length, Positive, Range, Seed, Share, Text
from lit_spu.study.grid import Study

HOSTILE = ["nan", ".nan", ".inf", "-.inf", "-1", "0", "1e400", "1.0e+400", "null", "", "''", "[]", str(10**30), "true"]
"""Values of flags that make no sense for most settings."""


def undeclared(hint: Any) -> Iterator[Any]:
    """Yield the parts of a type that have no declared range: numbers, texts and lists."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        if get_origin(parts[0]) in (list, Sequence, dict, Mapping):
            yield from undeclared(get_args(parts[0])[-1])
    elif origin in (Union, UnionType):
        for part in parts:
            yield from undeclared(part)
    elif origin in (dict, Mapping):
        yield from undeclared(parts[1])
    elif hint in (int, float, str) or origin in (list, Sequence):
        yield hint


CLASSES = [
    cls
    for cls in (*public.public_classes(), *registry.concrete_subclasses(Policy), Study)
    if any(owner.__module__.startswith("lit_spu.") for owner, _ in registry.settings(cls).values())
]
"""Every class with settings of its own: the data module, the callbacks, the methods, the policies, and a study."""


@pytest.mark.parametrize("cls", CLASSES)
def test_every_setting_has_a_declared_range(cls: type) -> None:
    assert not {name: found for name, hint in ranges.declared(cls).items() if (found := [*undeclared(hint)])}
    assert issubclass(cls, Checked)


@pytest.mark.parametrize("cls", CLASSES)
def test_every_default_is_allowed(cls: type) -> None:
    for name, hint in ranges.declared(cls).items():
        default = registry.settings(cls)[name][1].default
        assert default is inspect.Parameter.empty or cls is Study or ranges.allows(hint, default)


@pytest.mark.parametrize("command", FUNCTIONS.values())
def test_every_flag_of_a_command_has_a_declared_range(command: Any) -> None:
    hints = get_type_hints(command, include_extras=True)
    assert not {name: found for name, hint in hints.items() if (found := [*undeclared(hint)]) and name != "out"}


@pytest.mark.parametrize("hint", [Count, Positive, Share, Seed, Count | None, Annotated[Sequence[Count], Length(1)]])
def test_no_range_allows_what_is_not_finite_or_not_a_number(hint: Any) -> None:
    odd: list[Any] = [True, "1", [], [math.nan], [1, 1], {}, ""]
    values = [math.nan, math.inf, -math.inf, -1, 10**30, 10**400, 1e30, *odd]
    for value in values:
        assert not ranges.allows(hint, value), value


@pytest.mark.parametrize(
    ("hint", "allowed", "refused"),
    [
        (Annotated[int, Range(1, 3)], [1, 3], [0, 4, 2.0]),
        (Annotated[float, Range(0.0, 1.0, without_low=True, without_high=True)], [0.5], [0, 1, 0.0, 1.0]),
        (Annotated[Sequence[Count], Length(1)], [(1,), [2, 3]], ["1", [0], None]),
        (Annotated[Mapping[Text, Any], Length(1, unique=False)], [{"a": 1}], [{}, {" ": 1}]),
        (Text, ["a"], ["", " ", None, 1]),
        (Seed, [0, 2**32 - 1], [2**32]),
    ],
)
def test_bounds_are_kept_exactly(hint: Any, allowed: list[Any], refused: list[Any]) -> None:
    assert [value for value in allowed if not ranges.allows(hint, value)] == []
    assert [value for value in refused if ranges.allows(hint, value)] == []


@pytest.mark.parametrize(
    "settings", [{"lr": -1}, {"warmup": 5}, {"k": True}, {"backbone": " "}, {"drop_layers": [0, 0]}]
)
def test_the_constructor_names_the_argument(settings: dict[str, Any]) -> None:
    (name,) = settings
    with pytest.raises(UserError, match=rf"KLadder\.{name}: .* is not allowed\. Give "):
        KLadder(**settings)
    with pytest.raises(UserError, match=r"KLadder\.k: -1 is not allowed\. Give a whole number from 0 to 1e9\."):
        KLadder(-1)


class ParseOnly(SpuCLI):
    """The command line, which ends before it parses."""

    def parse_arguments(self, parser: Any, args: Any) -> None:
        raise StopIteration(parser)


@pytest.fixture(scope="module")
def parser() -> Parser:
    with pytest.raises(StopIteration) as stopped:
        ParseOnly(["fit"], ExitStack())
    found: Parser = stopped.value.value
    return found


REQUIRED = {"SharedTrunk": ["--model.siblings={a: {}}"], "LRDistillation": ["--model.teacher=mini-bert"]}
METHODS = {
    f"{owner.__name__}.{name}": (cls.__name__, name)
    for cls in public.public_classes()
    if issubclass(cls, Method)
    for name, (owner, _) in registry.settings(cls).items()
}
"""Every setting of every method once, with a method that has it."""


def values_of_a_flag(parser: Parser, capsys: pytest.CaptureFixture[str], flag: str, *others: str) -> Iterator[Any]:
    """Yield the configuration for each hostile value that the parser accepts; what it refuses takes one line."""
    for value in HOSTILE:
        Parser.command_line = [*others, f"{flag}={value}"]
        try:
            yield parser.parse_args(["fit", *Parser.command_line]).fit
        except SystemExit:
            (line,) = capsys.readouterr().err.splitlines()
            assert line.startswith(f"error: {flag}"), line


@pytest.mark.slow
@pytest.mark.parametrize("setting", METHODS)
def test_the_parser_accepts_no_value_that_the_range_of_a_method_refuses(
    setting: str, parser: Parser, capsys: pytest.CaptureFixture[str]
) -> None:
    method, name = METHODS[setting]
    hint = ranges.declared(public.find_public(method))[name]
    others = [f"--model={method}", *REQUIRED.get(method, [])]
    for config in values_of_a_flag(parser, capsys, f"--model.{name}", *others):
        assert ranges.allows(hint, config.model.init_args[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", ranges.declared(GLUE))
def test_the_parser_accepts_no_value_that_the_range_of_the_data_refuses(
    name: str, parser: Parser, capsys: pytest.CaptureFixture[str]
) -> None:
    for config in values_of_a_flag(parser, capsys, f"--data.{name}", "--model=HeadOnly"):
        assert ranges.allows(ranges.declared(GLUE)[name], config.data[name])


@pytest.mark.parametrize(
    "flags",
    [
        ["--model=KLadder", "--model.k=true"],
        ["--model=LoRA", "--model.rank=null"],
        ["--model=LoRA", "--model.roles=[]"],
        ["--model=MeZO", "--model.epsilon=.nan"],
        ["--model=HeadOnly", "--data.max_length=1"],
        ["--model=HeadOnly", "--data.num_workers=-1"],
        ["--model=HeadOnly", "--seed_everything=4294967296"],
        ["--model=HeadOnly", "--run_dir= "],
        ["--model=HeadOnly", "--trainer.callbacks+=GradualFreezing", "--trainer.callbacks.every=0"],
        [
            "--model=HeadOnly",
            "--trainer.callbacks+=SelectiveUpdate",
            "--trainer.callbacks.policy=Random",
            "--trainer.callbacks.policy.rate=1.0",
        ],
    ],
)
def test_the_command_line_names_the_flag_in_one_line(
    flags: list[str], parser: Parser, capsys: pytest.CaptureFixture[str]
) -> None:
    Parser.command_line = flags
    with pytest.raises(SystemExit):
        parser.parse_args(["fit", *flags])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: {flags[-1].partition('=')[0]}: ")
    assert " is not allowed. Give " in line
