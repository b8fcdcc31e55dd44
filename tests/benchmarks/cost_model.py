"""What CLIP's relevance might cost on other devices: `python -m tests.benchmarks.cost_model`.

A roofline: a program takes as long as its operations at the device's peak, or as its bytes at the
memory's bandwidth, whichever is longer. Both are XLA's counts, which are kept in cost_model.json;
nothing runs. The model is compared with what an H200 took, by the table in README.md.
"""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import jax

from jaxrel.train.evaluate.flops import counted
from tests.benchmarks import device, page
from tests.benchmarks.table import Table

README, KEPT = (Path(__file__).with_name(name) for name in ("README.md", "cost_model.json"))
SECTION = "cost model"
NETWORKS = ("ViT-B/32", "ViT-L/14")
METHODS = (device.BOTH, "streaming weighted", device.IMAGE, "AttnLRP")
DTYPE = "bfloat16"


@dataclass(frozen=True)
class Machine:
    """So many chips, each of dense bfloat16 operations and bytes of memory a second."""

    name: str
    chips: int
    flops: float
    bandwidth: float

    @property
    def balance(self) -> float:
        """The operations per byte above which operations bind, and below which bytes do."""
        return self.flops / self.bandwidth


# By the vendors' data sheets.
MEASURED = Machine("one H200", 1, 989e12, 4.8e12)
MODELLED = (Machine("v5e-8", 8, 197e12, 819e9), Machine("8 H100 SXM", 8, 989e12, 3.35e12))


@dataclass(frozen=True)
class Cost:
    """What one batch takes: examples, floating-point operations, and bytes read and written."""

    batch: int
    flops: float
    bytes: float

    def seconds(self, machine: Machine) -> float:
        """What one chip of a machine takes by the roofline."""
        return max(self.flops / machine.flops, self.bytes / machine.bandwidth)

    def rate(self, machine: Machine) -> float:
        """Examples a second on all chips, each with a batch of its own."""
        return machine.chips * self.batch / self.seconds(machine)


Costs = Mapping[str, Mapping[str, Cost]]


def costs() -> Costs:
    """By network and method."""
    found: dict[str, dict[str, Cost]] = {}
    for network in NETWORKS:
        piece = device.clip_piece(network, DTYPE)
        shapes = jax.eval_shape(piece.arguments)
        programs = {one.name: one.fun for one in piece.programs}
        found[network] = {one: _cost(piece.batch, programs[one], shapes) for one in METHODS}
    return found


def _cost(batch: int, fun, shapes: tuple) -> Cost:
    found = {}

    # The arrays of these sizes are not made: only their shapes are counted.
    def count(*args) -> None:
        found.update(counted(fun, *args))

    jax.eval_shape(count, *shapes)
    return Cost(batch, found["flops"], found["bytes accessed"])


def estimates(found: Costs, measured: Mapping[str, Mapping[str, float]]) -> list[dict]:
    """The rows of the table of estimates; see `markdown`."""
    rows = []
    for network, of_network in found.items():
        for method, cost in of_network.items():
            row: dict = {"network": network, "method": method, "batch": str(cost.batch)}
            row |= {"TFLOP": cost.flops / 1e12, "GB": cost.bytes / 1e9}
            row["FLOP per byte"] = cost.flops / cost.bytes
            ratio = measured[network][method] / cost.seconds(MEASURED)
            for machine in MODELLED:
                rate = cost.rate(machine)
                row[f"{machine.name}: images/s"] = rate
                row[f"{machine.name}: as on the H200"] = rate / ratio
            rows.append(row)
    return rows


def comparison(found: Costs, measured: Mapping[str, Mapping[str, float]]) -> list[dict]:
    """The rows of the table of what was measured; see `markdown`."""
    return [
        {
            "network": network,
            "method": method,
            "by FLOPs, ms": 1e3 * cost.flops / MEASURED.flops,
            "by bytes, ms": 1e3 * cost.bytes / MEASURED.bandwidth,
            "measured, ms": 1e3 * measured[network][method],
            "measured / model": measured[network][method] / cost.seconds(MEASURED),
        }
        for network, of_network in found.items()
        for method, cost in of_network.items()
    ]


def measured_seconds(text: str) -> dict[str, dict[str, float]]:
    """What the methods took on the H200, by the tables of a page."""
    tables = page.tables(text)
    return {
        network: {
            row["method"]: float(row["ms"]) / 1e3
            for row in tables[f"CLIP {network}, {DTYPE}"]
            if row["method"] in METHODS
        }
        for network in NETWORKS
    }


def markdown(found: Costs, text: str) -> str:
    """The section of README.md, from the costs and from the tables of that page."""
    measured = measured_seconds(text)
    checked = comparison(found, measured)
    ratios = [row["measured / model"] for row in checked]
    said = "; ".join(
        f"{one.name}: {one.chips} x {one.flops / 1e12:.0f} TFLOP/s and {one.bandwidth / 1e12:.3g} "
        f"TB/s, {one.balance:.0f} FLOP per byte"
        for one in (*MODELLED, MEASURED)
    )
    ahead = f"""\
CLIP in bfloat16 with random weights, sizes and methods as under "Figures of a GPU". By the model, a
batch takes the longer of FLOPs over the peak and bytes over the bandwidth, and each chip has a
batch of its own, with no exchange between chips. FLOPs and bytes are XLA's before it optimises,
each step of a scan counted: every operation reads and writes its arrays, so that fusion, which
saves bytes, makes a program faster than the model. Not modelled are launches, the host, and whether
a batch fits: 16 GB of a v5e chip are less than these batches take on the H200, and a smaller one
has nearly the same rate. Peaks: {said}.
"""
    against = f"""\
The model for the one device that was measured: the programs took {min(ratios):.2f} to \
{max(ratios):.2f} times what it says."""
    scaled = """\
Nothing here was measured. "As on the H200" is the rate over the ratio that the row has there."""
    parts = [
        Table("The model against an H200", against, checked),
        Table("A v5e-8 and a node of H100, by the model", scaled, estimates(found, measured)),
    ]
    return "\n".join([ahead, *(one.markdown() for one in parts)])


def read() -> Costs:
    """The costs that are kept."""
    kept = json.loads(KEPT.read_text(encoding="utf-8"))
    return {name: {one: Cost(**cost) for one, cost in of.items()} for name, of in kept.items()}


def main() -> None:
    """Count, keep the counts, and write the tables."""
    found = {name: {one: vars(cost) for one, cost in of.items()} for name, of in costs().items()}
    KEPT.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    page.write(README, SECTION, markdown(read(), README.read_text(encoding="utf-8")))


if __name__ == "__main__":
    sys.exit(main())
