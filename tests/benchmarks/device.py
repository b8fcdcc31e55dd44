"""Figures of one accelerator: `python -m tests.benchmarks.device --out FOLDER`.

CLIP's towers (attention relevance, LRP, `jax.grad`) and relevance of 4k to 32k tokens. Each
table is written as soon as it is measured, to `device.json` and `device.md` in the folder; what
does not fit into the memory or the time is a row that says so. `device.sh` runs the tests first.
`--record FOLDER` writes a folder's tables into this folder's README.
"""

import argparse
import dataclasses
import gc
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax import numpy as jnp

from jaxrel import Composite, composites, lrp, op, path, rules
from jaxrel.models.clip import CLIP, CLIPConfig, TextConfig, VisionConfig
from jaxrel.train.evaluate.flops import flops, gradient
from tests.benchmarks import clip_attention, device_report, streaming_forms
from tests.benchmarks.table import Cell
from tests.benchmarks.timing import Candidate, Measured, measure

README = Path(__file__).with_name("README.md")
GIB, TERA = 2**30, 1e12
# Dense bfloat16 operations per second, by the vendor's data sheets; others are not known here.
PEAK = {"NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H200": 989e12}
REPEATS = 7
# Of one table's rounds; slow programs get fewer of them, but two.
MEASURING_SECONDS = 12.0
BLOCK = 256
METHODS = ("equal", "weighted")

MODELS = {
    "ViT-B/32": (CLIPConfig(), 256),
    "ViT-L/14": (
        CLIPConfig(
            vision=VisionConfig(width=1024, layers=24, heads=16, mlp_width=4096, patch_size=14),
            text=TextConfig(width=768, heads=12, mlp_width=3072),
            projection=768,
        ),
        64,
    ),
    "tiny": (clip_attention.TINY, 2),
}
COMPOSITES = {
    "AttnLRP": composites.attn_lrp(),
    "CP-LRP": composites.cp_lrp(),
    "epsilon": Composite([(op("conv", "dense", "add", "mean"), rules.Epsilon())])
    + composites.cp_lrp(),
    "gamma": Composite([(path("*/expand") | path("*/contract"), rules.Gamma(0.25))])
    + composites.cp_lrp(),
}
BOTH, IMAGE, TOKENS = "jax.grad, both towers", "jax.grad, image", "jax.grad"

# One of each kind, so that a rehearsal is short.
REHEARSED = (
    *(BOTH, "streaming weighted", "stacked weighted"),
    *(IMAGE, "AttnLRP", "gamma"),
    *(TOKENS, "blockwise weighted"),
)

CLIP_NOTE = """\
Scores of pairs of an image and a text, random weights. Attention relevance explains both towers,
and is held against the gradient by both towers' position embeddings; LRP explains the image's
pixels, and is held against the gradient by the image ("over" names it). FLOPs are XLA's before it
optimises, each step of a scan counted; utilisation is FLOPs over time over the device's dense
bfloat16 peak. Gamma stands on the MLPs, over CP-LRP; epsilon also splits sums, over CP-LRP. Memory
is XLA's: temporary, arguments and results."""
FORMS_NOTE = f"""\
A pre-norm transformer of {streaming_forms.LAYERS} layers, width {streaming_forms.WIDTH} and \
{streaming_forms.HEADS} heads, each layer rematerialised in one scan; one class is explained by the
row of token 0. `jax.grad` is of the same model by its input. Blockwise has {BLOCK} queries to a
block. Memory is XLA's: temporary, arguments and results."""
PRECISION = {
    "float32": " Products of float32 have XLA's default precision, which is TF32 on these GPUs."
}


@dataclasses.dataclass(frozen=True)
class Program:
    """Something to measure.

    Args:
      name: how the table calls it.
      fun: a function of the piece's arguments.
      over: the name of the program its ratios are over; its own for a baseline.
      least: bytes that it needs at least; where there are fewer it is not even compiled, for
        no compiler is made for arrays many times its device's memory.
    """

    name: str
    fun: Callable
    over: str
    least: int = 0


@dataclasses.dataclass(frozen=True)
class Piece:
    """One table: what is measured, side by side, on the same arguments.

    `arguments` makes them when the table's turn comes, so that they do not lie in the device's
    memory before; `unit` is what a batch has so many of; `counted` asks for FLOPs.
    """

    title: str
    note: str
    sizes: str
    dtype: str
    batch: int
    programs: Sequence[Program]
    arguments: Callable[[], tuple]
    unit: str = "examples"
    counted: bool = False


