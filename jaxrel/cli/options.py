"""What several commands of the command line share."""

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def add_out(command: argparse.ArgumentParser) -> None:
    """Add the option `--out`."""
    command.add_argument("--out", default="out", type=Path, help="output folder (default: out)")


def check_out(out: Path) -> None:
    """Raise NotADirectoryError if `--out` is a file."""
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"--out {out} is a file; name a folder")


def check_plots() -> None:
    """Raise ValueError if matplotlib is missing, before anything long is computed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("the curves need matplotlib: pip install 'jaxrel[report]'")


def load(name: str) -> Any:
    """The model of a bundled name, a folder or a hub name."""
    from jaxrel.models import from_pretrained

    return from_pretrained(name)


def names(text: str, every: Sequence[str] = ()) -> tuple[str, ...]:
    """Names between commas; 'all' are `every`. A measure's comma is written ':'."""
    if text == "all" and every:
        return tuple(every)
    return tuple(name.strip().replace(":", ", ") for name in text.split(",") if name.strip())


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
