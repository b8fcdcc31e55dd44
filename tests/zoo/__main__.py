"""Measure every model of the zoo and write the table: `python -m tests.zoo`."""

import argparse
import concurrent.futures
import multiprocessing
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
    parser.add_argument("--jobs", type=int, default=1, help="so many models at a time (1)")
    args = parser.parse_args(argv)
    for name in args.names:
        if name not in exhibits:
            parser.error(f"unknown model {name!r}; there are {', '.join(exhibits)}")
    context = multiprocessing.get_context("spawn")
    # Each model has a process of its own, which takes its programs with it.
    with concurrent.futures.ProcessPoolExecutor(args.jobs, context, max_tasks_per_child=1) as pool:
        waiting = {pool.submit(row, name): name for name in args.names or exhibits}
        for done in concurrent.futures.as_completed(waiting):
            print(done.exception() or done.result(), flush=True)
    rows = [done.result() for done in waiting]
    table = f"{markdown(rows)}\n{hardware()}.\n"
    if args.names:
        print(table)
        return
    before, rest = README.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    write_atomically(README, f"{before}{BEGIN}\n{table}\n{END}{after}".encode())


if __name__ == "__main__":
    main(sys.argv[1:])