def clip_piece(name: str, dtype: str) -> Piece:
    """All methods of one CLIP model, in one dtype."""
    config, batch = MODELS[name]
    config = dataclasses.replace(config, dtype=dtype)
    programs = [Program("forward", lambda model, inputs: model.score(inputs), BOTH)]
    programs += [Program(BOTH, gradient, BOTH)]
    for form in ("streaming", "stacked"):
        explain = partial(clip_attention.explain, form=form)
        programs += [Program(f"{form} {method}", explain(method), BOTH) for method in METHODS]
    programs += [Program(IMAGE, _image_gradient, IMAGE)]
    programs += [Program(name, _image_lrp(c), IMAGE) for name, c in COMPOSITES.items()]

    def arguments() -> tuple:
        inputs = jax.device_put(clip_attention.random_inputs(config, batch))
        return CLIP(config, rngs=nnx.Rngs(0)), inputs

    vision, text = config.vision, config.text
    sizes = (
        f"Image tower: {vision.layers} layers, width {vision.width}, {vision.heads} heads, "
        f"{vision.tokens} tokens; text tower: {text.layers}, {text.width}, {text.heads}, "
        f"{text.context}; batch {batch}"
    )
    title = f"CLIP {name}, {dtype}"
    # They are the same in both dtypes, and utilisation is of the bfloat16 peak.
    counted = dtype == "bfloat16"
    return Piece(
        title,
        CLIP_NOTE + PRECISION.get(dtype, ""),
        sizes,
        dtype,
        batch,
        programs,
        arguments,
        "images",
        counted,
    )


def _image_score(model: CLIP, inputs: Mapping) -> Callable:
    return lambda image: model.score({**inputs, "image": image})


def _image_gradient(model: CLIP, inputs: Mapping) -> Any:
    score = _image_score(model, inputs)
    return jax.grad(lambda image: score(image).sum())(inputs["image"])


def _image_lrp(composite: Composite) -> Callable:
    def explained(model: CLIP, inputs: Mapping) -> Any:
        def score(model: CLIP, image: Any) -> Any:
            return _image_score(model, inputs)(image)

        return lrp(score, composite, argnums=1)(model, inputs["image"])

    return explained


def forms_piece(tokens: int, dtype: str) -> Piece:
    """All forms of attention relevance at one number of tokens."""
    # A layer's map and its gradient; stacked, those of all layers.
    maps = 2 * streaming_forms.HEADS * tokens**2 * jnp.dtype(dtype).itemsize
    least = {"streaming": maps, "stacked": streaming_forms.LAYERS * maps}
    blockwise = partial(streaming_forms.explain, form="blockwise", block=BLOCK)
    programs = [Program(TOKENS, streaming_forms.grad, TOKENS, maps)]
    programs += [Program(f"blockwise {method}", blockwise(method), TOKENS) for method in METHODS]
    for form, size in least.items():
        explain = partial(streaming_forms.explain, form=form)
        programs += [Program(f"{form} {m}", explain(m), TOKENS, size) for m in METHODS]

    def arguments() -> tuple:
        weights = streaming_forms.random_weights(jax.random.key(0))
        x = jax.random.normal(jax.random.key(1), (1, tokens, streaming_forms.WIDTH))
        return jax.tree.map(lambda leaf: leaf.astype(dtype), (weights, x))

    sizes = f"{tokens} tokens, batch 1"
    note = FORMS_NOTE + PRECISION.get(dtype, "")
    return Piece(f"{tokens} tokens, {dtype}", note, sizes, dtype, 1, programs, arguments)


def pieces(rehearse: bool) -> Iterator[Piece]:
    """The tables, what is wanted most first."""
    if rehearse:
        for piece in (clip_piece("tiny", "bfloat16"), forms_piece(64, "float32")):
            some = [one for one in piece.programs if one.name in REHEARSED]
            yield dataclasses.replace(piece, programs=some)
        return
    for name in ("ViT-B/32", "ViT-L/14"):
        yield clip_piece(name, "bfloat16")
    for tokens in (4096, 8192, 16384, 32768):
        yield forms_piece(tokens, "float32")
    for name in ("ViT-B/32", "ViT-L/14"):
        yield clip_piece(name, "float32")
    for tokens in (32768, 16384, 8192, 4096):
        yield forms_piece(tokens, "bfloat16")


