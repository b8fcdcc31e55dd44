"""How time and memory grow with the sizes: `python -m tests.benchmarks.scaling`.

Each size runs in a process of its own, which has as many devices as it needs. Figures are kept in
scaling.json; the tables in README.md and the plot are made of them. A later call measures what is
missing, or with `--again` all.
"""

import argparse
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrel import composites, lrp
from jaxrel.attention.unimodal_relevance import BLOCK
from tests.benchmarks import page, scaling_plot, streaming_forms
from tests.benchmarks.table import Table, hardware
from tests.benchmarks.timing import MIB, candidate, measure

README, KEPT = (Path(__file__).with_name(name) for name in ("README.md", "scaling.json"))
PLOT = Path(__file__).parent / "images/scaling.png"
SECTION = "scaling"
COLLECTIVE = "all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute"

# What is drawn and shown, by the name and the scale of what is kept.
UNITS = {"s": ("seconds", 1), "MiB": ("temp", MIB)}
GRAD = "jax.grad"
METHODS: dict[str, Callable] = {
    GRAD: streaming_forms.grad,
    "weighted streaming": streaming_forms.explain("weighted", "streaming"),
    "weighted blockwise": streaming_forms.explain("weighted", "blockwise", BLOCK),
    "AttnLRP": lrp(streaming_forms.score, composites.attn_lrp(), argnums=1),
}

INTRO = f"""\
The transformer of "Longer sequences", of width {streaming_forms.WIDTH} and {streaming_forms.HEADS}
heads, each layer rematerialised in one scan, with fewer layers. "s" is the median of all rounds,
in which the methods take turns, "MiB" XLA's temporary memory. A slope is that of the line that
fits the logarithms of all sizes best: at 1 a figure grows as the size does, at 2 as its square.
"Less grad's" is the slope less that of `jax.grad`."""
DEVICES = """\
The devices are forced (`--xla_force_host_platform_device_count`): the batch is divided among them,
and the weights are on each. All share the cores of one machine, over which one device spreads its
matrix products too. So the times say what dividing costs or saves on the same cores, and nothing of
what more cores gain. With as many real cores or accelerators as devices, the slope of the time
would be -1 where one batch is divided and 0 where each device has its own, and only there can
parallel efficiency be measured (`tests.benchmarks.device` measures one accelerator). What does not
depend on the cores is the memory of each device, and the operations that exchange data between
devices ("collectives" in the compiled program): with none, no device waits for another."""


@dataclass(frozen=True)
class Size:
    """Examples, tokens of each, layers, and the devices that share the examples."""

    batch: int = 1
    tokens: int = 256
    layers: int = 4
    devices: int = 1

    @property
    def key(self) -> str:
        """What its figures are kept under."""
        return ", ".join(f"{name} {value}" for name, value in vars(self).items())


@dataclass(frozen=True)
class Axis:
    """Sizes of which one number grows, and what does not."""

    grows: str
    fixed: str
    sizes: Sequence[Size]

    @property
    def over(self) -> list[int]:
        """The number that grows."""
        return [getattr(size, self.grows) for size in self.sizes]


AXES = (
    Axis("batch", "256 tokens, 4 layers", [Size(batch=n) for n in (1, 2, 4, 8, 16)]),
    Axis("tokens", "batch 1, 4 layers", [Size(tokens=n) for n in (128, 256, 512, 1024, 2048)]),
    Axis("layers", "batch 1, 256 tokens", [Size(layers=n) for n in (2, 4, 8, 16, 32)]),
    Axis("devices", "batch 8 in all", [Size(batch=8, devices=n) for n in (1, 2, 4, 8)]),
    Axis("devices", "batch 2 on each", [Size(batch=2 * n, devices=n) for n in (1, 2, 4, 8)]),
)

# By method: "seconds", "temp" in bytes, and "collectives".
Figures = Mapping[str, Mapping[str, float]]


def measured(size: Size, repeats: int) -> Figures:
    """The figures of all methods, in this process."""
    mesh = jax.make_mesh((size.devices,), ("examples",), axis_types=(AxisType.Auto,))
    weights = streaming_forms.random_weights(jax.random.key(0), size.layers)
    x = jax.random.normal(jax.random.key(1), (size.batch, size.tokens, streaming_forms.WIDTH))
    args = (
        jax.device_put(weights, NamedSharding(mesh, P())),
        jax.device_put(x, NamedSharding(mesh, P("examples"))),
    )
    programs = {name: jax.jit(fun).lower(*args).compile() for name, fun in METHODS.items()}
    candidates = [candidate(name, program, *args) for name, program in programs.items()]
    found = measure(candidates, repeats=repeats, what=size.key)
    return {
        name: {
            "seconds": one.milliseconds / 1e3,
            "temp": one.temp,
            "collectives": collectives(programs[name].as_text()),
        }
        for name, one in found.items()
    }


def collectives(program: str) -> int:
    """The operations of a compiled program that exchange data between devices."""
    return len(re.findall(rf" (?:{COLLECTIVE})(?:-start)?\(", program))


