"""Parts of a program that repeat, such as equal layers: each is traced as one function, once.

JAX traces, differentiates, transposes and lowers a jitted function once for all its calls of equal
shapes, and XLA puts what is called in the place of the call. An unrolled network then costs little
more to trace than one of its layers, and the compiled program is the same.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import numpy as np

from jaxrel.tracing.graph import Atom, Node, Value, identity

# A repetition that spares fewer operations than this is no layer.
_LEAST = 8

Reads = Callable[[Node], Sequence[Atom]]


@dataclasses.dataclass(frozen=True)
class Part:
    """Nodes in order of execution, as a function of values that are made before them.

    Attributes:
      nodes: what is computed.
      ins: the values that it is computed of.
      outs: those of its values that are used after it, or after an equal part.
      key: equal for parts that are one function; None for one that is not repeated.
    """

    nodes: tuple[Node, ...]
    ins: tuple[Value, ...]
    outs: tuple[Value, ...]
    key: Any


def parts(
    nodes: Sequence[Node],
    reads: Reads,
    key_of: Callable[[Node], Any],
    costly: Collection[Node],
    kept: Collection[Value],
) -> list[Part]:
    """Cut a program into parts, of which many are one function.

    Args:
      nodes: in order of execution.
      reads: what a node is computed of.
      key_of: equal for nodes that are one function of what they read; None for a node without
        equals.
      costly: the nodes that are worth a function of their own.
      kept: values that are used after all nodes.
    """
    symbols = _symbols(nodes, reads, key_of)
    last: dict[Atom, int] = {atom: i for i, node in enumerate(nodes) for atom in reads(node)}
    last |= dict.fromkeys(kept, len(nodes))

    def form_of(start: int, stop: int) -> tuple[tuple, dict[Value, int]]:
        return wired(nodes[start:stop], symbols[start:stop].tolist(), reads)

    bounds = [*_bounds(nodes, symbols)]
    count = Counter(forms := [form_of(*bound)[0] for bound in bounds])
    # Of what is not repeated as a whole, single nodes may be.
    finer = [
        [(a, b)] if count[form] > 1 else [(i, i + 1) for i in range(a, b)]
        for (a, b), form in zip(bounds, forms, strict=True)
    ]
    bounds = [bound for several in finer for bound in several]
    found = [form_of(*bound) for bound in bounds]
    count = Counter(form for form, _ in found)
    used: dict[Any, set[int]] = {}
    for (_, stop), (form, place) in zip(bounds, found, strict=True):
        after = (number for value, number in place.items() if last.get(value, 0) >= stop)
        used.setdefault(form, set()).update(after)

    def part(start: int, stop: int, form: tuple, place: dict[Value, int]) -> Part:
        inside = tuple(nodes[start:stop])
        made = {out for node in inside for out in node.outs}
        ins = tuple(value for value in place if value not in made)
        outs = tuple(v for v, number in place.items() if v in made and number in used[form])
        worth = count[form] > 1 and (len(inside) > 1 or inside[0] in costly)
        return Part(inside, ins, outs, form if symbols[start] >= 0 and worth else None)

    return [part(*bound, *one) for bound, one in zip(bounds, found, strict=True)]


def wired(
    nodes: Sequence[Node], keys: Sequence[Any], reads: Reads, given: Sequence[Value] = ()
) -> tuple[tuple, dict[Value, int]]:
    """What programs have in common that are one function, and a number for each value.

    Args:
      nodes, reads: as in `parts`.
      keys: of the nodes.
      given: the values that come first.
    """
    place = {value: i for i, value in enumerate(given)}

    def number(atom: Atom) -> Any:
        return place.setdefault(atom, len(place)) if isinstance(atom, Value) else identity(atom)

    form = tuple(
        (key, *map(number, (*reads(node), *node.outs)))
        for key, node in zip(keys, nodes, strict=True)
    )
    return form, place


def _symbols(nodes: Sequence[Node], reads: Reads, key_of: Callable[[Node], Any]) -> np.ndarray:
    """By node a number, equal for those that are one function; below 0 for one without equals."""
    known: dict[Any, int] = {}
    symbols = np.empty(len(nodes), int)
    for i, node in enumerate(nodes):
        key = key_of(node)
        if key is None:
            symbols[i] = -1 - i
            continue
        kinds = (atom.aval if isinstance(atom, Value) else identity(atom) for atom in reads(node))
        symbols[i] = known.setdefault((key, *kinds), len(known))
    return symbols


def _bounds(nodes: Sequence[Node], symbols: np.ndarray) -> Iterator[tuple[int, int]]:
    """Where parts begin and end; a node with bodies, such as a rematerialised layer, is one."""
    single = [i for i, node in enumerate(nodes) if symbols[i] < 0 or node.bodies]
    for before, after in zip([-1, *single], [*single, len(nodes)], strict=True):
        if before >= 0:
            yield before, before + 1
        yield from _repeated(symbols, before + 1, after)


def _repeated(symbols: np.ndarray, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """A stretch of the program, cut where it repeats what came just before."""
    if start == stop:
        return
    first, period, copies = _longest(symbols[start:stop])
    if (copies - 1) * period < _LEAST:
        yield start, stop
        return
    first += start
    last = first + copies * period
    yield from _repeated(symbols, start, first)
    yield from ((a, a + period) for a in range(first, last, period))
    yield from _repeated(symbols, last, stop)


def _longest(symbols: np.ndarray) -> tuple[int, int, int]:
    """The repetition that spares most: its start, its period and how often that comes."""
    seen: dict[int, int] = {}
    periods = set()
    for i, symbol in enumerate(symbols.tolist()):
        periods.add(i - seen.get(symbol, i))
        seen[symbol] = i
    best = (0, 1, 1)
    for period in sorted(periods - {0}):
        different = np.flatnonzero(symbols[:-period] != symbols[period:])
        edges = np.concatenate([[-1], different, [len(symbols) - period]])
        lengths = np.diff(edges) - 1
        at = int(lengths.argmax())
        copies = 1 + int(lengths[at]) // period
        if (copies - 1) * period > (best[2] - 1) * best[1]:
            best = (int(edges[at]) + 1, period, copies)
    return best
