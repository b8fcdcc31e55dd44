"""What several commands of the command line share."""

import argparse
import importlib.util
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxrel.files import check_writable


def add_out(command: Any) -> None:
    """Add the option `--out` to a command, or to a group of its options."""
    command.add_argument(
        "--out", default="out", type=folder, help="output folder (default: out)", metavar="FOLDER"
    )


def folder(text: str) -> Path:
    """A folder or a file; an empty name, such as of a variable that is not set, is none."""
    return Path(name(text))


def name(text: str) -> str:
    """A name that is not empty."""
    if not text.strip():
        raise argparse.ArgumentTypeError("the name is empty; is a variable not set?")
    return text


def sentence(text: str) -> str:
    """A text that is not empty, in UTF-8; ValueError for another, as of a terminal in Latin-1."""
    if not text.strip():
        raise ValueError(f"the text is empty: {text!r}; is a variable not set?")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        given = text.encode(errors="backslashreplace").decode()
        raise ValueError(
            f"the text {given!r} is not UTF-8 (character {error.start + 1}); set the terminal, "
            "or the file that it is from, to UTF-8"
        ) from None
    return text


def printable(text: str) -> str:
    """A text in which control characters are escaped, and bytes that are not UTF-8."""
    shown = re.sub("[\0-\x1f\x7f-\x9f]", lambda found: repr(found[0])[1:-1], text)
    return shown.encode(errors="backslashreplace").decode()


def check_out(out: Path) -> None:
    """Raise OSError if `--out` is a file, or nothing can be written there."""
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"--out {out} is a file; name a folder")
    check_writable(out)


def check_plots() -> None:
    """Raise ValueError if matplotlib is missing, before anything long is computed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("the curves need matplotlib: pip install 'jaxrel[report]'")


def load(name: str) -> Any:
    """The model of a bundled name, a folder or a hub name."""
    from jaxrel.models import from_pretrained

    return from_pretrained(name)


def names(text: str, every: Sequence[str] = ()) -> tuple[str, ...]:
    """Names between commas; 'all' are `every`.

    A name that holds a comma itself, such as 'weighted, norm', is found among `every`; its comma
    may also be written ':'.
    """
    if text == "all" and every:
        return tuple(every)
    parts = [part.strip().replace(":", ", ") for part in text.split(",") if part.strip()]
    found = []
    while parts:
        # The longest that is known.
        sizes = range(len(parts), 1, -1)
        size = next((size for size in sizes if ", ".join(parts[:size]) in every), 1)
        found.append(", ".join(parts[:size]))
        del parts[:size]
    return tuple(found)


def numbers(text: str) -> tuple[int, ...]:
    """Whole numbers between commas."""
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"expected whole numbers with commas, such as 0,1 or -1, got {text!r}"
        ) from None


def positive(text: str) -> int:
    """A whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def recipe(name: str) -> Any:
    """A recipe of `jaxrel.train`; ValueError where a package that recipes need is missing."""
    missing = [name for name in ("grain", "optax", "orbax") if not importlib.util.find_spec(name)]
    if missing:
        raise ValueError(f"recipes need {', '.join(missing)}: pip install 'jaxrel[train]'")
    from jaxrel.train.recipes.registry import find_recipe

    return find_recipe(name)
