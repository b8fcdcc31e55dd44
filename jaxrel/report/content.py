"""What a report says, whatever it is drawn with."""

import json
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxrel.explanations.flags import Flag
from jaxrel.explanations.result import Explanation

Explanations = Sequence[Explanation] | Explanation


def check(explanations: Explanations) -> list[Explanation]:
    """The explanations as a list, after making sure that they can stand side by side.

    Raises:
      ValueError: there are none, or they explain different inputs.
    """
    explanations = [explanations] if isinstance(explanations, Explanation) else list(explanations)
    if not explanations:
        raise ValueError("a report needs at least one explanation, got an empty list")
    first = explanations[0]
    for other in explanations[1:]:
        if what := _difference(first, other):
            raise ValueError(
                f"explanations side by side must be of the same inputs; {first.method!r} and "
                f"{other.method!r} differ in {what}"
            )
    return explanations


def _difference(a: Explanation, b: Explanation) -> str | None:
    if a.target != b.target:
        return "target"
    # A method may explain one modality only: its tokens or images are then left out.
    if a.tokens and b.tokens and a.tokens != b.tokens:
        return "tokens"
    if a.pixels is not None and b.pixels is not None:
        same = (np.array_equal(x, y) for x, y in zip(a.pixels, b.pixels, strict=True))
        return None if all(same) else "images"
    return None


def shown_image(explanations: Sequence[Explanation], index: int) -> np.ndarray | None:
    """The image of one example, from the first explanation that carries images."""
    return next((e.pixels[index] for e in explanations if e.pixels is not None), None)


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


def legend(explanations: Sequence[Explanation]) -> str:
    """How to read the colours."""
    signs = "Red speaks for the target, blue against it. "
    return (signs if any(e.signed for e in explanations) else "") + "Each map has its own scale."


def score(explanations: Sequence[Explanation], index: int) -> str:
    """The explained score of one example; by method where the methods do not agree on it."""
    texts = [number(float(e.score[index]), 5) for e in explanations]
    if len(set(texts)) == 1:
        return texts[0]
    return ", ".join(
        f"{text} ({clean(e.method)})" for text, e in zip(texts, explanations, strict=True)
    )


def flag(explanation: Explanation, index: int) -> Flag | None:
    """What an explanation says of the word of one example."""
    return explanation.flags[index] if explanation.flags else None


def target(explanations: Sequence[Explanation], index: int) -> tuple[str, str]:
    """What is explained of one example: the text, and its end that a method doubts, or ""."""
    text = clean(explanations[0].target[index])
    for found in (flag(e, index) for e in explanations):
        if found is not None and found.flagged:
            word = f"[{clean(found.word)}]"
            # A target may be in other words, which are then marked as a whole.
            return (text.removesuffix(word), word) if text.endswith(word) else ("", text)
    return text, ""


def table(explanations: Sequence[Explanation]) -> list[tuple[str, list[str]]]:
    """Settings and report entries: (name, one text per explanation), nested names dotted."""
    columns = []
    for explanation in explanations:
        settings = {"settings": explanation.settings} if explanation.settings else {}
        columns.append(settings | _flatten(explanation.report))
    names = list(dict.fromkeys(name for column in columns for name in column))
    return [(clean(name), [_text(column.get(name)) for column in columns]) for name in names]


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
