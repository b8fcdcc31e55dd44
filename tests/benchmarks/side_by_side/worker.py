"""A process that runs the candidates of one network in one framework, when it is told to.

JAX and torch run in processes of their own, so that neither's threads are in the other's way and
the most memory that a process holds is a candidate's.
"""

import ctypes
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from types import ModuleType
from typing import Any

import numpy as np

from tests.benchmarks.long_inputs import read_peak, reset_peak
from tests.benchmarks.side_by_side import networks, ours

Figures = dict[str, Any]
JAX, TORCH = "jax", "torch"
LONGEST = 60  # characters of an error


def serve(pipe: Connection, framework: str, name: str, tiny: bool) -> None:
    """Answer requests, (function, arguments), until the other end is closed."""
    worker = Worker(framework, networks.build(name, tiny))
    while True:
        try:
            function, *arguments = pipe.recv()
        except EOFError:
            return
        pipe.send(getattr(worker, function)(*arguments))


class Worker:
    """The candidates of a network, one method at a time."""

    def __init__(self, framework: str, network: networks.Network) -> None:
        self.side, self.network = side(framework), network
        self.prepare: dict[str, Callable] = {}
        self.runs: dict[str, Callable[[], Any]] = {}

    def begin(self, method: str) -> Sequence[str]:
        """The tools that have a method; those of the method before are let go."""
        self.runs.clear()
        self.prepare = self.side.candidates(self.network, method)
        return list(self.prepare)

    def first(self, tool: str) -> tuple[Figures, list[np.ndarray]]:
        """Prepare a tool and run it twice: what is known of it, its memory and its result.

        What it raises is in the place of these: a peer's error is a row of the table.
        """
        try:
            run, known = self.prepare[tool]()
            result = self.side.arrays(run())
            known |= {"peak": peak_of(run)}
        except Exception as error:
            said = " ".join(str(error).split())
            said = said if len(said) <= LONGEST else said[: LONGEST - 1] + "…"
            return {"error": f"{type(error).__name__}: {said}"}, []
        self.runs[tool] = run
        return known, result

    def seconds(self, tool: str) -> float:
        """Run a tool once more."""
        start = time.perf_counter()
        self.runs[tool]()
        return time.perf_counter() - start


def side(framework: str) -> ModuleType:
    """The candidates of a framework."""
    if framework == JAX:
        return ours
    from tests.benchmarks.side_by_side import peers

    return peers


def peak_of(run: Callable[[], Any]) -> float | None:
    """The most bytes that the process held in a run, beyond those that it held before.

    What the allocator keeps for later is given back before: it would be used, and not counted.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    reset_peak()
    before = read_peak().get("peak")
    run()
    return None if before is None else read_peak()["peak"] - before
