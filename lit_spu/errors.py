"""Errors in what a user gave, which the command line reports without a traceback."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches


class UserError(ValueError):
    """Error in a value or file that the user gave.

    The message names what was given, what is allowed and what to do next.
    """


class NonFiniteError(UserError):
    """Error for a loss, a score or a weight that is NaN or infinite."""


@contextmanager
def name_flag(flag: str) -> Iterator[None]:
    """Context manager that begins the messages of errors in a file with the flag that named it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{flag}: {error}") from error


def describe_changes(before: Mapping[str, object], now: Mapping[str, object]) -> str:
    """Return the values that differ from those before, as `name now (before: value)`, joined by commas."""
    differ = [name for name, value in before.items() if now.get(name) != value]
    return ", ".join(f"{name} {now.get(name)} (before: {before[name]})" for name in differ)


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """Return `Did you mean x?` if a name is close to the given one, followed by all allowed names."""
    names = sorted(set(allowed))
    close = get_close_matches(given.lower(), [name.lower() for name in names], n=1, cutoff=0.6)
    hint = next((f"Did you mean {name}? " for name in names if close and name.lower() == close[0]), "")
    return f"{hint}Allowed: {', '.join(names)}."
