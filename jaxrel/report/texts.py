"""What a report says, whatever it is drawn with."""

import json
import unicodedata
from collections.abc import Sequence
from typing import Any

from jaxrel.report.panels import Column, Panel


def clean(text: str) -> str:
    """Text on one line, without characters that are commands rather than text."""
    line = " ".join(text.split())
    # Control characters, and halves of a surrogate pair, which cannot be written to a file.
    return "".join("\ufffd" if unicodedata.category(c) in ("Cc", "Cs") else c for c in line)


def number(value: float, digits: int) -> str:
    """A number with so many significant digits."""
    return f"{value:.{digits}g}"


def ticks(limit: float, *, signed: bool) -> list[str]:
    """The numbers beneath a colour bar, from left to right."""
    if limit == 0:
        return ["0 everywhere"]
    end = number(limit, 3)
    return [number(-limit, 3), "0", end] if signed else ["0", end]


def legend(columns: Sequence[Column]) -> str:
    """How to read the colours."""
    signed = any(panel.signed for column in columns for panel in column.panels)
    signs = "Red speaks for the target, blue against it. " if signed else ""
    return f"{signs}Each map has its own scale."


def models(columns: Sequence[Column]) -> str:
    """The names of the models, each once."""
    return ", ".join(dict.fromkeys(clean(column.model) for column in columns if column.model))


def score(row: Sequence[Panel]) -> str:
    """The explained score of one example; by method where the methods do not agree on it."""
    texts = [number(panel.score, 5) for panel in row]
    if len(set(texts)) == 1:
        return texts[0]
    return ", ".join(
        f"{text} ({clean(panel.title)})" for text, panel in zip(texts, row, strict=True)
    )


def target(row: Sequence[Panel]) -> tuple[str, str]:
    """What is explained of one example, in two parts: the text, and its flagged end or ""."""
    text = clean(row[0].target)
    flagged = clean(next((panel.flagged for panel in row if panel.flagged), ""))
    return text.removesuffix(flagged), flagged


def table(columns: Sequence[Column]) -> list[tuple[str, list[str]]]:
    """Settings and report entries: (name, one text per column), nested names dotted."""
    entries = []
    for column in columns:
        settings = {"settings": column.settings} if column.settings else {}
        entries.append(settings | _flatten(column.report))
    names = list(dict.fromkeys(name for column in entries for name in column))
    return [(clean(name), [_text(column.get(name)) for column in entries]) for name in names]


def _flatten(entries: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in entries.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{name}.")
        else:
            flat[f"{prefix}{name}"] = value
    return flat


def _text(value: Any) -> str:
    match value:
        case None:
            return ""
        case str():
            return clean(value)
        case bool():
            return "yes" if value else "no"
        case float():
            return number(value, 5)
        case _:
            return clean(json.dumps(value, ensure_ascii=False))
