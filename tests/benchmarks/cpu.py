"""The tables under "Figures of a CPU": `python -m tests.benchmarks.cpu [NAME ...]`.

Each benchmark of `python -m tests.benchmarks` runs in a process of its own. Figures are kept in
cpu.json, and the tables in README.md are made of them. A later call measures what is missing or
was measured on another machine or other versions, or with `--again` all that is named.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.benchmarks import page
from tests.benchmarks.table import Table, hardware

README, KEPT = (Path(__file__).with_name(name) for name in ("README.md", "cpu.json"))
SECTION = "cpu figures"
# The rounds of each, so many that all take ten minutes on two cores.
ROUNDS = {
    "clip-8": 3,
    "clip-32": 2,
    "captioner-gridtd": 1,
    "captioner-aoa": 1,
    "batch-shapes": 1,
    "batch-vit": 1,
    "batch-whole": 1,
}


def in_its_own_process(name: str, repeats: int) -> Mapping[str, Any]:
    """The table of a benchmark, the machine, its load, the rounds, and how long all took."""
    load, start = os.getloadavg()[0], time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "figures.json"
        call = [sys.executable, "-m", "tests.benchmarks", name, "--repeats", str(repeats)]
        subprocess.run([*call, "--json", str(file)], check=True)
        found = json.loads(file.read_text(encoding="utf-8"))
    (table,) = found.pop("tables")
    return {**found, "load": load, "seconds": time.perf_counter() - start, "table": table}


def markdown(kept: Mapping[str, Any]) -> str:
    """The section of README.md that is made of what is kept."""
    return "\n".join(_shown(name, kept[name]) for name in ROUNDS if name in kept)


def _shown(name: str, one: Mapping[str, Any]) -> str:
    table = Table(**one["table"])
    rounds = f"{one['repeats']} round{'s' if one['repeats'] > 1 else ''}"
    said = f"`{name}`, {rounds}, {one['seconds']:.0f} s in all, with a load of {one['load']:.0f} "
    said += f"when it began; {one['hardware']}."
    return Table(table.title, f"{table.note}\n\n{said}", table.rows).markdown()


def main(argv: Sequence[str]) -> None:
    """Measure what is not kept yet, and write the tables."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.cpu", description=__doc__.splitlines()[0]
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(ROUNDS)}")
    parser.add_argument("--again", action="store_true", help="measure what is kept too")
    parser.add_argument("--repeats", type=int, help="rounds of each, in the place of its own")
    args = parser.parse_args(argv)
    for name in args.names:
        if name not in ROUNDS:
            parser.error(f"unknown benchmark {name!r}; there are {', '.join(ROUNDS)}")
    kept = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else {}
    machine = hardware()
    for name in args.names or ROUNDS:
        if args.again or kept.get(name, {}).get("hardware") != machine:
            kept[name] = in_its_own_process(name, args.repeats or ROUNDS[name])
            KEPT.write_text(json.dumps(kept, indent=2) + "\n", encoding="utf-8")
        page.write(README, SECTION, markdown(kept))


if __name__ == "__main__":
    main(sys.argv[1:])
