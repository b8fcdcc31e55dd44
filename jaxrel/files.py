"""Writing files: complete or not at all."""

import itertools
import os
import secrets
from collections.abc import Sequence
from pathlib import Path


def write_atomically(path: str | os.PathLike[str], data: bytes) -> None:
    """Write a file so that it appears complete or not at all; a missing folder is made.

    Args:
      path: the file; replaced if it exists.
      data: its content.

    Raises:
      OSError: the file cannot be written there.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"cannot write {path}: it is a folder; give the name of a file")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise NotADirectoryError(
            f"cannot write {path}: {path.parent} is not a folder; give another place"
        ) from None
    # In the same folder, since a file can be moved in one step only within a file system.
    # Not tempfile: its files are readable by their owner alone, whatever the umask.
    temporary = path.with_name(f".jaxrel-{secrets.token_hex(8)}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    except OSError as error:
        # Of the file that was asked for, and not of the one that nobody knows.
        raise type(error)(
            error.errno,
            f"cannot write {path}: {error.strerror or error}; make room, or give another place",
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(folder: Path) -> None:
    """Raise OSError where files cannot be written into a folder, which may be missing.

    Raises:
      NotADirectoryError: it, or what it would be in, is a file.
      PermissionError: it may not be written, as on a disk for reading only.
    """
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"cannot write into {folder}: {there} is a file; name a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise PermissionError(
            f"cannot write into {folder}: {there} may not be written; name another folder"
        )


def free_names(folder: Path, stem: str, suffixes: Sequence[str]) -> list[Path]:
    """Names of files that are not there yet: stem.png, or stem-2.png and so on, one number for all.

    Args:
      folder: where to; it may be missing.
      stem: the name without suffix.
      suffixes: one per file.
    """
    for number in itertools.count(1):
        name = stem if number == 1 else f"{stem}-{number}"
        files = [folder / f"{name}{suffix}" for suffix in suffixes]
        if not any(file.exists() for file in files):
            return files
    raise AssertionError("there is always a free number")
