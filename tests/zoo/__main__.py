"""Measure every model of the zoo and write the table: `python -m tests.zoo`."""

import argparse
import concurrent.futures
import multiprocessing
import sys
from pathlib import Path

from tests.benchmarks import page
from tests.benchmarks.table import hardware
from tests.zoo.packages import load
from tests.zoo.packages.table import markdown, read, row

README = Path(__file__).with_name("README.md")
SECTION = "zoo"


def main(argv: list[str]) -> None:
    """Measure the named models, or all, and put their rows into the README beside this file."""
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
    failed = [name for done, name in waiting.items() if done.exception()]
    write([done.result() for done in waiting if not done.exception()])
    sys.exit(f"not measured: {', '.join(failed)}" if failed else 0)


def write(rows: list[dict[str, str]]) -> None:
    """Put rows into the table, in the order of the exhibits; others of that order stay."""
    kept = read(page.read(README, SECTION))
    known = {(row["package"].split()[0], row["model"]): row for row in [*kept, *rows]}
    order = [(exhibit.package, exhibit.name) for exhibit in load().values()]
    text = markdown([known[key] for key in order if key in known])
    page.write(README, SECTION, f"{text}\n{hardware()}.")


if __name__ == "__main__":
    main(sys.argv[1:])
