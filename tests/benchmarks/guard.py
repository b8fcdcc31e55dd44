"""What ten programs cost, kept in `costs.json`: `python -m tests.benchmarks.guard`.

Floating-point operations and bytes are XLA's counts of a program before it optimises; equations
are those that JAX traces, in the place of the seconds that tracing takes. None depends on the
machine. A program that costs more than is kept by 5 % fails, by its name;
`--write` keeps what all cost now.
"""

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import numpy as np
from flax import nnx

from jaxrel.train.evaluate.flops import counted, equations
from tests.benchmarks import clip_attention, lrp, lrp_models

KEPT = Path(__file__).with_name("costs.json")
MOST = 1.05
BATCH = 4
CHOSEN = {
    "VGG16": ("epsilon", "epsilon_gamma_box"),
    "ResNet-50": ("epsilon", "epsilon_plus", "epsilon_gamma_box", "epsilon_alpha2_beta1"),
    "ViT-B/16": ("attn_lrp",),
    "12-layer decoder": ("attn_lrp", "cp_lrp"),
}

Costs = Mapping[str, Mapping[str, float]]


def programs() -> Iterator[tuple[str, Callable, tuple]]:
    """The name of each program, what it computes, and its arguments."""
    for name, composites in CHOSEN.items():
        network = lrp_models.build(name, batch=BATCH, quick=False)
        for composite in composites:
            rules = (lrp.CONVOLUTIONAL | lrp.TRANSFORMER)[composite]
            explained = lrp.explain(network.fun, rules, np.arange(BATCH))
            yield f"{name}, {composite}", explained, (network.params, network.x)
    model = clip_attention.CLIP(clip_attention.TINY, rngs=nnx.Rngs(0))
    inputs = clip_attention.random_inputs(clip_attention.TINY, BATCH)
    streaming = clip_attention.explain("weighted", "streaming")
    yield "tiny CLIP, weighted streaming", streaming, (model, inputs)


def measured() -> Costs:
    """What each program costs."""
    found = {}
    for name, fun, args in programs():
        costs = counted(fun, *args)
        one = found[name] = {"flops": costs["flops"], "bytes": costs["bytes accessed"]}
        one |= {"equations": equations(fun, *args)}
        print(f"{name}: {', '.join(f'{cost:.4g} {what}' for what, cost in one.items())}")
    return found


def risen(found: Costs, kept: Costs) -> list[str]:
    """A line for each cost that has risen, and for each program that is in one place alone."""
    lines = [f"{name}: in one of the two alone" for name in sorted(found.keys() ^ kept.keys())]
    for name in sorted(found.keys() & kept.keys()):
        for what, cost in found[name].items():
            ratio = cost / kept[name][what]
            if ratio > MOST:
                lines.append(f"{name}: {ratio:.3f} times the {what} that are kept")
    return lines


def main(argv: list[str]) -> int:
    """Compare with what is kept, or keep what is found."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.guard", description=__doc__)
    parser.add_argument("--write", action="store_true", help=f"write {KEPT.name} anew")
    args = parser.parse_args(argv)
    found = measured()
    if args.write:
        KEPT.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        return 0
    lines = risen(found, json.loads(KEPT.read_text(encoding="utf-8")))
    print("\n".join(lines) or f"none costs more than {MOST} times what is kept")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