@dataclasses.dataclass(frozen=True)
class Ready:
    """A program that is compiled: its memory in bytes, and how to run it once."""

    run: Callable[[], Any]
    memory: int
    seconds: float


def build(piece: Piece, args: tuple, limit: float) -> dict[str, Ready | str]:
    """Compile a piece's programs beside each other; a text stands for one that cannot be."""
    leaves, tree = jax.tree.flatten(args)

    def flat(fun: Callable) -> Callable:
        # A call of the compiled program flattens nothing: small programs are timed too.
        return lambda *leaves: fun(*jax.tree.unflatten(tree, leaves))

    def compiled(lowered: Any) -> Ready:
        start = time.perf_counter()
        program = lowered.compile()
        sizes = program.memory_analysis()
        memory = (
            sizes.temp_size_in_bytes + sizes.argument_size_in_bytes + sizes.output_size_in_bytes
        )
        run = lambda: jax.block_until_ready(program(*leaves))
        return Ready(run, memory, time.perf_counter() - start)

    found: dict[str, Any] = {}
    with ThreadPoolExecutor(max_workers=8) as pool:
        for program in piece.programs:
            if program.least > limit:
                found[program.name] = too_large(program.least)
                continue
            lowered = attempt(lambda fun=program.fun: jax.jit(flat(fun)).lower(*leaves))
            failed = isinstance(lowered, str)
            found[program.name] = lowered if failed else pool.submit(attempt, compiled, lowered)
        return {name: x if isinstance(x, str) else x.result() for name, x in found.items()}


def attempt(fun: Callable, *args: Any) -> Any:
    """What a function returns, or what went wrong, as the text of a cell."""
    try:
        return fun(*args)
    except Exception as error:  # a row that fails must not take the table with it
        text = str(error).strip()
        if "RESOURCE_EXHAUSTED" in text or "out of memory" in text.lower():
            return "out of memory"
        return f"failed: {type(error).__name__}: {text.splitlines()[0] if text else ''}"[:200]


def usable(ready: Mapping[str, Ready | str], limit: float) -> dict[str, Ready | str]:
    """Run each program once; what needs more than `limit` bytes is not tried."""
    found: dict[str, Ready | str] = {}
    for name, program in ready.items():
        if isinstance(program, str):
            found[name] = program
        elif program.memory > limit:
            found[name] = too_large(program.memory)
        else:
            start = time.perf_counter()
            failed = attempt(lambda run=program.run: (run(), None)[1])
            seconds = time.perf_counter() - start
            found[name] = failed or dataclasses.replace(program, seconds=seconds)
    return found


def too_large(needed: int) -> str:
    """The state of a program that needs more bytes than there are."""
    return f"out of memory: needs {needed / GIB:.1f} GiB"


def memory_stats() -> Mapping[str, int]:
    """What the device says of its memory; a CPU says nothing."""
    return jax.devices()[0].memory_stats() or {}


def take_turns(found: Mapping[str, Ready | str], what: str) -> Mapping[str, Measured]:
    """Time the programs that run, in turns, as many rounds as their time allows."""
    running = {name: one for name, one in found.items() if isinstance(one, Ready)}
    if not running:
        return {}
    once = sum(one.seconds for one in running.values())
    repeats = max(2, min(REPEATS, int(MEASURING_SECONDS / once)))
    candidates = [Candidate(name, one.run, one.memory) for name, one in running.items()]
    return measure(candidates, repeats=repeats, what=what)


def run(piece: Piece, say: Callable[[str], None]) -> list[dict[str, Cell]]:
    """The rows of one table."""
    limit = memory_stats().get("bytes_limit", math.inf)
    args = piece.arguments()
    ready = build(piece, args, limit)
    say(f"{piece.title}: compiled")
    found = usable(ready, limit)
    measured = attempt(take_turns, found, piece.title)
    if isinstance(measured, str):
        found, measured = dict.fromkeys(found, measured), {}
    say(f"{piece.title}: timed")
    counts = {}
    if piece.counted:
        for program in piece.programs:
            count = attempt(flops, program.fun, *args)
            if isinstance(count, str):
                say(f"{piece.title}: {program.name}: FLOPs not counted: {count}")
            else:
                counts[program.name] = count
        say(f"{piece.title}: FLOPs counted")
    return [row(piece, program, found, measured, counts) for program in piece.programs]


