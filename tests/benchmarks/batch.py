"""Many inputs: images a second of every way to explain them, over a bare gradient.

Each way runs in a process of its own (`python -m tests.benchmarks.batch WAY MODEL IMAGES`), whose
peak memory is measured with it.
"""

import importlib.util
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from PIL import Image
from tqdm.auto import tqdm

import jaxrel
from jaxrel import cli
from jaxrel.batch import Explainer
from jaxrel.models import CLIP, CLIPConfig, Processor, TextConfig, image_processing, word_tokenizer
from jaxrel.train.data.shapes import Shapes
from tests.benchmarks.table import Table
from tests.benchmarks.timing import MIB, read_peak

BATCH = 32
TEXT = "a red circle"
WAYS = {
    "gradient": "`jax.grad` alone, of prepared batches",
    "one": "`jaxrel.explain`, one by one",
    "list": "`jaxrel.explain(..., batch_size=32)`",
    "explainer": "`Explainer`",
    "embedded": "`jaxrel batch`",
    "ray": "`jaxrel batch --engine ray`",
}
# The command line as it is, and then the most memory that it held.
AND_PEAK = """\
import json, sys
from jaxrel import cli
from tests.benchmarks.timing import read_peak
status = cli.main(sys.argv[1:])
print(json.dumps(read_peak()))
sys.exit(status)
"""
NOTE = """\
{images} images of {side} x {side} pixels with one sentence, method weighted. The gradient is of the
summed score by the position embeddings of both towers. Time is from images (of `jaxrel batch`, from
files) to results, after a first batch that compiles; of Ray from the start, its own included.
Busy is the share of the time in which the compiled program runs. Memory is the most that
the process held. Target: busy 90% of the time."""
WHOLE = """\
`jaxrel batch images --text "{text}" --method weighted --out out` by the bundled CLIP, on images of
Shapes, from the start of the process to its end. "Peak memory" is the most that the process held,
"results" what it wrote."""


def run(model: str, *, images: int, quick: bool, repeats: int) -> Table:
    """All ways for one model.

    Args:
      model: "clip-shapes" or "ViT-B/32", which has random weights.
      images: how many.
      quick: few, only to see that it works.
      repeats: rounds of measurements; the best counts.
    """
    images = 2 * BATCH if quick else images
    ways = [way for way in WAYS if way != "ray" or importlib.util.find_spec("ray")]
    found = {}
    with tempfile.TemporaryDirectory() as scratch:
        where = _model_folder(model, Path(scratch))
        side = CLIP.from_pretrained(where).config.vision.image_size
        for way in tqdm(ways):
            rounds = [_in_process(way, where, images) for _ in range(1 if quick else repeats)]
            found[way] = max(rounds, key=lambda one: one["per_second"])
    bare = found["gradient"]["per_second"]
    rows = [
        {
            "way": WAYS[way],
            "images/s": f"{one['per_second']:.1f}",
            "share of the gradient's": f"{one['per_second'] / bare:.2f}",
            "busy": f"{one['busy']:.0%}" if "busy" in one else "",
            "peak memory": _mib(one),
        }
        for way, one in found.items()
    ]
    return Table(f"Many inputs, {model}", NOTE.format(images=images, side=side), rows)


def run_whole(*, images: int, quick: bool, repeats: int) -> Table:
    """The command as a user starts it, on scenes in PNG files; the quickest round counts."""
    count = 2 * BATCH if quick else images
    shapes = Shapes()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "images").mkdir()
        for i in tqdm(range(count), desc="scenes"):
            Image.fromarray(shapes.scene("test", i).image).save(folder / "images" / f"{i}.png")
        rounds = [_whole(folder, folder / f"out-{i}") for i in range(repeats)]
    found = min(rounds, key=lambda one: one["seconds"])
    row = {
        "images": f"{count}",
        "s": found["seconds"],
        "images/s": count / found["seconds"],
        "peak memory": _mib(found),
        "results": f"{found['written'] / 1e6:.1f} MB",
    }
    return Table("`jaxrel batch`, the whole command", WHOLE.format(text=TEXT), [row])


