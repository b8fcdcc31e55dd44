"""Measures by method, drawn with matplotlib (the extra `report`): bars, and lines over a range."""

import io
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jaxrel.files import write_atomically

_INK, _MUTED, _LINE, _BAR = "#1c2024", "#60646c", "#dee1e6", "#a8cbe4"

# Okabe and Ito 2008, told apart with any colour vision; without their yellow, which is too
# pale for a line on white.
_COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")

# Beyond as many methods as colours the dashes change; the markers differ from neighbour to
# neighbour, for print without colour.
_DASHES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")

Measures = Mapping[str, Mapping[str, float] | None]
Curves = Mapping[str, Mapping[str, list[float]]]


def bars(
    panels: Mapping[str, Measures],
    path: str | os.PathLike[str],
    *,
    bases: Mapping[str, float] | None = None,
    note: str = "",
) -> None:
    """Draw a panel of horizontal bars per measure, each bar with its interval.

    Methods have one order in all panels. The file appears complete or not at all; a missing
    folder is made.

    Args:
      panels: by title, and then by method, `mean`, `low` and `high`; None where there is no
        value.
      path: where to; must end in .png.
      bases: by title, where bars begin, such as 0.5 for the area under a ROC curve; 0 by default.
      note: a line below.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: another suffix, or nothing to draw.
      OSError: the file cannot be written there.
    """
    _check("bars", path, panels)
    methods = list(dict.fromkeys(name for one in panels.values() for name in one))
    height = 1.3 + 0.3 * len(methods)
    figure = _figure((max(3.3 * len(panels), 5) + 1.2, height))
    drawn = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for panel, (title, found) in zip(drawn, panels.items(), strict=True):
        base = (bases or {}).get(title, 0.0)
        for row, method in enumerate(methods):
            if (one := found.get(method)) is not None:
                _bar(panel, row, base, one)
        panel.axvline(base, color=_MUTED, linewidth=0.8)
        _style(panel, title)
        panel.grid(visible=False, axis="y")
        panel.margins(x=0.08)
    drawn[0].set_yticks(range(len(methods)), methods)
    drawn[0].invert_yaxis()
    _write(figure, path, note)


def lines(
    panels: Mapping[str, Curves],
    over: Sequence[float],
    path: str | os.PathLike[str],
    *,
    x: str,
    y: str,
    reference: tuple[str, float] | None = None,
    percent: bool = False,
    size: tuple[float, float] = (8.4, 4.6),
    note: str = "",
) -> None:
    """Draw a line with its band per method, in a panel or in several side by side.

    Panels have the same methods and one vertical axis.

    Args:
      panels: by title, and then by method, `mean`, `low` and `high`, a list over the range each.
      over: the range.
      path: where to; must end in .png.
      x: what the range is.
      y: what is measured.
      reference: the name and height of a straight line, such as chance.
      percent: whether the range is a share of the whole, from 0 to 1, written in per cent.
      size: width and height in inches.
      note: a line below.

    Raises:
      ImportError, ValueError, OSError: as `bars`.
    """
    _check("lines", path, panels)
    figure = _figure(size)
    drawn = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for panel, (title, curves) in zip(drawn, panels.items(), strict=True):
        if reference is not None:
            name, height = reference
            panel.axhline(height, color=_MUTED, linewidth=1, linestyle=(0, (1, 2)), label=name)
        for number, (name, curve) in enumerate(curves.items()):
            _line(panel, list(over), curve, number, name)
        _style(panel, title)
        panel.set_xlabel(x, color=_INK)
        if percent:
            panel.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0%", "25%", "50%", "75%", "100%"])
    drawn[0].set_ylabel(y, color=_INK)
    figure.legend(
        *drawn[0].get_legend_handles_labels(),
        loc="outside right upper",
        frameon=False,
        labelcolor=_INK,
        handlelength=3.2,
    )
    _write(figure, path, note)


def _bar(panel: Any, row: int, base: float, one: Mapping[str, float]) -> None:
    panel.barh(row, one["mean"] - base, left=base, height=0.62, color=_BAR)
    panel.plot([one["low"], one["high"]], [row, row], color=_INK, linewidth=1.3)
    # A bar that ends where it begins is seen by its point.
    panel.plot(one["mean"], row, marker="o", markersize=4.5, color=_INK)


def _line(
    panel: Any, over: list[float], curve: Mapping[str, list[float]], number: int, name: str
) -> None:
    colour = _COLOURS[number % len(_COLOURS)]
    panel.fill_between(over, curve["low"], curve["high"], color=colour, alpha=0.1, linewidth=0)
    panel.plot(
        over,
        curve["mean"],
        color=colour,
        linestyle=_DASHES[number // len(_COLOURS) % len(_DASHES)],
        marker=_MARKERS[number % len(_MARKERS)],
        markersize=4,
        linewidth=1.4,
        # A label that begins with an underscore would be left out of the legend.
        label=name if not name.startswith("_") else f" {name}",
    )


def _style(panel: Any, title: str) -> None:
    panel.set_title(title, fontsize=11, color=_INK, loc="left")
    panel.grid(color=_LINE, linewidth=0.8)
    panel.set_axisbelow(True)
    panel.tick_params(colors=_MUTED, labelcolor=_INK, length=0)
    panel.spines[["top", "right"]].set_visible(False)
    panel.spines[["left", "bottom"]].set_color(_MUTED)


def _check(what: str, path: str | os.PathLike[str], drawn: Mapping[str, Any]) -> None:
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"cannot save {what} as {str(path)!r}: give a name that ends in .png")
    if not drawn:
        raise ValueError(f"{what}: there is nothing to draw")


def _figure(size: tuple[float, float]) -> Any:
    # Not pyplot: it keeps every figure, and chooses a backend for the whole process.
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        raise ImportError(
            "plots are drawn with matplotlib, which is missing: pip install 'jaxrel[report]'"
        ) from error

    layout = ConstrainedLayoutEngine(wspace=0.04)
    figure = Figure(figsize=size, layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _write(figure: Any, path: str | os.PathLike[str], note: str) -> None:
    if note:
        figure.supxlabel(note, fontsize=9, color=_MUTED)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    write_atomically(path, buffer.getvalue())
