"""Files and folders that are either whole or not there, and folders that one process at a time writes into."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from uuid import uuid4

from lit_spu.errors import UserError


@contextmanager
def replace_path(path: str | Path, shared: bool = False) -> Iterator[Path]:
    """Context manager that yields `<path>.partial`, where the caller writes a file or a folder that replaces `path`.

    Both are on one filesystem, so that the rename is atomic: after a kill, a full disk or an error, `path` is as it
    was before. Data reaches the disk before the name does. A folder only replaces an absent or an empty one. Missing
    parent folders are made.

    Args:
        path: The file or folder.
        shared: Other processes may write the same path at the same time; each of them then has a partial file of its
            own, and the last one stays.

    Raises:
        UserError: if the place cannot be written, or the disk is full.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}{f'.{uuid4().hex}' if shared else ''}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(partial)  # of a process that was killed
        yield partial
        for file in (partial, *partial.rglob("*")):
            _sync(file)
        os.replace(partial, path)
        _sync(path.parent)
    except BaseException as error:
        with suppress(OSError):
            _remove(partial)
        if problem := system_error(error):
            raise UserError(f"Cannot write {path}: {problem}. Free space there, or give another place.") from error
        raise


def write_text(path: str | Path, text: str) -> None:
    """Write a text file as a whole, in UTF-8.

    Raises:
        UserError: as `replace_path`.
    """
    with replace_path(path) as partial:
        partial.write_text(text, encoding="utf-8")


def system_error(error: BaseException | None) -> str | None:
    """Return the message of the operating system that an exception comes from, such as `No space left on device`.

    torch raises a RuntimeError while it handles an OSError. safetensors and tokenizers, which are written in Rust, give
    its message as text.
    """
    while error is not None and not isinstance(error, UserError):
        if isinstance(error, OSError) and error.strerror:
            return error.strerror
        if found := re.search(r"\(os error (\d+)\)", str(error)):
            return os.strerror(int(found[1]))
        error = error.__cause__ or (error.__context__ if isinstance(error, RuntimeError) else None)
    return None


CHECKSUMS = "SHA256SUMS"
"""Name of the file of checksums in a folder, as `sha256sum` writes it."""


def write_checksums(folder: Path) -> None:
    """Write the checksums of all files in a folder, apart from its README.md, which people edit."""
    files = sorted(file for file in folder.iterdir() if file.is_file() and file.name != "README.md")
    (folder / CHECKSUMS).write_text("".join(f"{_digest(file)}  {file.name}\n" for file in files))


def check_checksums(folder: Path) -> None:
    """Check the files of a folder that has checksums. A folder without them passes.

    Raises:
        UserError: if a file is damaged, changed or missing.
    """
    sums = folder / CHECKSUMS
    for line in sums.read_text(errors="replace").splitlines() if sums.is_file() else ():
        digest, _, name = line.partition("  ")
        if not (folder / name).is_file():
            raise UserError(f"{folder} is incomplete: {name} is missing. Export it again.")
        if _digest(folder / name) != digest:
            raise UserError(
                f"{folder / name} is damaged or was changed: its checksum is not that of {sums}. Export it again, or"
                f" remove {CHECKSUMS} if you changed it yourself."
            )


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_writable(path: str | Path, flag: str) -> None:
    """Check that a file or folder can be made at a path, before anything is computed for it. Nothing is made.

    Raises:
        UserError: if it cannot, naming `flag`.
    """
    path = Path(path)
    place = path if path.is_dir() else next(folder for folder in path.absolute().parents if folder.exists())
    if not place.is_dir():
        problem = f"{place} is a file"
    elif not os.access(place, os.W_OK | os.X_OK):
        problem = f"{place} is not writable"
    else:
        return
    raise UserError(f"{flag}: {path} cannot be written, because {problem}. Give another place.")


@contextmanager
def lock_folder(folder: Path, flag: str) -> Iterator[None]:
    """Context manager that makes a folder and keeps other processes from writing into it.

    The operating system holds the lock and releases it when the process ends, however it ends. Windows has no such
    lock. Nothing is written into the folder. If it is still empty at the end, it is removed, and so are the parents
    that were made for it. A forked process neither holds the lock nor removes anything.

    Raises:
        UserError: if another process holds the lock, or the folder cannot be made, naming `flag`.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{flag}: {folder} is a file. Give another place.")
    check_writable(folder, flag)
    made = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    process = os.getpid()
    with _hold_lock(folder, flag):
        try:
            yield
        finally:
            if os.getpid() == process:
                with suppress(OSError):  # not empty
                    for place in made:
                        place.rmdir()


@contextmanager
def _hold_lock(folder: Path, flag: str) -> Iterator[None]:
    """Context manager that holds the operating system's lock of a folder. Windows has none."""
    if sys.platform == "win32":
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    _locks.add(descriptor)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"{flag}: another process is writing into {folder}. Wait until it has ended, or give another folder."
            ) from error
        except OSError as error:  # a filesystem without locks
            if error.errno not in (errno.ENOTSUP, errno.ENOLCK, errno.EBADF, errno.ENOSYS):
                raise
        yield
    finally:
        if descriptor in _locks:
            _locks.remove(descriptor)
            os.close(descriptor)


_locks: set[int] = set()
"""File descriptors that hold locks. Forked workers close theirs, because they may outlive a killed process."""


def _close_locks() -> None:
    while _locks:
        os.close(_locks.pop())


if sys.platform != "win32":
    os.register_at_fork(after_in_child=_close_locks)


def _sync(path: Path) -> None:
    """Wait until a file or the entries of a folder are on the disk. Windows cannot wait for what is only read."""
    if sys.platform == "win32":
        return
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
