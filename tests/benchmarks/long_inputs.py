"""Memory and time of long inputs, by form: `python -m tests.benchmarks.long_inputs`.

Each program runs in a process of its own, so that the most memory the process held is the
program's. Figures are kept in long_inputs.json, and the tables in README.md are made of them. A
later call measures what is missing, or with `--again` all.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

import jaxrel
from jaxrel import attention
from jaxrel.attention.unimodal_relevance import BLOCK
from tests.benchmarks import clip_attention, lrp_models, page, streaming_forms
from tests.benchmarks.clip_attention import CLIPConfig
from tests.benchmarks.table import Cell, Table, hardware
from tests.benchmarks.timing import MIB, read_peak, reset_peak

README, KEPT = (Path(__file__).with_name(name) for name in ("README.md", "long_inputs.json"))
SECTION = "long inputs"
TOKENS = (257, 1025, 4097, 8193)
METHODS = ("equal", "weighted")
# A program that needs more than this is not run.
MOST = 12 * 2**30

VIT, CLIP, DECODER = "ViT", "CLIP ViT-B/16, 1,024 pixels", "decoder, 8,192 tokens"

NOTE = f"""\
A pre-norm transformer of {streaming_forms.LAYERS} layers, width {streaming_forms.WIDTH} and
{streaming_forms.HEADS} heads, each layer rematerialised in one scan, one example. "Temp" is XLA's
temporary memory, "peak" the most that the process held while the program ran, with JAX, weights
and arguments. Ratios are to `jax.grad` of the same tokens. A program whose temporary memory is more
than {MOST // 2**30} GiB is not run, and a dash is a figure that was not measured. "CPU s" are the
seconds of all cores together, which the machine's load (of all that ran at the start) changes
less than the seconds that went by. Blocks have {BLOCK} queries. AttnLRP is `jaxrel.lrp`, whole or
with `block=`."""
MODELS = """\
CLIP has the vision tower of ViT-B/16 (4,097 tokens) and the text tower, both explained at once;
the decoder has 12 layers of width 512 with 8 heads that share 2 keys, and rotary positions. Both
are rematerialised; weights are random."""


Figures = dict[str, float]


@dataclass(frozen=True)
class Program:
    """One program: a network, its number of tokens, a method and a form."""

    network: str
    tokens: int
    method: str
    form: str

    def build(self) -> tuple[Callable, tuple]:
        """What it computes, and its arguments."""
        if self.network == CLIP:
            config = CLIPConfig()
            vision = replace(config.vision, image_size=1024, patch_size=16)
            config = replace(config, vision=vision, remat=True)
            model = clip_attention.CLIP(config, rngs=nnx.Rngs(0))
            inputs = clip_attention.random_inputs(config, 1)
            return clip_attention.explain(self.method, self.form), (model, inputs)
        if self.network == DECODER:
            rng = np.random.default_rng(0)
            network = lrp_models.decoder(rng, 1, False)
            x = lrp_models.noise(rng, 1, self.tokens, network.x.shape[-1])
            score, token = lambda params, x: network.remat(params, x)[:, 0], -1
            arguments = (network.params, x)
        else:
            weights = streaming_forms.random_weights(jax.random.key(0))
            x = jax.random.normal(jax.random.key(1), (1, self.tokens, streaming_forms.WIDTH))
            score, token, arguments = streaming_forms.score, 0, (weights, x)
        if self.method == "jax.grad":
            return streaming_forms.grad, arguments
        if self.method == "AttnLRP":
            block = BLOCK if self.form == "blockwise" else None
            rules = jaxrel.composites.attn_lrp()
            return jaxrel.lrp(score, rules, argnums=1, block=block), arguments
        explain = partial(attention.relevance, score, argnums=1, target_token=token)
        return explain(method=self.method, form=self.form), arguments

    @property
    def key(self) -> str:
        """What its figures are kept under."""
        return f"{self.network}, {self.tokens} tokens, {self.method} {self.form}".strip()

    def measure(self, run: bool) -> Figures:
        """Temporary memory in bytes; of a run also seconds, all cores' seconds and the peak."""
        fun, arguments = self.build()
        compiled = jax.jit(fun).lower(*arguments).compile()
        analysis: Any = compiled.memory_analysis()
        found = {"temp": analysis.temp_size_in_bytes}
        if not run or found["temp"] > MOST:
            return found
        reset_peak()
        load, start, cpu = os.getloadavg()[0], time.perf_counter(), time.process_time()
        out = jax.block_until_ready(compiled(*arguments))
        found |= {"seconds": time.perf_counter() - start, "cpu": time.process_time() - cpu}
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(out)), self
        return found | {"load": load} | read_peak()


