"""The two streams of a bimodal function, found by what its axes are, and the order they attend in.

Attention whose queries and keys have the same identity is a stream's attention to itself; any
other reads one stream for another. The stream that holds the target token, s, is the one that the
output is read from; the other is q. Streams that are constant at first, such as object queries and
latents, count as data from where they meet the data.
"""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from jax import numpy as jnp

from jaxrel.attention.accumulate import Layers
from jaxrel.attention.discovery import Sites, data_values, find_sites, refuse_left_out
from jaxrel.attention.residual import ancestors
from jaxrel.attention.stacks import Site
from jaxrel.tracing.axes import Axis, roots, same
from jaxrel.tracing.capture import taps_with_grad
from jaxrel.tracing.flow import Backward, dependents
from jaxrel.tracing.graph import Graph, Node, Traced, Value

_TAGS = (
    "tag the maps with jaxrel.tag, and say in a schedule in which order they attend: "
    "value_and_bimodal_relevance(fun, schedule, ...)"
)


class Event(NamedTuple):
    """One map of a site: whose queries and keys it has, and when it is computed."""

    site: Site
    number: int
    time: tuple[int, ...]
    pair: str


Stage = tuple[Event, ...]


class Streams(NamedTuple):
    """How two streams attend.

    Attributes:
      schedule: as `bimodal_accumulation` takes it, with names in the place of `Layers`.
      events: by name, the maps of its layers in order.
    """

    schedule: tuple[tuple[tuple[tuple[str, str], ...], ...], ...]
    events: Mapping[str, tuple[Event, ...]]

    @property
    def sites(self) -> list[Site]:
        """All sites, each once."""
        return list(dict.fromkeys(event.site for some in self.events.values() for event in some))


