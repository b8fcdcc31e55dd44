"""`jaxrel batch INPUT --out FOLDER`: many inputs to a table."""

import argparse
import functools
import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxrel.cli import options as shared
from jaxrel.cli.explain import DEFAULT_MODELS, Asked, check_asked

EXAMPLES = """examples:
  jaxrel batch photos/ --text "a dog" --out results
  jaxrel batch questions.csv --question "what is red?" --method weighted,lrp --out results
  jaxrel batch captions_val2017.json --images val2017 --model openai/clip-vit-base-patch32 --out r
"""


def add(commands: Any) -> None:
    """Add the command."""
    batch = commands.add_parser(
        "batch",
        help="explain a folder or a table of inputs, and write a table",
        description="Explain every row of a folder of images, of a CSV, JSONL or Parquet file "
        "(columns id, image, text, target), or of a file of COCO captions, VQA v2 questions or "
        "Flickr30k, and write Parquet files to OUT. A job that was stopped goes on with the same "
        "command. An input that cannot be read is a row with its error.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    batch.add_argument("input", type=Path, help="a folder, or a .csv, .jsonl, .parquet or .json file")
    asked = batch.add_mutually_exclusive_group()
    asked.add_argument("--text", metavar="SENTENCE", help="compare images with this, where rows have none")
    asked.add_argument("--question", help="answer this, where rows have no question of their own")
    asked.add_argument("--caption", action="store_true", help="write captions, and explain each word")
    batch.add_argument("--model", help="a bundled model, a folder or a hub name (default: by what is asked)")
    batch.add_argument("--method", help="one or several, with commas, or 'all'")
    batch.add_argument("--layers", type=shared.numbers, help="layers that count, such as 0,1")
    batch.add_argument("--heads", type=shared.numbers, help="attention heads that count")
    batch.add_argument("--importance", default="grad_value", help="measure of the weighted method")
    rows = batch.add_argument_group("rows")
    rows.add_argument("--columns", type=_columns, default={}, metavar="image=FILE,text=CAPTION",
        help="the file's names of the columns id, image, text and target")
    rows.add_argument("--images", type=Path, help="the folder of the images that the file names")
    rows.add_argument("--strict", action="store_true", help="stop at an input that cannot be read")
    results = batch.add_argument_group("results")
    results.add_argument("--out", default=Path("out"), type=Path, help="output folder (default: out)")
    results.add_argument("--precision", choices=("float32", "float16"), default="float32",
        help="of the images' relevance in the files (default: float32)")
    results.add_argument("--shard-rows", type=_positive, default=1024,
        help="inputs per file; what is lost when the job is stopped (default: 1024)")
    results.add_argument("--save-images", metavar="every:100|ID,ID",
        help="draw every so manieth row, or these (default: none)")
    engine = batch.add_argument_group("engine")
    engine.add_argument("--batch-size", type=_positive, help="rows explained together (default: what fits)")
    engine.add_argument("--threads", type=_positive, default=2, help="threads that read ahead (default: 2)")
    engine.add_argument("--engine", choices=("embedded", "ray"), default="embedded",
        help="embedded: this process; ray: Ray Data (pip install 'jaxrel[ray]')")
    engine.add_argument("--ray-address", help="of a Ray cluster (default: Ray on this machine)")
    engine.add_argument("--actors", type=_positive, default=1, help="Ray actors (default: 1)")
    engine.add_argument("--num-cpus", type=float, help="CPUs of a Ray actor")
    engine.add_argument("--num-gpus", type=float, help="GPUs of a Ray actor")
    engine.add_argument("--resources", type=_resources, default={}, metavar="TPU=4",
        help="other resources of a Ray actor")
    batch.set_defaults(run=run)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number from 1, got {text!r}")
    return int(text)


def _pairs(text: str, what: str) -> dict[str, str]:
    pairs = dict(part.partition("=")[::2] for part in text.split(","))
    if not all(name and value for name, value in pairs.items()):
        raise argparse.ArgumentTypeError(f"expected {what}, got {text!r}")
    return pairs


def _columns(text: str) -> dict[str, str]:
    known = ("id", "image", "text", "target")
    pairs = _pairs(text, "image=NAME,text=NAME")
    for name in pairs:
        if name not in known:
            raise argparse.ArgumentTypeError(f"there is no column {name!r}; there are {', '.join(known)}")
    return pairs


def _resources(text: str) -> dict[str, float]:
    try:
        return {name: float(value) for name, value in _pairs(text, "NAME=NUMBER").items()}
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected NAME=NUMBER, got {text!r}") from None