def programs() -> Iterator[Program]:
    """Those of the first table, by tokens."""
    for count in TOKENS:
        yield Program(VIT, count, "jax.grad", "")
        for form in ("stacked", "streaming", "blockwise"):
            yield from (Program(VIT, count, method, form) for method in METHODS)
        yield from (Program(VIT, count, "AttnLRP", form) for form in ("whole", "blockwise"))


def models() -> Iterator[Program]:
    """Those of the second table."""
    for network, tokens in ((CLIP, 4097), (DECODER, 8192)):
        yield from (Program(network, tokens, method, "blockwise") for method in METHODS)
    yield Program(DECODER, 8192, "AttnLRP", "blockwise")


def in_its_own_process(program: Program, run: bool) -> Figures:
    """What a program measures of itself in a new process."""
    call = [sys.executable, "-m", __spec__.name, "--one", json.dumps(vars(program))]
    call += [] if run else ["--compile"]
    done = subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def row(program: Program, kept: Mapping[str, Figures]) -> dict[str, Cell]:
    """The figures of a program, and their ratios to those of `jax.grad`."""
    found = kept.get(program.key, {})
    base = kept.get(replace(program, method="jax.grad", form="").key, {})
    where: dict[str, Cell] = {"network": program.network}
    if program.network == VIT:
        where = {"tokens": str(program.tokens)}
    mib = {name: found[name] / MIB if name in found else None for name in ("temp", "peak")}
    cells = where | {"method": f"{program.method} {program.form}".strip()}
    cells |= {"temp MiB": mib["temp"]}
    if program.network == VIT:
        cells["x temp"] = found["temp"] / base["temp"] if "temp" in found and base else None
    cells |= {"peak MiB": mib["peak"], "s": found.get("seconds"), "CPU s": found.get("cpu")}
    if program.network == VIT:
        timed = "cpu" in found and "cpu" in base
        cells["x CPU s"] = found["cpu"] / base["cpu"] if timed else None
    return cells | {"load": found.get("load")}


def markdown(figures: Mapping[str, Any]) -> str:
    """The section of README.md that is made of what is kept."""
    kept = figures["programs"]
    tables = [
        Table("Forms by number of tokens", NOTE, [row(one, kept) for one in programs()]),
        Table("Models of long inputs", MODELS, [row(one, kept) for one in models()]),
    ]
    return "\n".join([f"{figures['hardware']}.\n", *(one.markdown() for one in tables)])


def main(argv: Sequence[str]) -> None:
    """Measure what is not kept yet, or one program in this process."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.long_inputs", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--again", action="store_true", help="measure what is kept too")
    parser.add_argument("--seconds", type=float, default=7200, help="later, compile only (7200)")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--compile", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        print(json.dumps(Program(**args.one).measure(not args.compile)))
        return
    start, machine = time.perf_counter(), hardware()
    figures = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else {}
    if args.again or figures.get("hardware") != machine:
        figures = {"hardware": machine, "programs": {}}
    kept = figures["programs"]
    # The models first among those of as many tokens.
    every = sorted([*models(), *programs()], key=lambda one: (one.tokens, one.network == VIT))
    for program in every:
        known = kept.get(program.key, {})
        run = time.perf_counter() - start < args.seconds
        if "seconds" in known or known.get("temp", 0) > MOST or (known and not run):
            continue
        kept[program.key] = in_its_own_process(program, run)
        print(program.key, kept[program.key], flush=True)
        KEPT.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    page.write(README, SECTION, markdown(figures))


if __name__ == "__main__":
    main(sys.argv[1:])
