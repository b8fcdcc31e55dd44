"""What a report says, whatever it is drawn with."""

import json
import unicodedata
from collections.abc import Sequence
from typing import Any

from jaxrel.report.panels import Column, Panel, views


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
    if not signed:
        return "The darker, the more relevant."
    return "Red speaks for the target; blue, hatched, speaks against it."


OWN_SCALE = "Each map and each line of words has its own scale."
ONE_SCALE = "All maps of a method have one scale, and all its words have one."


def title(columns: Sequence[Column]) -> str:
    """What a report is of: what is explained, in which file, by which model."""
    shown = views(columns)
    by = models(columns)
    if len(shown) > 1:
        what = f"{len(shown)} examples explained"
    else:
        panel = shown[0][-1][0]
        about = dict(panel.about)
        of = about.get("question", "")
        if panel.caption is not None:
            what = "A caption explained word by word"
        elif of:
            what = f"Why the answer to “{of}” is {panel.target}"
        else:
            # A contrast is told in the target alone.
            given = panel.target if "against" in about else about.get("sentence", panel.target)
            what = f"Relevance for “{given}”"
        what += f" in {about['file']}" if about.get("file") else ""
    return clean(f"{what} by {by}" if by else what)


def cut(shown: int, every: int) -> str:
    """What to say where only the first of many examples are drawn."""
    return (
        f"These are the first {shown} of {every} examples. jaxrel batch explains many images and "
        "writes all their numbers into a folder."
    )


def overview(shown: int, every: int, method: str) -> str:
    """What to say above small maps of many examples."""
    some = "" if shown == every else f", the first {shown}"
    return (
        f"An overview of {every} examples{some}, by {method}. The page has more of the first; "
        "jaxrel batch explains many images and writes all their numbers into a folder."
    )


def shown_word(row: Sequence[Panel]) -> str:
    """The word of a caption that a row explains."""
    return clean(row[0].word.removeprefix("##"))


def flags(view: Sequence[Sequence[Panel]]) -> list[str]:
    """What is said of the flagged words of a caption, once for all of which the same is said."""
    words: dict[str, dict[str, None]] = {}
    for row in view:
        for panel in row:
            if panel.flagged:
                said = clean(panel.flag.partition("; flagged by")[0])
                words.setdefault(said, {})[shown_word(row)] = None
    return [f"{', '.join(of)}: {said}" for said, of in words.items()]


# What takes relevance on its way, as an account of it names these, and in words.
_TAKERS = {
    "bias": "biases (constants that the model adds) take",
    "stabiliser": "stabilisers (small numbers that keep a rule from dividing by zero) take",
    "rule": "rules (which may hand on less than they get, or more if negative) take",
}


def balance(columns: Sequence[Column]) -> list[str]:
    """How much of the score arrives as relevance, in words, of methods that measure it."""
    return [said for column in columns if (said := _balance(column))]


def _balance(column: Column) -> str:
    found = column.report.get("relevance")
    if not isinstance(found, dict) or not all(
        isinstance(found.get(name), int | float) for name in ("output", "input")
    ):
        return ""
    output, arrived = found["output"], found["input"]
    share = f" ({arrived / output:.0%})" if output else ""
    taken = ", ".join(
        f"{take} {number(found[name], 3)}"
        for name, take in _TAKERS.items()
        if isinstance(found.get(name), int | float)
    )
    said = (
        f"{column.title}: of the relevance {number(output, 4)} of all scores, "
        f"{number(arrived, 4)}{share} arrives at the image and the words"
        f"{f'; {taken}' if taken else ''}."
    )
    rules = column.report.get("rules")
    if isinstance(rules, dict) and rules:
        said += " Every operation on the way has a rule: "
        said += ", ".join(f"{count} x {name}" for name, count in rules.items()) + "."
    return clean(said)


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


def source(row: Sequence[Panel]) -> str:
    """Which input a row is about: its file, and its id where that is another."""
    told = dict(row[0].about)
    file, identity = (clean(told.get(name, "")) for name in ("file", "id"))
    if file and identity.endswith(file):
        return identity
    return " · ".join(filter(None, (file, f"id {identity}" * bool(identity))))


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
            return number(value, 4)
        case _:
            return clean(json.dumps(_rounded(value), ensure_ascii=False))


def _rounded(value: Any) -> Any:
    """What JSON can hold, with floats of 4 significant digits."""
    match value:
        case float():
            return float(number(value, 4))
        case list() | tuple():
            return [_rounded(one) for one in value]
        case dict():
            return {name: _rounded(one) for name, one in value.items()}
        case _:
            return value
