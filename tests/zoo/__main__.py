"""Measure every model of the zoo and write the table: `python -m tests.zoo`."""

import argparse
import sys
from pathlib import Path

from jaxrel.files import write_atomically
from tests.benchmarks.table import hardware
from tests.zoo.packages import load
from tests.zoo.packages.table import markdown, row

README = Path(__file__).with_name("README.md")
BEGIN, END = "<!-- zoo: begin -->\n", "<!-- zoo: end -->\n"


def main(argv: list[str]) -> None:
    """Measure the named models, or all; the table of all goes into the README beside this file."""
    exhibits = load()
    parser = argparse.ArgumentParser(prog="python -m tests.zoo", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(exhibits)}")
    args = parser.parse_args(argv)
    for name in args.names:
        if name not in exhibits:
            parser.error(f"unknown model {name!r}; there are {', '.join(exhibits)}")
    rows = []
    for name in args.names or exhibits:
        rows.append(row(exhibits[name]))
        print(rows[-1], flush=True)
    table = f"{markdown(rows)}\n{hardware()}.\n"
    if args.names:
        print(table)
        return
    before, rest = README.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    write_atomically(README, f"{before}{BEGIN}\n{table}\n{END}{after}".encode())


main(sys.argv[1:])
