"""Errors in what the user gave: found in an exception, and printed in a line or two with exit status 2."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_only

from lit_spu.errors import UserError
from lit_spu.files import system_error


def find_user_error(error: BaseException | None) -> UserError | None:
    """Return the UserError that `error` is or was raised from, if there is one."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__
    return error


@rank_zero_only
def print_to_stderr(text: str) -> None:
    """Print a message on stderr, on the first rank only."""
    print(text, file=sys.stderr)


@contextmanager
def exit_on_user_error() -> Iterator[None]:
    """Context manager that exits with status 2 on a user's error, and with status 130 on Ctrl-C.

    A full disk, a file without permission and other problems of the operating system are such errors, too. The error is
    printed in a line or two. With LIT_SPU_DEBUG=1 it is raised instead, with its traceback.
    """
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(128 + signal.SIGINT) from None
    except Exception as error:
        cause = find_user_error(error) or error  # jsonargparse wraps the errors of constructors
        message = str(cause)
        if not isinstance(cause, UserError) and (problem := system_error(error)):
            place = getattr(error, "filename", None)
            message = f"{place}: {problem}." if place else f"{problem}, while reading or writing a file."
        elif not isinstance(cause, UserError | MisconfigurationException):
            raise
        if os.environ.get("LIT_SPU_DEBUG"):
            raise
        print_to_stderr(f"error: {message}")
        raise SystemExit(2) from None
