"""Mistakes of the user's, told in a line or two instead of a traceback."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class UserError(ValueError):
    """What was given cannot be used; the message says what was given, what is allowed and what to do next."""


def did_you_mean(given: str, allowed: Iterable[str]) -> str:
    """`Did you mean x?` where a name comes close, then all that is allowed."""
    names = sorted(allowed)
    close = get_close_matches(given.lower(), [name.lower() for name in names], n=1, cutoff=0.6)
    hint = next((f"Did you mean {name}? " for name in names if close and name.lower() == close[0]), "")
    return f"{hint}Allowed: {', '.join(names)}."
