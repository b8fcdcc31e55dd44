"""What a first call costs before it computes: `python -m tests.benchmarks.compile_time`.

CPU seconds to trace, lower and compile relevance of deep unrolled networks, and as multiples of
`jax.grad`'s. Figures are kept in compile_time.json, and the table in README.md is made of them. A
later call measures what is missing, or with `--again` all.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from jaxrel import attention
from jaxrel.train.evaluate.flops import equations
from tests.benchmarks import lrp, lrp_models, page
from tests.benchmarks.table import Cell, Table, hardware
from tests.photographs.notebook import definitions

README, KEPT = (Path(__file__).with_name(name) for name in ("README.md", "compile_time.json"))
SECTION = "compile time"
BATCH = 4
REPEATS = 2
GRAD = "jax.grad"
STAGES = ("trace", "lower", "compile")

NOTE = f"""\
Published sizes, batch {BATCH}, all layers one after the other in the program. Figures are CPU
seconds of all threads together, the least of {REPEATS} rounds in turns, with JAX's caches cleared
before each and no compilation cache; multiples are of `jax.grad` in the same rounds. "Equations"
are those that JAX traces, what is called often counted once. "Load" is the machine's at the end."""

Figures = dict[str, float]
Program = tuple[Callable, tuple]


def efficientnet() -> Program:
    """EfficientNet-Lite0, as the notebook `photographs` has it, and the shapes of its arguments."""
    names = definitions()
    arrays: dict[str, tuple[int, ...]] = {}

    def add(conv: str, norm: str, *shape: int) -> None:
        arrays[f"{conv}.weight"] = shape
        for part in ("weight", "bias", "running_mean", "running_var"):
            arrays[f"{norm}.{part}"] = shape[-1:]

    add("_conv_stem", "_bn0", 3, 3, 3, 32)
    width, number = 32, 0
    for (count, size, _), out in zip(names["STAGES"], (16, 24, 40, 80, 112, 192, 320), strict=True):
        for _ in range(count):
            name, inner = f"_blocks.{number}", 6 * width if number else width
            if inner != width:
                add(f"{name}._expand_conv", f"{name}._bn0", 1, 1, width, inner)
            add(f"{name}._depthwise_conv", f"{name}._bn1", size, size, 1, inner)
            add(f"{name}._project_conv", f"{name}._bn2", 1, 1, inner, out)
            width, number = out, number + 1
    add("_conv_head", "_bn1", 1, 1, width, 1280)
    arrays |= {"_fc.weight": (1000, 1280), "_fc.bias": (1000,)}
    weights = {name: jax.ShapeDtypeStruct(shape, np.float32) for name, shape in arrays.items()}
    return names["network"], (weights, jax.ShapeDtypeStruct((BATCH, 224, 224, 3), np.float32))


def published(name: str, repeated: int = 1) -> Program:
    """One of `lrp_models`, its layers so many times, and the shapes of its arguments."""
    network = lrp_models.build(name, batch=BATCH, quick=False)
    params = dict(network.params)
    if repeated > 1:
        params["layers"] = params["layers"] * repeated
    return network.fun, jax.eval_shape(lambda *args: args, params, network.x)


CONVOLUTIONAL = ("epsilon_plus", "epsilon_gamma_box")
TRANSFORMER = ("attn_lrp", "attention, weighted")
NETWORKS = {
    "EfficientNet-Lite0": (efficientnet, CONVOLUTIONAL),
    "ResNet-50": (partial(published, "ResNet-50"), CONVOLUTIONAL),
    "ViT-B/16": (partial(published, "ViT-B/16"), TRANSFORMER),
    "ViT, 48 layers": (partial(published, "ViT-B/16", 4), TRANSFORMER),
}


def explained(fun: Callable, method: str) -> Callable:
    """What is compiled: a new function at every call."""
    classes = np.arange(BATCH)
    if method == GRAD:
        return lrp.grad(fun, classes)
    if method.startswith("attention"):
        score = lambda params, x: jnp.sum(fun(params, x)[:, 0:1], -1)
        return attention.relevance(score, method=method.split(", ")[1], argnums=1)
    return lrp.explain(fun, (lrp.CONVOLUTIONAL | lrp.TRANSFORMER)[method], classes)


def measured(network: str) -> dict[str, Figures]:
    """By method, CPU seconds of each stage, and equations."""
    make, methods = NETWORKS[network]
    fun, args = make()
    found: dict[str, Figures] = {}
    for _ in range(REPEATS):
        for method in (GRAD, *methods):
            seconds = stages(explained(fun, method), args)
            least = found.get(method, seconds)
            found[method] = {stage: min(seconds[stage], least[stage]) for stage in STAGES}
    for method, figures in found.items():
        figures |= {"equations": equations(explained(fun, method), *args)}
        figures |= {"load": os.getloadavg()[0]}
    return found


def stages(fun: Callable, args: tuple) -> Figures:
    """CPU seconds to trace, lower and compile."""
    jax.clear_caches()
    made: Any = jax.jit(fun)
    found = {}
    for stage, arguments in zip(STAGES, (args, (), ()), strict=True):
        start = time.process_time()
        made = getattr(made, stage)(*arguments)
        found[stage] = time.process_time() - start
    return found


def rows(kept: Mapping[str, Mapping[str, Figures]]) -> Iterator[dict[str, Cell]]:
    """A line for each network and method."""
    for network, methods in kept.items():
        base = methods[GRAD]
        for method, found in methods.items():
            cells: dict[str, Cell] = {"network": network, "method": method}
            for stage in STAGES:
                cells |= {f"{stage} s": found[stage], f"x {stage}": found[stage] / base[stage]}
            whole, other = (sum(one[stage] for stage in STAGES) for one in (found, base))
            cells |= {"x together": whole / other, "equations": f"{found['equations']:,.0f}"}
            yield cells | {"load": found["load"]}


def write(figures: Mapping[str, Any]) -> None:
    """Put the table of what is kept into README.md."""
    table = Table("Seconds and equations", NOTE, [*rows(figures["networks"])])
    page.write(README, SECTION, f"{figures['hardware']}.\n\n{table.markdown()}")


def main(argv: Sequence[str]) -> None:
    """Measure what is not kept yet, and write the table."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.compile_time", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--again", action="store_true", help="measure what is kept too")
    args = parser.parse_args(argv)
    jax.config.update("jax_enable_compilation_cache", False)
    machine = hardware()
    figures = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else {}
    if args.again or figures.get("hardware") != machine:
        figures = {"hardware": machine, "networks": {}}
    for network in NETWORKS:
        if network not in figures["networks"]:
            figures["networks"][network] = measured(network)
            KEPT.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
        write(figures)


if __name__ == "__main__":
    main(sys.argv[1:])
