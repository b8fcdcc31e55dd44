"""Pages of figures: what commands write between marks, and the tables read back."""

import re
from collections import defaultdict
from pathlib import Path

from jaxrel.files import write_atomically


def marks(section: str) -> tuple[str, str]:
    """The lines between which a command writes."""
    return f"<!-- {section}: begin -->", f"<!-- {section}: end -->"


def read(page: Path, section: str) -> str:
    """What stands between a section's marks.

    Raises:
      ValueError: the page lacks a mark, or has one twice.
    """
    return _split(page, section)[1].strip("\n")


def write(page: Path, section: str, text: str) -> None:
    """Put text between a section's marks, in the place of what stands there.

    Raises:
      ValueError: the page lacks a mark, or has one twice.
    """
    before, _, after = _split(page, section)
    begin, end = marks(section)
    text = text.strip("\n")
    write_atomically(page, f"{before}{begin}\n\n{text}\n\n{end}{after}".encode())


def _split(page: Path, section: str) -> tuple[str, str, str]:
    text = page.read_text(encoding="utf-8")
    begin, end = marks(section)
    for mark in (begin, end):
        if text.count(mark) != 1:
            raise ValueError(f"{page}: expected the line {mark!r} once, found {text.count(mark)}")
    before, rest = text.split(begin)
    if end not in rest:
        raise ValueError(f"{page}: expected the line {begin!r} above the line {end!r}")
    between, after = rest.split(end)
    return before, between, after


def tables(text: str) -> dict[str, list[dict[str, str]]]:
    """The rows of Markdown tables, each a cell by column, by the heading they stand under."""
    found, heading, columns = defaultdict(list), "", None
    for line in text.splitlines():
        if title := re.fullmatch(r"#+ (.*)", line):
            heading = title[1]
        if not line.startswith("|"):
            columns = None
            continue
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        if columns is None:
            columns = cells
        elif not all(re.fullmatch(":?-+:?", cell) for cell in cells):
            found[heading].append(dict(zip(columns, cells, strict=True)))
    return dict(found)
