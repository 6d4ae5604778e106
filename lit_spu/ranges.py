"""Allowed values of settings: declared once, in the types of the arguments of constructors and commands.

    def __init__(self, k: CountOrZero = 1, lr: Positive = 1e-3, roles: Annotated[Sequence[Role], Length(1)] = ...)

The command line checks them before anything is loaded, `Checked` checks them when an object is made in Python, and the
help shows them. Numbers that are not finite are never allowed.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pkgutil import resolve_name
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin, get_type_hints

from lit_spu.errors import UserError

MAX = 10**9
"""Largest count, and largest float: beyond it nothing can be run, or stays finite in single precision."""


@dataclass(frozen=True, repr=False)
class Range:
    """Interval of finite numbers.

    Args:
        low: Smallest number.
        high: Largest number.
        without_low: Exclude the smallest number.
        without_high: Exclude the largest number.
    """

    low: float = 0
    high: float = MAX
    without_low: bool = False
    without_high: bool = False

    def allows(self, value: float) -> bool:
        """Return whether the number is in the interval; NaN is in none."""
        if not self.low <= value <= self.high:
            return False
        return not ((self.without_low and value == self.low) or (self.without_high and value == self.high))

    def __repr__(self) -> str:
        low, high = (f"{bound:.10g}".replace("1000000000", "1e9") for bound in (self.low, self.high))
        return f"{'above' if self.without_low else 'from'} {low} {'to below' if self.without_high else 'to'} {high}"


@dataclass(frozen=True, repr=False)
class Length:
    """Smallest number of items of a list, whose items must differ if they are `unique`."""

    low: int = 0
    unique: bool = True

    def allows(self, value: Any) -> bool:
        """Return whether the list is long enough, and repeats no item that must be unique."""
        return len(value) >= self.low and not (self.unique and any(item in value[:i] for i, item in enumerate(value)))

    def __repr__(self) -> str:
        parts = [f"at least {self.low}"] * bool(self.low) + ["none twice"] * self.unique
        return ", ".join(parts)


@dataclass(frozen=True, repr=False)
class Pattern:
    """Texts that match a regular expression as a whole, described in words."""

    regex: str
    words: str

    def allows(self, value: str) -> bool:
        """Return whether the whole text matches."""
        return re.fullmatch(self.regex, value, re.DOTALL) is not None

    def __repr__(self) -> str:
        return self.words


Count = Annotated[int, Range(1)]
CountOrZero = Annotated[int, Range(0)]
Seed = Annotated[int, Range(0, 2**32 - 1)]
Positive = Annotated[float, Range(1e-30, 1e9)]
PositiveOrZero = Annotated[float, Range(0.0, 1e9)]
Share = Annotated[float, Range(0.0, 1.0)]
PositiveShare = Annotated[float, Range(0.0, 1.0, without_low=True)]
ShareBelowOne = Annotated[float, Range(0.0, 1.0, without_high=True)]
Text = Annotated[str, Pattern(r".*\S.*", "that is not empty")]
Name = Annotated[str, Pattern(r"[\w-]+( [\w-]+)*", "of letters, digits, - and _, and spaces between them")]


def allows(hint: Any, value: Any) -> bool:
    """Return whether a type and its ranges allow a value. Types that this module does not know allow everything."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return allows(parts[0], value) and all(limit.allows(value) for limit in hint.__metadata__)
    if origin in (Union, UnionType):
        return any(allows(part, value) for part in parts)
    if origin is Literal:
        return any(value == part and type(value) is type(part) for part in parts)
    if hint in (int, float):  # not a bool, nor a number of numpy, which a checkpoint could not hold
        return type(value) is int or (hint is float and type(value) is float)
    if hint in (bool, str, NoneType, None):
        return isinstance(value, hint or NoneType)
    if origin in (list, Sequence):
        return isinstance(value, list | tuple) and all(allows(parts[0], item) for item in value)
    if origin in (dict, Mapping):
        return isinstance(value, Mapping) and all(
            allows(parts[0], key) and allows(parts[1], item) for key, item in value.items()
        )
    return True


def describe(hint: Any) -> str:
    """Return the values that a type and its ranges allow, such as `a whole number from 1 to 8`."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        base, limits = describe(parts[0]), ", ".join(map(repr, hint.__metadata__))
        name, _, items = base.partition(": ")
        return f"{name}: {limits}, {items}" if items else f"{name}{': ' if name == 'a mapping' else ' '}{limits}"
    if origin in (Union, UnionType, Literal):
        words = [str(part) if origin is Literal else describe(part) for part in parts]
        return " or ".join([", ".join(words[:-1]), words[-1]] if words[1:] else words)
    if origin in (list, Sequence):
        return f"a list: each {describe(parts[0])}"
    if origin in (dict, Mapping):
        return "a mapping" if parts[0] is str else f"a mapping: each name {describe(parts[0])}"
    names = {int: "a whole number", float: "a number", str: "a text", bool: "true or false", NoneType: "null"}
    return names.get(hint) or f"a {getattr(hint, '__name__', hint)}"


def declared(cls: Any) -> Mapping[str, Any]:
    """Return the types of the arguments of a class's constructor by name: its own, then those of its checked bases."""
    found: dict[str, Any] = {}
    for base in cls.__mro__ if isinstance(cls, type) else ():
        if issubclass(base, Checked) and "__init__" in vars(base):
            try:
                hints = get_type_hints(vars(base)["__init__"], include_extras=True)
            except NameError:  # a user's class with types that only exist for the type checker
                continue
            parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
            named = {p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)}
            found = {name: hint for name, hint in hints.items() if name in named} | found
    return found


class Checked:
    """Base class that checks the arguments of the constructor against their types before the constructor runs."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        names = list(inspect.signature(cls.__init__).parameters)[1:]
        check(declared(cls), {**dict(zip(names, args, strict=False)), **kwargs}, f"{cls.__name__}.")
        return super().__new__(cls)


def check(hints: Mapping[str, Any], values: Mapping[str, Any], prefix: str) -> None:
    """Check settings against their types. Names without a type are left to those who read them.

    Args:
        hints: The types by name.
        values: The settings by name.
        prefix: What the message writes before a name, such as `model.`.

    Raises:
        UserError: If one is not allowed.
    """
    for name, value in values.items():
        if name in hints and not allows(hints[name], value):
            raise UserError(str(Refusal(f"{prefix}{name}", value, hints[name])))


@dataclass(frozen=True)
class Refusal:
    """Setting with a value that its type or its range does not allow.

    Args:
        key: Full name of the setting, such as `model.lr`.
        value: The value.
        hint: The type that is declared.
    """

    key: str
    value: Any
    hint: Any

    def __str__(self) -> str:
        value = "null" if self.value is None else repr(self.value)
        return f"{self.key}: {value} is not allowed. Give {describe(self.hint)}."


def refusals(hint: Any, value: Any, key: str) -> Iterator[Refusal]:
    """Yield what is refused in a setting of the command line, and in the settings of the classes that it names.

    Args:
        hint: Its type.
        value: Its parsed value. A class is a namespace with `class_path` and `init_args`; it may be inside a list.
        key: Its full name.
    """
    classes = [item for item in (value if isinstance(value, list) else [value]) if hasattr(item, "class_path")]
    for named in classes:
        hints = declared(resolve_name(named.class_path))
        for name, setting in vars(named.get("init_args", named)).items():
            if name in hints:
                yield from refusals(hints[name], setting, f"{key}.{name}")
    if not classes and not allows(hint, value):
        yield Refusal(key, value, hint)
