"""Files are replaced as a whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from lit_spu.errors import UserError
from lit_spu.files import replace_path, write_text


def write_half(file: Path, error: BaseException) -> None:
    with replace_path(file) as partial:
        partial.write_text("half")
        raise error


def test_a_file_is_replaced(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    for text in ("one", "two"):
        write_text(file, text)
        assert file.read_text() == text
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError()])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path, error: BaseException) -> None:
    file = tmp_path / "a.txt"
    file.write_text("old")
    with pytest.raises(type(error)):
        write_half(file, error)
    assert file.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_full_disk_is_a_users_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Cannot write .*a\.txt: No space left on device"):
        write_half(tmp_path / "a.txt", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert not os.listdir(tmp_path)


def test_missing_parents_are_made(tmp_path: Path) -> None:
    write_text(tmp_path / "absent" / "a.txt", "text")
    assert (tmp_path / "absent" / "a.txt").read_text() == "text"


def test_a_file_where_a_folder_belongs_is_a_users_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"Cannot write .*a\.txt: (File exists|Not a directory)"):
        write_text(tmp_path / "file" / "a.txt", "")


def test_a_folder_is_written_whole_and_overwrites_nothing(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    (tmp_path / "out.partial").mkdir()  # of a process that was killed
    (tmp_path / "out.partial" / "half").touch()
    with replace_path(folder) as partial:
        partial.mkdir()
        (partial / "a.txt").write_text("whole")
    assert [path.name for path in folder.iterdir()] == ["a.txt"]
    with pytest.raises(UserError, match="Directory not empty"), replace_path(folder) as partial:
        partial.mkdir()
    assert [path.name for path in folder.iterdir()] == ["a.txt"]
