"""Time and memory of several ways to compute a thing, measured side by side."""

import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from tqdm.auto import tqdm

MIB = 2**20


@dataclass(frozen=True)
class Candidate:
    """Something to time.

    Args:
      name: how the tables call it.
      run: computes it once, and returns when it is done.
      temp: bytes it needs beyond its arguments and results.
    """

    name: str
    run: Callable[[], Any]
    temp: int


@dataclass(frozen=True)
class Measured:
    """The seconds of each run, and the temporary memory in bytes."""

    seconds: tuple[float, ...]
    temp: int

    @property
    def milliseconds(self) -> float:
        """The median run."""
        return 1e3 * statistics.median(self.seconds)

    def slower(self, other: "Measured") -> float:
        """How many times the other's time this takes: the median over the rounds."""
        pairs = zip(self.seconds, other.seconds, strict=True)
        return statistics.median(mine / its for mine, its in pairs)

    def larger(self, other: "Measured") -> float:
        """How many times the other's temporary memory this needs."""
        return self.temp / other.temp


def compiled(name: str, fun: Callable, *args: Any) -> Candidate:
    """A JAX function, compiled ahead for these arguments."""
    return candidate(name, jax.jit(fun).lower(*args).compile(), *args)


def candidate(name: str, program: Any, *args: Any) -> Candidate:
    """A compiled program with its arguments; of several devices, the memory is that of each."""
    temp = program.memory_analysis().temp_size_in_bytes
    return Candidate(name, lambda: jax.block_until_ready(program(*args)), temp)


def measure(candidates: Sequence[Candidate], *, repeats: int, what: str) -> Mapping[str, Measured]:
    """Run every candidate once to warm up, then in turns.

    They take turns so that a machine that becomes slower or faster does so for all; ratios are
    of runs of the same round.

    Args:
      candidates: with names of their own.
      repeats: the number of rounds.
      what: the progress bar's label.

    Returns:
      By the candidates' names.
    """
    seconds: dict[str, list[float]] = {candidate.name: [] for candidate in candidates}
    with tqdm(total=(repeats + 1) * len(candidates), desc=what, leave=False) as bar:
        for warm in [False] + [True] * repeats:
            for candidate in candidates:
                start = time.perf_counter()
                candidate.run()
                if warm:
                    seconds[candidate.name].append(time.perf_counter() - start)
                bar.update()
    return {c.name: Measured(tuple(seconds[c.name]), c.temp) for c in candidates}


def reset_peak() -> None:
    """Let Linux begin anew to note the most memory that this process holds."""
    file = Path("/proc/self/clear_refs")
    if file.exists():
        file.write_text("5")


def read_peak() -> dict[str, float]:
    """The most memory that this process held, as `peak` in bytes, where Linux says it.

    Not `ru_maxrss`, which counts what the parent held when it started the process.
    """
    file = Path("/proc/self/status")
    found = re.search(r"VmHWM:\s*(\d+) kB", file.read_text() if file.exists() else "")
    return {"peak": 1024 * float(found[1])} if found else {}
