"""Errors in what the user gave: found in an exception, and printed in a line or two with exit status 2."""

from __future__ import annotations

import os
import re
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities import rank_zero_only

from lit_spu.errors import UserError
from lit_spu.files import system_error


def find_user_error(error: BaseException | None) -> UserError | None:
    """Return the UserError that `error` is or was raised from, if there is one."""
    while error is not None and not isinstance(error, UserError):
        error = error.__cause__
    return error


_OUT_OF_MEMORY = "out of memory|can't allocate memory|CUBLAS_STATUS_ALLOC_FAILED"
_ADVICE = (
    "Lower --data.batch_size, with --trainer.accumulate_grad_batches for steps of the same size, or --data.max_length,"
    " or set --model.gradient_checkpointing=true.\nlit-spu estimate --budget=GIB shows each method's largest batch."
)


def explain_error(error: Exception) -> str | None:
    """Return the message of an error that the user can mend; None if it is an error of the program.

    These are errors that were raised from a UserError, problems of the operating system, lack of memory, and what
    Lightning's own code refuses.
    """
    if cause := find_user_error(error):  # jsonargparse wraps the errors of constructors
        return str(cause)
    text = " ".join(str(error).split())
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or re.search(_OUT_OF_MEMORY, text):
        wanted = re.search(r"allocate ([\d.]+ [GMK]?i?B|\d+ bytes)", text)
        return f"Out of memory{f': another {wanted[1]} were needed' if wanted else ''}. {_ADVICE}"
    if problem := system_error(error):
        place = getattr(error, "filename", None)
        return f"{place}: {problem}." if place else f"{problem}, while reading or writing a file."
    if isinstance(error, MisconfigurationException) or _is_raised_by_lightning(error):
        return f"--trainer: {text}"
    return None


def _is_raised_by_lightning(error: Exception) -> bool:
    """Return whether Lightning's own code raised an error, as its checks do while it trains."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    module = frames[-1].f_globals.get("__name__", "") if frames else ""
    return isinstance(error, ValueError | TypeError | RuntimeError) and module.startswith("lightning.")


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
        message = explain_error(error)
        if message is None or os.environ.get("LIT_SPU_DEBUG"):
            raise
        print_to_stderr(f"error: {message}")
        raise SystemExit(2) from None
