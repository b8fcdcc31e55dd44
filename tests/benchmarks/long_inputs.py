"""Memory and time of long inputs, by form: `python -m tests.benchmarks.long_inputs`.

Each program runs in a process of its own, so that the most memory the process held is the
program's. `--write` puts the tables into README.md.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
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
from tests.benchmarks import clip_attention, lrp_models, streaming_forms
from tests.benchmarks.clip_attention import CLIPConfig
from tests.benchmarks.table import Cell, Table, hardware
from tests.benchmarks.timing import MIB

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- long inputs: begin -->", "<!-- long inputs: end -->"
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
than {MOST // 2**30} GiB is not run. Blocks have {BLOCK} queries. AttnLRP is `jaxrel.lrp`, whole or
with `block=`."""
MODELS = """\
CLIP has the vision tower of ViT-B/16 (4,097 tokens) and the text tower, both explained at once;
the decoder has 12 layers of width 512 with 8 heads that share 2 keys, and rotary positions. Both
are rematerialised; weights are random."""


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

    def measure(self, repeats: int) -> dict[str, float]:
        """Temporary memory in bytes, and if it is not too much seconds and the process's peak."""
        fun, arguments = self.build()
        compiled = jax.jit(fun).lower(*arguments).compile()
        analysis: Any = compiled.memory_analysis()
        found = {"temp": analysis.temp_size_in_bytes}
        if found["temp"] > MOST:
            return found
        reset_peak()
        seconds = []
        for _ in range(repeats):
            start = time.perf_counter()
            out = jax.block_until_ready(compiled(*arguments))
            seconds.append(time.perf_counter() - start)
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(out)), self
        return found | {"seconds": statistics.median(seconds)} | read_peak()


def reset_peak() -> None:
    """Let Linux begin anew to note the most memory that this process holds."""
    file = Path("/proc/self/clear_refs")
    if file.exists():
        file.write_text("5")


def read_peak() -> dict[str, float]:
    """The most memory that this process held, in bytes, where Linux says it."""
    file = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+) kB", file.read_text() if file.exists() else "")
    return {"peak": 1024 * float(found[1])} if found else {}


def programs(tokens: Sequence[int]) -> Iterator[Program]:
    """Those of the first table, by tokens."""
    for count in tokens:
        yield Program(VIT, count, "jax.grad", "")
        for form in ("stacked", "streaming", "blockwise"):
            yield from (Program(VIT, count, method, form) for method in METHODS)
        yield from (Program(VIT, count, "AttnLRP", form) for form in ("whole", "blockwise"))


def models() -> Iterator[Program]:
    """Those of the second table."""
    for network, tokens in ((CLIP, 4097), (DECODER, 8192)):
        yield from (Program(network, tokens, method, "blockwise") for method in METHODS)
    yield Program(DECODER, 8192, "AttnLRP", "blockwise")


def in_its_own_process(program: Program, repeats: int) -> dict[str, float]:
    """What a program measures of itself in a new process."""
    call = [sys.executable, "-m", __spec__.name, "--one", json.dumps(vars(program))]
    done = subprocess.run(
        [*call, "--repeats", str(repeats)], check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def row(program: Program, found: dict[str, float], base: dict[str, float]) -> dict[str, Cell]:
    """The figures of a program, and their ratios to those of `jax.grad`."""
    where: dict[str, Cell] = {"network": program.network}
    if program.network == VIT:
        where = {"tokens": str(program.tokens)}
    cells = where | {"method": f"{program.method} {program.form}".strip()}
    cells |= {"s": found.get("seconds"), "temp MiB": found["temp"] / MIB}
    cells |= {"peak MiB": found["peak"] / MIB if "peak" in found else None}
    if program.network == VIT:
        timed = "seconds" in found and "seconds" in base
        cells["x time"] = found["seconds"] / base["seconds"] if timed else None
        cells["x temp"] = found["temp"] / base["temp"]
    return cells


def tables(tokens: Sequence[int], repeats: int) -> Iterator[list[Table]]:
    """Both tables, after each program."""
    both = [
        Table("Models of long inputs", MODELS, []),
        Table("Forms by number of tokens", NOTE, []),
    ]
    base: dict[str, float] = {}
    for number, chosen in enumerate((models(), programs(tokens))):
        for program in chosen:
            found = in_its_own_process(program, repeats)
            base = found if program.method == "jax.grad" else base
            rows = [*both[number].rows, row(program, found, base)]
            both[number] = replace(both[number], rows=rows)
            print(rows[-1], flush=True)
            yield both


def write(text: str) -> None:
    """Put the tables between the marks in README.md."""
    page = README.read_text(encoding="utf-8")
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    README.write_text(f"{before}{BEGIN}\n\n{text}\n{END}{after}", encoding="utf-8")


def main(argv: Sequence[str]) -> None:
    """Measure all, or one program in this process."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.long_inputs", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--tokens", type=int, nargs="*", default=TOKENS)
    parser.add_argument("--repeats", type=int, default=1, help="runs, of which the median (1)")
    parser.add_argument("--write", action="store_true", help="write the tables to README.md")
    parser.add_argument("--one", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        print(json.dumps(Program(**args.one).measure(args.repeats)))
        return
    busy: list[float] = []
    for both in tables(args.tokens, args.repeats):
        busy.append(os.getloadavg()[0])
        load = (
            f"The machine's load was {min(busy):.1f} to {max(busy):.1f}, these programs included."
        )
        text = "\n".join([f"{hardware()}. {load}\n", *(one.markdown() for one in both)])
        if args.write:
            write(text)
    print(text)


if __name__ == "__main__":
    main(sys.argv[1:])
