"""Files are written whole, where the user says, as the user's other files."""

import pytest

from jaxrel.files import free_names, write_atomically


def test_writing_says_where_it_cannot(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(NotADirectoryError, match="file is not a folder; give another place"):
        write_atomically(tmp_path / "file" / "a.npz", b"")
    with pytest.raises(NotADirectoryError, match="is not a folder; give another place"):
        write_atomically(tmp_path / "file" / "deeper" / "a.npz", b"")
    with pytest.raises(IsADirectoryError, match="it is a folder; give the name of a file"):
        write_atomically(tmp_path, b"")


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
