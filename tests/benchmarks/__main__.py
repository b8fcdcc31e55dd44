"""Time and memory of relevance, as ratios in one run: `python -m tests.benchmarks`."""

import argparse
import dataclasses
import json
import sys
from functools import partial
from pathlib import Path

from tests.benchmarks import batch, captioner, clip_attention, streaming_forms
from tests.benchmarks.table import hardware

BENCHMARKS = {
    "clip-8": partial(clip_attention.run, batch=8),
    "clip-32": partial(clip_attention.run, batch=32),
    "forms-257": partial(streaming_forms.run, tokens=257, batch=4),
    "forms-1025": partial(streaming_forms.run, tokens=1025, batch=1),
    "captioner-gridtd": partial(captioner.run, "gridtd"),
    "captioner-aoa": partial(captioner.run, "aoa"),
    "batch-shapes": partial(batch.run, "clip-shapes", images=2000),
    "batch-vit": partial(batch.run, "ViT-B/32", images=128),
    "batch-whole": partial(batch.run_whole, images=10_000),
}


def main(argv: list[str]) -> None:
    """Run the named benchmarks and print their tables as Markdown."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(BENCHMARKS)}")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of measurements (5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures here")
    args = parser.parse_args(argv)
    for name in args.names:
        if name not in BENCHMARKS:
            parser.error(f"unknown benchmark {name!r}; there are {', '.join(BENCHMARKS)}")
    if args.repeats < 1:
        parser.error(f"--repeats must be 1 or more, got {args.repeats}")

    machine = hardware()
    print(f"{machine}\n")
    tables = []
    for name in args.names or BENCHMARKS:
        table = BENCHMARKS[name](quick=args.quick, repeats=args.repeats)
        print(table.markdown(), flush=True)
        tables.append(dataclasses.asdict(table))
    if args.json:
        figures = {"hardware": machine, "repeats": args.repeats, "tables": tables}
        args.json.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


main(sys.argv[1:])
