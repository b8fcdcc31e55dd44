"""Lines over growing sizes, both axes logarithmic."""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from jaxrel.files import write_atomically

# Told apart with any colour vision (Okabe and Ito 2008), and by dashes.
STYLES = (("#000000", "-"), ("#0072b2", "--"), ("#d55e00", "-."), ("#009e73", ":"))


@dataclass(frozen=True)
class Panel:
    """One pair of axes: a line of figures over the sizes for each method."""

    title: str
    x: str
    y: str
    over: Sequence[float]
    lines: Mapping[str, Sequence[float]]


def draw(panels: Sequence[Panel], path: Path, *, columns: int) -> None:
    """Draw a PNG file of panels in rows, each of so many columns and of one kind of figure."""
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(2.2 * columns, 2.2 * rows + 0.4), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey="row").flat
    for number, (place, panel) in enumerate(zip(axes, panels, strict=True)):
        for (method, line), (colour, dash) in zip(panel.lines.items(), STYLES, strict=True):
            place.loglog(panel.over, line, dash, color=colour, marker="o", ms=3, label=method)
        place.set_title(panel.title, fontsize=9, loc="left")
        place.set_xlabel(panel.x, fontsize=9)
        if number % columns == 0:
            place.set_ylabel(panel.y, fontsize=9)
        place.set_xticks(panel.over, [str(size) for size in panel.over], minor=False)
        place.set_xticks([], minor=True)
        place.tick_params(labelsize=8)
        place.grid(color="#dee1e6", linewidth=0.6)
        place.spines[["top", "right"]].set_visible(False)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_atomically(path, buffer.getvalue())
