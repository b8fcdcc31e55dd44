"""What README.md shows of the figures: a table for each network, and a plot."""

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tests.benchmarks import page as pages
from tests.benchmarks.side_by_side import ours
from tests.benchmarks.side_by_side.networks import ATTENTION, CLIP_B32, DECODER, METHODS_OF
from tests.benchmarks.table import Cell, Table
from tests.benchmarks.timing import MIB

SECTION = "side by side"
KEPT = "side_by_side.json"
PLOT = Path("images") / "side_by_side.svg"
# Of peers; `peers` itself needs torch.
TORCH, CAM = "torch", "pytorch-grad-cam"
JAX_TOOLS = (ours.BASE, ours.COMPILED, ours.EAGER, ours.LOOP)
NOTE = "Batch {batch}, float32, random weights."
COLOURS = {
    ours.COMPILED: "#0b6e4f",
    ours.EAGER: "#8cc9a8",
    ours.LOOP: "#c9e4d6",
    "torch, grad per layer": "#5c5c5c",
    "torch, grad once": "#a0a0a0",
    "torch, hooks": "#c8c8c8",
    "zennit": "#c1440e",
    "LXT": "#e9a23b",
    "captum": "#3b6fb6",
    "autolrp": "#8e5ea2",
    CAM: "#d58ab5",
}

Figures = Mapping[str, Any]


def difference(tool: str, results: Mapping[str, Sequence[np.ndarray]]) -> dict[str, float]:
    """The greatest difference of a result from JAX's, over the greatest value of JAX's."""
    theirs, reference = results[tool], results[ours.BASE if tool == TORCH else ours.COMPILED]
    if tool in (ours.BASE, ours.COMPILED) or not theirs or not reference:
        return {}
    if tool == CAM:
        from tests.benchmarks.side_by_side.peers import as_grad_cam

        reference = [as_grad_cam(maps, theirs[0].shape[-1]) for maps in reference]
    pairs = zip(theirs, reference, strict=True)
    return {"difference": max(apart(tool, mine, its) for mine, its in pairs)}


def apart(tool: str, found: np.ndarray, reference: np.ndarray) -> float:
    """The greatest difference of two arrays over the greatest value of the second, if any."""
    if tool == ours.LOOP:  # which sums over the colours
        reference = reference.sum(-1)
    if found.shape != reference.shape:
        raise ValueError(f"{tool}: shape {found.shape}, where jaxrel has {reference.shape}")
    # Grad-CAM of a network with random weights may be 0 everywhere.
    return float(np.abs(found - reference).max() / (np.abs(reference).max() or 1))


def write(folder: Path, figures: Figures) -> None:
    """Put the tables between the marks in README.md, and the plot beside it."""
    groups = figures["groups"]
    versions = "; ".join(f"{name} {number}" for name, number in figures["versions"].items())
    parts = [
        f"{figures['hardware']}; {versions}. All figures are in [{KEPT}]({KEPT}).\n",
        f"![Times over a gradient of the same framework, by network, method and tool]({PLOT})\n",
    ]
    for network, methods in METHODS_OF.items():
        found = {m: groups[f"{network}: {m}"] for m in methods if f"{network}: {m}" in groups}
        if found:
            batch = next(iter(found.values()))["batch"]
            parts.append(Table(network, NOTE.format(batch=batch), rows(network, found)).markdown())
    pages.write(folder / "README.md", SECTION, "\n".join(parts))
    plot(folder / PLOT, groups)


def rows(network: str, found: Mapping[str, Figures]) -> list[dict[str, Cell]]:
    """The lines of a network's table; gradients stand before the methods held against them."""
    lines, shown = [], set()
    for method, group in found.items():
        # A sort keeps the order of the others.
        for tool in sorted(group["tools"], key=lambda tool: tool not in (ours.BASE, TORCH)):
            name = method
            if tool in (ours.BASE, TORCH):
                both = network == CLIP_B32 and method == ATTENTION
                name = "gradient, both towers" if both else "gradient"
                if (tool, name) in shown:
                    continue
                shown.add((tool, name))
            lines.append(row(network, name, tool, group))
    return lines


def row(network: str, method: str, tool: str, group: Figures) -> dict[str, Cell]:
    """One line: what a tool took for a method."""
    this = group["tools"][tool]
    rate = "examples/s" if network == DECODER else "images/s"
    cells: dict[str, Cell] = {"method": method, "tool": tool}
    if "error" in this:
        return cells | {rate: this["error"]}
    cells[rate] = group["batch"] / statistics.median(this["seconds"])
    cells["x own gradient"] = over(group, tool)
    cells["x jax.grad"] = ratio(this, group["tools"][ours.BASE])
    cells["peak MiB"] = None if this["peak"] is None else this["peak"] / MIB
    cells["difference"] = f"{this['difference']:.0e}" if "difference" in this else None
    cells["compile s"] = this.get("compile")
    cells["x FLOPs"] = this.get("flops")
    return cells


def over(group: Figures, tool: str) -> float | None:
    """How many times a forward and a backward pass of its framework a tool takes."""
    base = group["tools"].get(ours.BASE if tool in JAX_TOOLS else TORCH)
    this = group["tools"][tool]
    return None if "error" in this or base is None else ratio(this, base)


def ratio(this: Figures, other: Figures) -> float:
    """The median over the rounds of the ratio of their seconds."""
    pairs = zip(this["seconds"], other["seconds"], strict=True)
    return statistics.median(mine / its for mine, its in pairs)


def plot(path: Path, groups: Mapping[str, Figures]) -> None:
    """Bars of time over a gradient of the same framework, by network, method and tool."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    shown = {
        network: [method for method in methods if f"{network}: {method}" in groups]
        for network, methods in METHODS_OF.items()
        if any(f"{network}: {method}" in groups for method in methods)
    }
    rows = -(-len(shown) // 2)
    size = (11, 0.8 + 3.1 * rows)
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(rows, 2, squeeze=False)
    for panel in axes.flat[len(shown) :]:
        panel.axis("off")
    drawn = {}
    for panel, (network, methods) in zip(axes.flat, shown.items(), strict=False):
        panel.set_title(network)
        panel.set_yscale("log")
        panel.set_yticks([0.5, 1, 2, 5, 10])
        panel.yaxis.set_major_formatter(ScalarFormatter())
        panel.yaxis.set_minor_formatter(NullFormatter())
        panel.tick_params(labelsize=8)
        panel.axhline(1, color="black", linewidth=0.8)
        for place, method in enumerate(methods):
            group = groups[f"{network}: {method}"]
            timed = {tool: over(group, tool) for tool in group["tools"] if tool in COLOURS}
            bars = {tool: height for tool, height in timed.items() if height is not None}
            width = 0.8 / max(len(bars), 1)
            for index, (tool, height) in enumerate(bars.items()):
                left = place + (index - (len(bars) - 1) / 2) * width
                drawn[tool] = panel.bar(left, height, width, color=COLOURS[tool])
        panel.set_xticks(range(len(methods)), [name.replace(" ", "\n") for name in methods])
        panel.set_xlim(-0.6, len(methods) - 0.4)
        panel.set_ylabel("times a gradient")
    figure.legend(
        [drawn[tool] for tool in COLOURS if tool in drawn],
        [tool for tool in COLOURS if tool in drawn],
        loc="outside lower center",
        ncols=6,
    )
    path.parent.mkdir(exist_ok=True)
    # Without a salt and a date, the same figures give the same file.
    with rc_context({"svg.hashsalt": "side by side", "svg.fonttype": "none"}):
        figure.savefig(path, metadata={"Date": None})
