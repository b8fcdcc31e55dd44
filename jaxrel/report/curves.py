"""The curves of a perturbation test, drawn with matplotlib (the extra `report`)."""

import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxrel.files import write_atomically
from jaxrel.metrics.perturbation import SIGNS, check_protocol

# Okabe and Ito 2008, told apart with any colour vision; without their yellow, which is too
# pale for a line on white.
_COLOURS = ("#000000", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")

# Beyond as many methods as colours the dashes change; the markers differ from neighbour to
# neighbour, for print without colour.
_DASHES = ("-", "--", ":", "-.")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")

_INK, _MUTED, _LINE = "#1c2024", "#60646c", "#dee1e6"

_TITLES = {
    "negative": "Least relevant first: higher is better",
    "positive": "Most relevant first: lower is better",
}


def curves(summary: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Draw the negative and the positive test side by side, a line with its band per method.

    Bands are the bootstrap 95% intervals of each point. The file appears complete or not at
    all; a missing folder is made.

    Args:
      summary: as `metrics.perturbation.summary` returns it, or read back from JSON.
      path: where to; must end in .png.

    Raises:
      ImportError: matplotlib is not installed.
      ValueError: another suffix, or a summary of another protocol.
      OSError: the file cannot be written there.
    """
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"cannot save curves as {str(path)!r}: give a name that ends in .png")
    check_protocol("curves", summary)
    figure = _figure(summary)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160)
    write_atomically(path, buffer.getvalue())


def _figure(summary: Mapping[str, Any]) -> Any:
    # Not pyplot: it keeps every figure, and chooses a backend for the whole process.
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
        from matplotlib.ticker import PercentFormatter
    except ImportError as error:
        raise ImportError(
            "curves are drawn with matplotlib, which is missing: pip install 'jaxrel[report]'"
        ) from error

    layout = ConstrainedLayoutEngine(wspace=0.04)
    figure = Figure(figsize=(11, 4.4), layout=layout, facecolor="white")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    for panel, sign in zip(panels, SIGNS, strict=True):
        for number, (name, method) in enumerate(summary["methods"].items()):
            _line(panel, summary["steps"], method[sign]["curve"], number, name)
        panel.set_title(_TITLES[sign], fontsize=11, color=_INK, loc="left")
        panel.set_xlabel("share of tokens removed", color=_INK)
        panel.set_xticks([0, 0.25, 0.5, 0.75, 1])
        panel.xaxis.set_major_formatter(PercentFormatter(xmax=1))
        panel.grid(color=_LINE, linewidth=0.8)
        panel.set_axisbelow(True)
        panel.tick_params(colors=_MUTED, labelcolor=_INK, length=0)
        panel.spines[["top", "right"]].set_visible(False)
        panel.spines[["left", "bottom"]].set_color(_MUTED)
    panels[0].set_ylabel(summary["measure"], color=_INK)
    lines, names = panels[0].get_legend_handles_labels()
    figure.legend(
        lines, names, loc="outside right upper", frameon=False, labelcolor=_INK, handlelength=3.2
    )
    figure.supxlabel(
        f"{summary['protocol']}, {summary['examples']} examples; bands: bootstrap 95% intervals",
        fontsize=9,
        color=_MUTED,
    )
    return figure


def _line(
    panel: Any, steps: list[float], curve: Mapping[str, list[float]], number: int, name: str
) -> None:
    colour = _COLOURS[number % len(_COLOURS)]
    panel.fill_between(steps, curve["low"], curve["high"], color=colour, alpha=0.1, linewidth=0)
    panel.plot(
        steps,
        curve["mean"],
        color=colour,
        linestyle=_DASHES[number // len(_COLOURS) % len(_DASHES)],
        marker=_MARKERS[number % len(_MARKERS)],
        markersize=4,
        linewidth=1.4,
        # A label that begins with an underscore would be left out of the legend.
        label=name if not name.startswith("_") else f" {name}",
    )