def _mib(found: dict[str, float]) -> str | None:
    return f"{found['peak'] / MIB:.0f} MiB" if "peak" in found else None


def _whole(folder: Path, out: Path) -> dict[str, float]:
    asked = ["batch", str(folder / "images"), "--text", TEXT, "--method", "weighted"]
    start = time.perf_counter()
    call = [sys.executable, "-c", AND_PEAK, *asked, "--out", str(out)]
    done = subprocess.run(call, check=True, stdout=subprocess.PIPE, text=True)
    seconds = time.perf_counter() - start
    written = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    peak = json.loads(done.stdout.splitlines()[-1])
    return {"seconds": seconds, "written": written, **peak}


def _model_folder(model: str, scratch: Path) -> str:
    if model == "clip-shapes":
        return model
    words = word_tokenizer(TEXT.split(), 77)
    text = TextConfig(eos_token_id=words.eos_token_id)
    processor = Processor(words, image_processing(224))
    made = CLIP(CLIPConfig(text=text), rngs=nnx.Rngs(0), processor=processor)
    made.save_pretrained(scratch / "model", dtype="float16")
    return str(scratch / "model")


def _in_process(way: str, model: str, images: int) -> dict[str, float]:
    command = [sys.executable, "-m", "tests.benchmarks.batch", way, model, str(images)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _images(count: int, side: int) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (side, side, 3), np.uint8) for _ in range(count)]


def main(way: str, name: str, count: str) -> None:
    """Measure one way in this process, and print its figures as JSON."""
    images = int(count)
    if way in ("embedded", "ray"):
        found = _command(way, name, images)
    else:
        found = _function(way, CLIP.from_pretrained(name), images)
    children = 1024 * resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    held = {name: max(peak, children) for name, peak in read_peak().items()}
    print(json.dumps(found | held))


def _function(way: str, model: CLIP, count: int) -> dict[str, float]:
    seen = _images(count, model.config.vision.image_size)
    explainer = Explainer(model, batch_size=BATCH)

    def gradient(some: list) -> None:
        for _ in some[::BATCH]:
            jax.block_until_ready(grad(model, inputs))

    @jax.jit
    def grad(model: CLIP, inputs: dict) -> dict:
        split = nnx.split(model, lambda path, _: path[-1] == "position_embedding", ...)
        graph, position, rest = split
        return jax.grad(lambda p: nnx.merge(graph, p, rest).score(inputs).sum())(position)

    inputs = model.pairs(model.prepare(image=seen[:BATCH], text=TEXT))
    run = {
        "gradient": gradient,
        "one": lambda some: [jaxrel.explain(model, image=x, text=TEXT) for x in some],
        "list": lambda some: jaxrel.explain(model, image=some, text=TEXT, batch_size=BATCH),
        "explainer": lambda some: explainer({"image": some, "text": [TEXT] * len(some)}),
    }[way]
    run(seen[:BATCH])
    start = time.perf_counter()
    run(seen)
    return {"per_second": count / (time.perf_counter() - start)}


def _command(way: str, name: str, count: int) -> dict[str, float]:
    side = CLIP.from_pretrained(name).config.vision.image_size
    busy, first = [0.0], []
    whole = Explainer._explanations

    def timed(self, loaded):
        start = time.perf_counter()
        found = whole(self, loaded)
        if first:
            busy[0] += time.perf_counter() - start
        else:
            first.append(time.perf_counter())
        return found

    Explainer._explanations = timed  # only here: the engine runs as it is
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        (folder / "images").mkdir()
        for i, image in enumerate(_images(count, side)):
            Image.fromarray(image).save(folder / "images" / f"{i}.png", compress_level=1)
        asked = ["--text", TEXT, "--model", name, "--batch-size", str(BATCH), "--engine", way]
        command = ["batch", str(folder / "images"), *asked, "--out", str(folder / "out")]
        start = time.perf_counter()
        cli.main(command)
        end = time.perf_counter()
    if not first:  # the actors of Ray are other processes
        return {"per_second": count / (end - start)}
    return {
        "per_second": (count - BATCH) / (end - first[0]),
        "busy": busy[0] / (end - first[0]),
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
