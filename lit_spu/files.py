"""Files and folders that are either whole or not there."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lit_spu.errors import UserError


@contextmanager
def replace_path(path: str | Path) -> Iterator[Path]:
    """Context manager that yields `<path>.partial`, where the caller writes a file or a folder that replaces `path`.

    Both are on one filesystem, so that the rename is atomic: after a kill, a full disk or an error, `path` is as it
    was before. Data reaches the disk before the name does. A folder only replaces an absent or an empty one.

    Raises:
        UserError: if the place cannot be written, or the disk is full.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.partial")
    try:
        _remove(partial)  # of a process that was killed
        yield partial
        for file in (partial, *partial.rglob("*")):
            _sync(file)
        os.replace(partial, path)
        _sync(path.parent)
    except BaseException as error:
        with suppress(OSError):
            _remove(partial)
        if isinstance(error, OSError):
            raise UserError(
                f"Cannot write {path}: {error.strerror or error}. Free space there, or give another place."
            ) from error
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write a text file as a whole, in UTF-8.

    Raises:
        UserError: as `replace_path`.
    """
    with replace_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


def _sync(path: Path) -> None:
    """Wait until a file or the entries of a folder are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
