"""The same weights explained by jaxrel and by its peers: `python -m tests.benchmarks.side_by_side`.

Every candidate takes turns with the others of its network and method, and ratios are of runs of
the same round. Figures are kept in side_by_side.json, and the tables in README.md and the plot are
made of them. A later call measures what is missing, or with `--again NAME` a network, or a network
and a method, anew.
"""

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from tests.benchmarks.side_by_side import networks, page
from tests.benchmarks.side_by_side.networks import METHODS_OF, NETWORKS
from tests.benchmarks.side_by_side.worker import JAX, TORCH, Figures, serve
from tests.benchmarks.table import hardware

FOLDER = Path(__file__).parent.parent
PEERS = ("zennit", "lxt", "captum", "autolrp", "grad-cam")
# The threads of the framework that ran before are asleep after this.
PAUSE = 0.05

Ask = Callable[..., Any]


def main(argv: Sequence[str]) -> None:
    """Measure what is not kept yet, and write the tables and the plot."""
    args = parse(argv)
    start, kept_in, tools = time.perf_counter(), args.folder / page.KEPT, setting()
    figures = json.loads(kept_in.read_text(encoding="utf-8")) if kept_in.exists() else {}
    if {name: figures.get(name) for name in tools} != tools:
        figures = {**tools, "groups": {}}
    for network, methods in METHODS_OF.items():
        missing = [method for method in methods if wanted(args, figures["groups"], network, method)]
        if missing:
            for method, found in measure(network, missing, args):
                figures["groups"][key(network, method)] = found
                kept_in.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    page.write(args.folder, figures)
    print(f"{time.perf_counter() - start:.0f} s; wrote {args.folder / 'README.md'}")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.benchmarks.side_by_side", description=__doc__.splitlines()[0]
    )
    names = [*NETWORKS, *(key(n, m) for n, methods in METHODS_OF.items() for m in methods)]
    parser.add_argument("names", nargs="*", metavar="NAME", help="measure no other networks")
    parser.add_argument("--again", action="append", default=[], metavar="NAME", help="though kept")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to see that it works")
    parser.add_argument("--rounds", type=int, default=3, help="of measurements (3)")
    parser.add_argument("--folder", type=Path, help="where README.md is; of --tiny, to be given")
    args = parser.parse_args(argv)
    for name in args.names + args.again:
        if name not in names:
            parser.error(f"unknown name {name!r}; there are {'; '.join(names)}")
    if args.rounds < 1:
        parser.error(f"--rounds must be 1 or more, got {args.rounds}")
    if args.tiny and not args.folder:
        parser.error("--tiny needs --folder, since its figures are not for this README.md")
    args.folder = args.folder or FOLDER
    return args


def key(network: str, method: str) -> str:
    """What the figures of a network and a method are kept under."""
    return f"{network}: {method}"


def wanted(args: argparse.Namespace, kept: Mapping, network: str, method: str) -> bool:
    """Whether to measure a method of a network."""
    these = {network, key(network, method)}
    if args.names and not these & {*args.names}:
        return False
    return key(network, method) not in kept or bool(these & {*args.again})


def setting() -> dict[str, Any]:
    """The machine and the versions; with others, nothing that is kept can be compared."""
    versions = {}
    for peer in PEERS:
        try:
            versions[peer] = version(peer)
        except PackageNotFoundError:
            continue
    return {"hardware": hardware(), "versions": versions}


def measure(
    network: str, methods: Sequence[str], args: argparse.Namespace
) -> Iterator[tuple[str, Figures]]:
    """The figures of each method: those of every tool, and the number of examples."""
    frameworks = (JAX, TORCH) if find_spec("torch") else (JAX,)
    with workers(frameworks, network, args.tiny) as asks:
        for method in tqdm(methods, desc=network, leave=False):
            tools = [(name, tool) for name in asks for tool in asks[name]("begin", method)]
            found: dict[str, Figures] = {}
            results: dict[str, list[np.ndarray]] = {}
            for name, tool in tools:
                found[tool], results[tool] = asks[name]("first", tool)
            timed = [(name, tool) for name, tool in tools if "error" not in found[tool]]
            for _, tool in timed:
                found[tool]["seconds"] = []
            for _ in range(args.rounds):
                for name, tool in timed:
                    time.sleep(PAUSE)
                    found[tool]["seconds"].append(asks[name]("seconds", tool))
            for tool in found:
                found[tool] |= page.difference(tool, results)
            yield method, {"batch": networks.BATCH[network], "tools": found}


@contextmanager
def workers(frameworks: Sequence[str], network: str, tiny: bool) -> Iterator[dict[str, Ask]]:
    """A process for each framework, as a function that asks it and returns its answer."""
    context = multiprocessing.get_context("spawn")
    started = []
    try:
        asks: dict[str, Ask] = {}
        for framework in frameworks:
            mine, its = context.Pipe()
            process = context.Process(target=serve, args=(its, framework, network, tiny))
            process.start()
            its.close()
            started.append((process, mine))

            def ask(*request: Any, pipe: Any = mine) -> Any:
                pipe.send(request)
                return pipe.recv()

            asks[framework] = ask
        yield asks
    finally:
        for process, pipe in started:
            pipe.close()
            process.join()


if __name__ == "__main__":
    main(sys.argv[1:])
