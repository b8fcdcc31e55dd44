"""An explanation as a column of a report."""

from typing import Any

from jaxrel.explanations.methods import MEANINGS
from jaxrel.report.panels import Column, Panel

# What is told of an example beside its own table of text: its numbers are in the report.
_HIDDEN = ("notes", "word", "position", "caption", "familiarity")


def column(explanation: Any) -> Column:
    """What a report draws of an explanation: a panel per example."""
    report = {name: value for name, value in explanation.report.items() if name != "examples"}
    return Column(
        panels=tuple(_panel(explanation, i) for i in range(len(explanation))),
        model=explanation.model,
        settings=explanation.settings,
        meaning=MEANINGS.get(explanation.method, ""),
        report=report,
    )


def _panel(explanation: Any, index: int) -> Panel:
    target = explanation.target[index]
    flag = explanation.flags[index] if explanation.flags else None
    flagged = ""
    if flag is not None and flag.flagged:
        word = f"[{flag.word}]"
        # A target may be in other words, which are then marked as a whole.
        flagged = word if target.endswith(word) else target
    example = explanation.report.get("examples", [{}] * len(explanation))[index]
    if others := example.get("against"):
        target = f"{target}, against {others}"
    return Panel(
        title=explanation.method,
        target=target,
        score=float(explanation.score[index]),
        signed=explanation.signed,
        image=None if explanation.pixels is None else explanation.pixels[index],
        map=None if explanation.image is None else explanation.image[index],
        words=tuple(_words(explanation, index, example.get("position"))),
        flag="" if flag is None else str(flag),
        flagged=flagged,
        about=tuple(
            (name, ", ".join(value) if isinstance(value, list) else str(value))
            for name, value in example.items()
            if name not in _HIDDEN and value
        ),
        notes=tuple(example.get("notes", ())),
        word=example.get("word", ""),
        caption=example.get("caption"),
    )


def _words(explanation: Any, index: int, position: int | None) -> list[tuple[str, float]]:
    """The words and their relevance; of a caption, those before the explained one."""
    words = explanation.words(index)
    if position is None or not words:
        return words
    before = explanation.tokens[index][:position]
    return words[: sum(bool(token) and not token.startswith("##") for token in before)]