def find_streams(traced: Traced, args: tuple, argnums: Any = None) -> Streams:
    """The two streams of a traced call.

    Raises:
      ValueError: there are not two streams that attend to one another, or the output is read
        from both.
      NotImplementedError: an attention is not recognised, or a stream is changed by two at once.
    """
    found = _sites_of_both(traced, data_values(traced, args, argnums))
    refuse_left_out(found)
    letters = _letters(traced.graph, found.sites)
    events = sorted(
        (
            Event(site, index, time, letters[site])
            for site in found.sites
            for index, time in enumerate(site.stages())
        ),
        key=lambda event: event.time,
    )
    named: dict[str, tuple[Event, ...]] = {}
    schedule = []
    for number, (block, count) in enumerate(_blocks(_stages(traced.graph, events))):
        stages = []
        for place, stage in enumerate(block[: len(block) // count]):
            names = [f"{number}.{place}.{event.pair}" for event in stage]
            for i, name in enumerate(names):
                named[name] = tuple(layer[i] for layer in block[place :: len(block) // count])
            stages.append(tuple((e.pair, name) for e, name in zip(stage, names, strict=True)))
        schedule.append(tuple(stages))
    return Streams(tuple(schedule), named)


def layers_of(traced: Traced, streams: Streams, *, values: bool) -> tuple[Any, dict[str, Layers]]:
    """The function's output and by name the layers of a schedule, in one forward and backward pass.

    Args:
      traced: the call.
      streams: from `find_streams`.
      values: whether weighted accumulation needs the token values too.

    Raises:
      ValueError: `values` are asked for, and no residual sum is known for an attention.
    """
    taps: dict[Value, str] = {}
    for site in streams.sites:
        if values and site.residual is None:
            raise ValueError(
                "attention: method 'weighted' needs the residual stream around every attention, "
                f"and none was found near {site.where}; use method 'equal', or {_TAGS}"
            )
        for value in (site.value, *(site.residual or () if values else ())):
            taps.setdefault(value, str(len(taps)))
    out, found, grads = taps_with_grad(traced, taps, "attention.value_and_bimodal_relevance")

    def of_maps(site: Site, some: Mapping) -> Any:
        return site.stacked(some[taps[site.value]])

    def of_values(place: int, site: Site, some: Mapping) -> Any:
        assert site.residual is not None
        return site.stacked_values(some[taps[site.residual[place]]])

    def layers(name: str) -> Layers:
        fields: list[tuple[Callable, Mapping]] = [(of_maps, found), (of_maps, grads)]
        if values:
            places = ((0, found), (1, found), (2, grads))
            fields += [(functools.partial(of_values, i), some) for i, some in places]
        return Layers(*(_picked(streams.events[name], *field) for field in fields))

    return out, {name: layers(name) for name in streams.events}


def maps_of(streams: Streams, relevance: Mapping[str, Any], names: Mapping[Value, str]) -> dict:
    """By name of a schedule, what `relevance` holds in the place of its maps."""

    def get(site: Site, some: Mapping) -> Any:
        return site.stacked(some[names[site.value]])

    return {name: _picked(events, get, relevance) for name, events in streams.events.items()}


def _picked(events: Sequence[Event], get: Callable, some: Mapping) -> Any:
    sites = dict.fromkeys(event.site for event in events)
    arrays = {site: get(site, some) for site in sites}
    if len(sites) == 1:
        (array,) = arrays.values()
        if [event.number for event in events] == list(range(len(array))):
            return array
    return jnp.stack([arrays[event.site][event.number] for event in events])


def _sites_of_both(traced: Traced, data: Sequence[Value]) -> Sites:
    """The sites of both streams: of one that starts as a constant too.

    What it starts from is what its tokens are (object queries, latents, embedded tokens), and any
    constant that they are added to.
    """
    starts: list[Value] = []
    found = find_sites(traced, data)
    for search in (_token_sources, _summands):
        known = [*data, *starts]
        new = [value for value in search(traced.graph, found, known) if value not in known]
        if new:
            starts += new
            found = find_sites(traced, data, starts)
    return found


def _token_sources(graph: Graph, found: Sites, starts: Sequence[Value]) -> Iterator[Value]:
    arrays = {id(array): value for value, array in graph.constants.items()}
    for site in found.sites:
        for root in roots(site.tokens) if not site.is_self else ():
            value = arrays.get(root.source, root.source)
            if isinstance(value, Value):
                yield value


def _summands(graph: Graph, found: Sites, starts: Sequence[Value]) -> Iterator[Value]:
    data, producers = dependents(graph, starts), graph.producers()
    for site in found.sites:
        if site.is_self or site.residual is None:
            continue
        before = site.residual.before
        for value in ancestors(before, producers=producers):
            if value.shape == before.shape and value not in data:
                yield value


def _letters(graph: Graph, sites: Sequence[Site]) -> dict[Site, str]:
    """By site, the letters of its queries' stream and of its keys'."""
    kinds: list[Axis] = []

    def kind(axis: Axis) -> int:
        for number, one in enumerate(kinds):
            if one == axis or same(one, axis):
                return number
        kinds.append(axis)
        return len(kinds) - 1

    numbers = {}
    for site in sites:
        query = kind(site.tokens)
        numbers[site] = (query, query if site.is_self else kind(site.keys))
    listing = "; ".join(f"{s.where}: {a} attends to {b}" for s, (a, b) in numbers.items())
    if len(kinds) != 2 or all(a == b for a, b in numbers.values()):
        raise ValueError(
            "attention.value_and_bimodal_relevance: expected two streams of which one attends to "
            f"the other, found {len(kinds)} ({listing or 'no attention'}); for one stream use "
            f"attention.relevance; else {_TAGS}"
        )
    read = [number for number in (0, 1) if _is_read(graph, numbers, number)]
    if len(read) != 1:
        raise ValueError(
            "attention.value_and_bimodal_relevance: the output must be read from one of the two "
            f"streams, and is read from {'both' if read else 'neither'} ({listing}); return what "
            f"is read from one of them, or {_TAGS}"
        )
    name = {read[0]: "s", 1 - read[0]: "q"}
    return {site: name[a] + name[b] for site, (a, b) in numbers.items()}


class _Reads(Backward):
    """What the output is made of, other than through some attention maps."""

    def __init__(self, barred: Iterable[Value]):
        super().__init__()
        self.barred = set(barred)

    def carries(self, value: Value) -> bool:
        return True

    def passed(self, node: Node) -> Iterable[Value]:
        barred = any(atom in self.barred for atom in node.ins)
        return () if barred else super().passed(node)


def _is_read(graph: Graph, numbers: Mapping[Site, tuple[int, int]], stream: int) -> bool:
    """Whether the output depends on a stream other than through the other's attention to it."""
    reads = _Reads(site.value for site, pair in numbers.items() if pair == (1 - stream, stream))
    reads.run(graph, [True] * len(graph.outs))
    # A map stands for the product with it, which is barred if it is the other stream's.
    return any(site.value in reads.found for site, (query, _) in numbers.items() if query == stream)


class _Order:
    """Which attention reads a stream after which other has changed it."""

    def __init__(self, graph: Graph):
        self.graph = graph
        self._reached: dict[tuple[Graph, Value], frozenset[Value]] = {}

    def after(self, event: Event, first: Event) -> bool:
        """Whether an event depends on another."""
        graph, shared = self.graph, 0
        for one, other in zip(event.site.place, first.site.place, strict=False):
            if one.node is None or one.node is not other.node:
                break
            bodies = [b for b in one.node.bodies if _holds(b, event.site.value)]
            graph = bodies[0]
            counted = one.node.scan and one.node not in event.site.mapped
            shared += 2 if counted else 1
        now, then = event.time[:shared], first.time[:shared]
        if then > now:
            return False
        # In a later iteration, what the loop carries counts too.
        graph = graph if then == now else self.graph
        key = graph, first.site.value
        if key not in self._reached:
            self._reached[key] = dependents(graph, [first.site.value])
        return event.site.value in self._reached[key]


def _holds(graph: Graph, value: Value) -> bool:
    return any(value in node.outs for node in graph.walk())


def _stages(graph: Graph, events: Sequence[Event]) -> list[Stage]:
    """The order in which the streams attend; what stands in one stage reads them as before it."""
    order = _Order(graph)
    chains = {name: [e for e in events if e.pair[0] == name] for name in "sq"}
    reads: dict[Event, int] = {}
    for event in events:
        for name in set(event.pair):
            before = [order.after(event, first) for first in chains[name] if first is not event]
            count = sum(before)
            own = name == event.pair[0]
            if not all(before[:count]) or (own and count != chains[name].index(event)):
                raise NotImplementedError(
                    "attention.value_and_bimodal_relevance: the attention at "
                    f"{event.site.where} is added to its stream beside another, not after it, and "
                    "relevance accumulates one after the other; add them one after the other"
                )
            if not own:
                reads[event] = count
    stages: list[Stage] = []
    done = {"s": 0, "q": 0}
    while any(done[name] < len(chains[name]) for name in "sq"):
        stage = _next(chains, done, reads)
        if not stage:
            where = chains["s"][min(done["s"], len(chains["s"]) - 1)].site.where
            raise NotImplementedError(
                "attention.value_and_bimodal_relevance: the order in which the streams attend "
                f"near {where} is not recognised; {_TAGS}"
            )
        for event in stage:
            done[event.pair[0]] += 1
        stages.append(stage)
    return stages


def _next(chains: Mapping, done: Mapping[str, int], reads: Mapping[Event, int]) -> Stage:
    """The next attention, or two that read both streams as they are."""
    ready, waiting = {}, {}
    for name, other in ("sq", "qs"):
        rest = chains[name][done[name] :]
        if rest and reads.get(rest[0], done[other]) == done[other]:
            ready[name] = rest[0]
        # What must read this stream before it changes.
        later = chains[other][done[other] :]
        waiting[name] = [e for e in later if reads.get(e, done[name] + 1) <= done[name]]
    alone = [event for name, event in ready.items() if not waiting[name]]
    if alone:
        return (min(alone, key=lambda event: event.time),)
    both = {*ready.values()}
    held = all(set(waiting[name]) <= both for name in ready)
    return tuple(ready.values()) if len(ready) == 2 and held else ()


def _blocks(stages: Sequence[Stage]) -> list[tuple[Sequence[Stage], int]]:
    """Runs of stages that repeat, with how often they do."""
    kinds = [
        tuple((e.pair, e.site.shape, e.site.residual and e.site.residual.total.shape) for e in one)
        for one in stages
    ]
    found, start = [], 0
    while start < len(stages):
        best = (1, 1)
        for size in range(1, (len(stages) - start) // 2 + 1):
            count, block = 1, kinds[start : start + size]
            while kinds[start + count * size : start + (count + 1) * size] == block:
                count += 1
            if count > 1 and size * count > best[0] * best[1]:
                best = (size, count)
        stop = start + best[0] * best[1]
        found.append((stages[start:stop], best[1]))
        start = stop
    return found