def in_its_own_process(size: Size, repeats: int) -> Figures:
    """What a size measures of itself in a new process with its devices."""
    call = [sys.executable, "-m", "tests.benchmarks.scaling", "--repeats", str(repeats)]
    call += ["--one", json.dumps(vars(size))]
    flags = os.environ.get("XLA_FLAGS", "")
    flags += f" --xla_force_host_platform_device_count={size.devices}"
    environment = os.environ | {"XLA_FLAGS": flags.strip(), "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return json.loads(done.stdout.splitlines()[-1])


def slope(sizes: Sequence[float], figures: Sequence[float]) -> float:
    """The exponent p of the power law figure = c size^p that fits the logarithms best.

    Args:
      sizes: two or more that differ, positive.
      figures: one for each size, positive.
    """
    return float(np.polyfit(np.log(sizes), np.log(figures), 1)[0])


def line(axis: Axis, method: str, unit: str, kept: Mapping[str, Figures]) -> list[float]:
    """The figures of a method along an axis, in seconds or MiB."""
    name, scale = UNITS[unit]
    return [kept[size.key][method][name] / scale for size in axis.sizes]


def slopes(axis: Axis, method: str, unit: str, kept: Mapping[str, Figures]) -> tuple[float, float]:
    """The slope of a method along an axis, and by how much it is above that of `jax.grad`."""
    mine, base = (slope(axis.over, line(axis, one, unit, kept)) for one in (method, GRAD))
    return mine, mine - base


def table(axis: Axis, kept: Mapping[str, Figures]) -> Table:
    """The first and the last figures along an axis, and the slopes."""
    rows = []
    for method in METHODS:
        row: dict[str, Any] = {"method": method}
        for unit in UNITS:
            figures, (mine, above) = (f(axis, method, unit, kept) for f in (line, slopes))
            row |= {
                f"{unit} at {axis.over[0]}": figures[0],
                f"{unit} at {axis.over[-1]}": figures[-1],
            }
            row |= {f"slope of {unit}": _signed(mine), f"{unit}: less grad's": _signed(above)}
        if axis.grows == "devices":
            counts = [kept[size.key][method]["collectives"] for size in axis.sizes]
            row["collectives"] = f"{max(counts):.0f}"
        rows.append(row)
    note = DEVICES if axis == next(one for one in AXES if one.grows == "devices") else ""
    return Table(f"Growth with {axis.grows}, {axis.fixed}", note, rows)


def summary(kept: Mapping[str, Figures]) -> str:
    """How far the slopes lie from those of `jax.grad`, on one device."""
    parts = []
    for unit, what in (("s", "time"), ("MiB", "memory")):
        above = [
            (slopes(axis, method, unit, kept)[1], f"{method}, over {axis.grows}")
            for axis in AXES
            for method in METHODS
            if axis.grows != "devices" and method != GRAD
        ]
        ends = (f"{_signed(one)} ({name})" for one, name in (min(above), max(above)))
        parts.append(f"{' to '.join(ends)} of {what}")
    return f"Less those of `jax.grad`, the slopes on one device are {', and '.join(parts)}."


def _signed(number: float) -> str:
    """Two digits; what rounds to zero has no sign."""
    return f"{round(number, 2) + 0.0:.2f}"


def markdown(figures: Mapping[str, Any]) -> str:
    """The section of README.md that is made of what is kept."""
    kept, rounds = figures["sizes"], figures["repeats"]
    parts = [f"{figures['hardware']}; {rounds} round{'s' if rounds > 1 else ''}.\n", f"{INTRO}\n"]
    parts += [f"{summary(kept)}\n"]
    parts += [f"![Time and memory over each size]({PLOT.parent.name}/{PLOT.name})\n"]
    return "\n".join([*parts, *(table(axis, kept).markdown() for axis in AXES)])


def panels(kept: Mapping[str, Figures]) -> list[scaling_plot.Panel]:
    """What the plot draws: seconds above, MiB below."""
    return [
        scaling_plot.Panel(
            axis.fixed,
            axis.grows,
            unit,
            axis.over,
            {method: line(axis, method, unit, kept) for method in METHODS},
        )
        for unit in UNITS
        for axis in AXES
    ]


def main(argv: Sequence[str]) -> None:
    """Measure what is not kept yet, or one size in this process."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.scaling", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--again", action="store_true", help="measure what is kept too")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of measurements (5)")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        print(json.dumps(measured(Size(**args.one), args.repeats)))
        return
    figures = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else {}
    now = {"hardware": hardware(), "repeats": args.repeats}
    if args.again or any(figures.get(name) != value for name, value in now.items()):
        figures = now | {"sizes": {}}
    kept = figures["sizes"]
    for size in dict.fromkeys(size for axis in AXES for size in axis.sizes):
        if size.key not in kept:
            kept[size.key] = in_its_own_process(size, args.repeats)
            print(size.key, {name: one["seconds"] for name, one in kept[size.key].items()})
            KEPT.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    scaling_plot.draw(panels(kept), PLOT, columns=len(AXES))
    page.write(README, SECTION, markdown(figures))


if __name__ == "__main__":
    main(sys.argv[1:])
