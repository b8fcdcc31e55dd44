"""An explanation as a column of a report."""

from typing import Any

from jaxrel.report.panels import Column, Panel


def column(explanation: Any) -> Column:
    """What a report draws of an explanation: a panel per example."""
    return Column(
        panels=tuple(_panel(explanation, i) for i in range(len(explanation))),
        model=explanation.model,
        settings=explanation.settings,
        report=explanation.report,
    )


def _panel(explanation: Any, index: int) -> Panel:
    target = explanation.target[index]
    flag = explanation.flags[index] if explanation.flags else None
    flagged = ""
    if flag is not None and flag.flagged:
        word = f"[{flag.word}]"
        # A target may be in other words, which are then marked as a whole.
        flagged = word if target.endswith(word) else target
    return Panel(
        title=explanation.method,
        target=target,
        score=float(explanation.score[index]),
        signed=explanation.signed,
        image=None if explanation.pixels is None else explanation.pixels[index],
        map=None if explanation.image is None else explanation.image[index],
        words=tuple(explanation.words(index)),
        flag="" if flag is None else str(flag),
        flagged=flagged,
    )