def row(
    piece: Piece,
    program: Program,
    found: Mapping[str, Ready | str],
    measured: Mapping[str, Measured],
    counts: Mapping[str, float],
) -> dict[str, Cell]:
    """One program's figures, and what they were measured on."""
    name, over = program.name, program.over
    kind = jax.devices()[0].device_kind
    cells: dict[str, Cell] = {"method": name, "dtype": piece.dtype, "batch": piece.batch}
    cells |= {"sizes": piece.sizes, "device": kind, "jax": jax.__version__}
    if name not in measured:
        return cells | {"state": str(found[name])}
    this = measured[name]
    cells |= {"ms": this.milliseconds, f"{piece.unit}/s": 1e3 * piece.batch / this.milliseconds}
    cells |= {"GiB": this.temp / GIB, "rounds": len(this.seconds)}
    if over in measured:
        base = measured[over]
        cells |= {"over": over, "x time": this.slower(base), "x memory": this.larger(base)}
    if name in counts:
        cells["TFLOP"] = counts[name] / TERA
        if over in counts:
            cells["x FLOPs"] = counts[name] / counts[over]
        if kind in PEAK:
            rate = counts[name] / (this.milliseconds / 1e3)
            cells["utilisation"] = f"{100 * rate / PEAK[kind]:.1f} %"
    return cells | {"state": ""}


def measure_all(folder: Path, *, rehearse: bool, seconds: float) -> bool:
    """Measure every table there is time for, and write each at once.

    Args:
      folder: where the files go; `suites.xml` in it becomes the first table.
      rehearse: tiny sizes, to see that it works.
      seconds: what all may take; a table that would not fit in what is left is skipped.

    Returns:
      Whether all went well: a row that is out of memory did, one that failed did not.
    """
    start, longest, good = time.perf_counter(), 0.0, True
    elapsed = lambda: time.perf_counter() - start
    say = lambda text: print(f"{elapsed():7.1f} s  {text}", flush=True)
    figures: dict[str, Any] = {"environment": device_report.environment(), "tables": []}

    def add(title: str, note: str, rows: Sequence[Mapping]) -> None:
        figures["tables"].append({"title": title, "note": note, "rows": list(rows)})
        figures["peak_bytes_in_use"] = memory_stats().get("peak_bytes_in_use")
        device_report.write(folder, figures)

    suites = attempt(device_report.suites_table, folder / device_report.SUITES)
    if isinstance(suites, str):
        say(f"test suites: {suites}")
    elif suites is not None:
        add(suites.title, suites.note, suites.rows)
    say(f"{figures['environment']['device']}; jax {jax.__version__}")
    for piece in pieces(rehearse):
        begun, left = elapsed(), seconds - elapsed()
        if left < 1.3 * longest:
            state = f"skipped: {max(left, 0):.0f} s were left of {seconds:.0f}"
            say(f"{piece.title}: {state}")
            cells = {"method": "all", "dtype": piece.dtype, "sizes": piece.sizes, "state": state}
            add(piece.title, piece.note, [cells])
            continue
        rows = attempt(run, piece, say)
        if isinstance(rows, str):
            rows = [{"method": "all", "dtype": piece.dtype, "sizes": piece.sizes, "state": rows}]
        good = good and not any(str(one["state"]).startswith("failed") for one in rows)
        add(piece.title, piece.note, rows)
        jax.clear_caches()
        gc.collect()
        longest = max(longest, elapsed() - begun)
        say(f"{piece.title}: written")
    return good


def main(argv: Sequence[str]) -> int:
    """Measure, or record what was measured; the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.device", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--out", type=Path, default=Path("out/device"), metavar="FOLDER")
    parser.add_argument("--rehearse", action="store_true", help="tiny sizes, to see that it works")
    parser.add_argument("--seconds", type=float, default=300, help="time for all tables (300)")
    parser.add_argument("--record", type=Path, metavar="FOLDER", help="write its tables to README")
    args = parser.parse_args(argv)
    if args.record:
        device_report.record(args.record, README)
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    if args.rehearse:
        jax.config.update("jax_disable_most_optimizations", True)
    return int(not measure_all(args.out, rehearse=args.rehearse, seconds=args.seconds))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
