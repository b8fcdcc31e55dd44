"""Files are written whole, where the user says, as the user's other files."""

import errno
import os
from pathlib import Path

import pytest

from jaxrel.files import check_writable, free_names, write_atomically


def test_writing_says_where_it_cannot(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NotADirectoryError, match="file is not a folder; give another place"):
        write_atomically(tmp_path / "file" / "a.npz", b"")
    with pytest.raises(NotADirectoryError, match="is not a folder; give another place"):
        write_atomically(tmp_path / "file" / "deeper" / "a.npz", b"")
    with pytest.raises(IsADirectoryError, match="it is a folder; give the name of a file"):
        write_atomically(tmp_path, b"")


def test_a_full_disk_names_the_file(tmp_path, monkeypatch):
    def write(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_bytes", write)
    message = f"cannot write {tmp_path}/a.png: No space left on device; make room, or give another"
    with pytest.raises(OSError, match=message) as caught:
        write_atomically(tmp_path / "a.png", b"x")
    assert caught.value.errno == errno.ENOSPC
    assert not [*tmp_path.iterdir()]


def test_folders_that_cannot_be_written(tmp_path, monkeypatch):
    check_writable(tmp_path)
    check_writable(tmp_path / "new" / "er")
    (tmp_path / "file").touch()
    for folder in ("file", "file/below"):
        with pytest.raises(NotADirectoryError, match=f"{tmp_path}/file is a file; name a folder"):
            check_writable(tmp_path / folder)
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(PermissionError, match=f"new: {tmp_path} may not be written; name another"):
        check_writable(tmp_path / "new")


def test_written_files_follow_the_umask(tmp_path):
    plain = tmp_path / "plain"
    plain.write_bytes(b"")
    write_atomically(tmp_path / "ours", b"")
    assert (tmp_path / "ours").stat().st_mode == plain.stat().st_mode


def test_free_names_share_a_number(tmp_path):
    def names():
        return [file.name for file in free_names(tmp_path, "a", [".png", ".html"])]

    assert names() == ["a.png", "a.html"]
    (tmp_path / "a.html").touch()
    assert names() == ["a-2.png", "a-2.html"]
    (tmp_path / "a-2.png").touch()
    assert names() == ["a-3.png", "a-3.html"]
    assert free_names(tmp_path / "none", "a", [".png"]) == [tmp_path / "none" / "a.png"]
