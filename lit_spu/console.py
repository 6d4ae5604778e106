"""Console for the tables and lines of the command line."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def make_console() -> Console:
    """Return a Rich console that prints every text as it is, whatever brackets and colons a user's names have."""
    from rich.console import Console

    return Console(markup=False, emoji=False, highlight=False)
