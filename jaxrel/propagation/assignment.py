"""Prepare a graph: which operations it has, the rule each of them gets, and their steps."""

import dataclasses
import difflib
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal

from jaxrel.propagation.composites import Composite, kinds_named, specific
from jaxrel.propagation.cuts import Cuts
from jaxrel.propagation.finder import carriers, operations
from jaxrel.propagation.operations import Elementwise, Linear, Operation, Product
from jaxrel.propagation.rules import (
    KINDS,
    Epsilon,
    Gradient,
    Guided,
    Pass,
    ProductRule,
    Rule,
    Stop,
)
from jaxrel.propagation.steps import share_sum, step_for
from jaxrel.propagation.zero_inputs import Probe, add_probes
from jaxrel.tracing.evaluate import Step
from jaxrel.tracing.facts import Fact, Facts, active_ins, analyse, is_elementwise
from jaxrel.tracing.graph import Graph, Node, Value
from jaxrel.tracing.opaque import cure
from jaxrel.tracing.primitives import CUSTOM, CUSTOM_JVP
from jaxrel.tracing.rewrite import associate, cut_scans, divide_first, multiply, open_calls


@dataclasses.dataclass(frozen=True)
class Choice:
    """An operation and its rule.

    Attributes:
      operation: from `operations`.
      rule: None if there is none (only where a plan shows that).
      entry: the composite's entry that decided, None for a default.
      probe: what takes relevance that the rule gives directly, if it reaches the operation.
    """

    operation: Operation
    rule: Rule | None
    entry: int | None = None
    probe: Probe | None = None


@dataclasses.dataclass(frozen=True)
class Prepared:
    """A graph ready to be evaluated with rules.

    `carrying` are the values whose relevance reaches what is explained; `explained` the inputs
    that carry relevance; the graph's last inputs are their probes, in the same order. `tagged`
    are the (name, value) pairs of tagged values that are explained, `probes` their probes.
    """

    graph: Graph
    facts: Facts
    carrying: set[Value]
    choices: tuple[Choice, ...]
    steps: dict[Node, Step]
    explained: tuple[Value, ...]
    tagged: tuple[tuple[str, Value], ...]
    probes: dict[Value, Value]


def prepare(
    graph: Graph,
    composite: Composite,
    ins: Sequence[Fact],
    *,
    tags: Callable[[Graph], Sequence[tuple[str, Value]]] = lambda graph: (),
    names: Callable[[Any], str | None] = lambda constant: None,
    weights: bool = False,
    unknown: Literal["error", "warn", "show"] = "error",
    whole: Collection[Value] = (),
) -> Prepared:
    """Choose a rule for every operation and make the steps that carry them out.

    Args:
      graph: from `trace`.
      composite: the rules.
      ins: the fact of every input: explained (active and fresh) or made of parameters.
      tags: finds more explained values in the graph, with the names they are tagged with.
      names: the parameter path of an array the function closed over.
      weights: relevance of weights is wanted too.
      unknown: whether an operation without a rule is an error, a warning and its derivative, or
        is only shown.
      whole: values in scans that must stay one; their first iterations have the others' rules.
    """

    def found_in(graph: Graph) -> list[Value]:
        return [value for _, value in tags(graph)]

    def known(graph: Graph, barriers: Iterable[Node] = ()) -> Facts:
        return analyse(graph, ins, sources=found_in(graph), barriers=barriers, names=names)

    graph, facts = _rewritten(*_opened(graph, composite, known), known, found_in)
    while any(map(cuts := Cuts(facts, composite, found_in(graph), whole), graph.walk())):
        graph = cut_scans(graph, cuts)
        facts = known(graph)

    sampled: dict[Any, Any] = {}

    def choose(cut: Mapping[Node, frozenset[Value]] | None = None) -> tuple[set[Value], list]:
        carrying = carriers(graph, facts, cut)
        found = operations(graph, facts, carrying, composite.names, sampled)
        return carrying, [(one, *composite.choose(one)) for one in found]

    carrying, found = choose()
    stopped = [
        Choice(one, rule, entry)
        for one, entry, rule in found
        if one.kind in ("softmax", "norm") and isinstance(rule, Stop)
    ]
    if stopped:
        facts = known(graph, [choice.operation.node for choice in stopped])
        _check_reaches(graph, facts, stopped)
        carrying, found = choose()
    gates = _gates(found, facts)
    if gates:
        carrying, found = choose(gates)
    chosen = [*_covered(found, unknown), *stopped]
    order = {node: i for i, node in enumerate(graph.walk())}
    choices = tuple(sorted(chosen, key=lambda choice: order[choice.operation.node]))
    _check_matches(composite, choices)
    explained = tuple(
        value for value, fact in zip(graph.ins, ins, strict=True) if facts[value].active
    )
    direct = [c.operation.x for c in choices if isinstance(c.operation, Linear) and _direct(c)]
    tagged = tuple(tags(graph))
    sources = found_in(graph) if direct else []
    probed = add_probes(graph, facts, explained, direct, sources)
    choices = tuple(_with_probe(choice, probed.probes) for choice in _clean(choices))
    steps = probed.steps | _steps(choices, weights)
    probes = {v: probed.probes[v].value for v in sources if v in probed.probes}
    return Prepared(probed.graph, facts, carrying, choices, steps, explained, tagged, probes)


def _rewritten(
    graph: Graph, facts: Facts, known: Callable[[Graph], Facts], found_in: Callable
) -> tuple[Graph, Facts]:
    """The same computation in the order in which rules read it: see `tracing.rewrite`."""
    divided = multiply(divide_first(graph, lambda value: facts[value].active))
    facts = facts if divided is graph else known(divided)
    ordered = associate(divided, facts, found_in(divided))
    return ordered, facts if ordered is divided else known(ordered)


def _gates(found: Iterable[tuple], facts: Facts) -> dict[Node, frozenset[Value]]:
    """By product, the factors that take nothing of its relevance."""
    gates: dict[Node, frozenset[Value]] = {}
    for one, _, rule in found:
        if isinstance(one, Product) and len(one.gates) == 2 and isinstance(rule, ProductRule):
            factors = zip(active_ins(facts, one.node), rule.shares(one.gates), strict=True)
            none = frozenset(value for value, part in factors if part == 0)
            gates |= {one.node: none} if none else {}
    return gates


def _check_reaches(graph: Graph, facts: Facts, stopped: Sequence[Choice]) -> None:
    """An output that is itself stopped would leave every input without relevance."""
    out = graph.outs[0]
    if isinstance(out, Value) and not facts[out].active:
        last = stopped[-1].operation
        raise ValueError(
            f"lrp: the rules stop everything: the output depends on its input only through the "
            f"{last.kind} at {last.where()}, which {stopped[-1].rule} makes a constant. Explain "
            "what goes into it (the logits), or use another rule there"
        )


def _clean(choices: Sequence[Choice]) -> Iterator[Choice]:
    """Where a ReLU's rule passes relevance to z < 0, nothing may rely on the ReLU."""
    activations = (choice.rule for choice in choices if choice.operation.kind == "activation")
    tight = all(isinstance(rule, Pass | Gradient | Guided | Stop) for rule in activations)
    for choice in choices:
        operation = choice.operation
        if not tight and isinstance(operation, Linear) and operation.relu_after:
            operation = dataclasses.replace(operation, relu_after=False)
            choice = dataclasses.replace(choice, operation=operation)
        yield choice


def _direct(choice: Choice) -> bool:
    return choice.rule is not None and choice.rule.direct


def _with_probe(choice: Choice, probes: dict[Value, Probe]) -> Choice:
    if isinstance(choice.operation, Linear) and _direct(choice):
        return dataclasses.replace(choice, probe=probes.get(choice.operation.x))
    return choice


def _opens(node: Node, composite: Composite) -> bool:
    """Whether the body of a function with a derivative of its own is what gets rules."""
    if node.name not in CUSTOM or (node.name in CUSTOM_JVP and is_elementwise(node)):
        return False
    _, rule = composite.choose(Operation(kind=node.name, node=node))
    return len(node.bodies) == 1 and rule is None


def _opened(
    graph: Graph, composite: Composite, known: Callable[[Graph], Facts]
) -> tuple[Graph, Facts]:
    """The graph with the functions whose bodies get rules opened, and its facts.

    Rules cannot enter a while loop: a function with a derivative of its own that holds one is left
    whole, so that this derivative may be used.
    """
    opened = open_calls(graph, lambda node: _opens(node, composite))
    facts = known(opened)
    loops = {
        id(node.equation)
        for node in opened.walk()
        if node.loop and any(out in facts and facts[out].active for out in node.outs)
    }
    whole = {
        id(call.equation)
        for call in graph.walk()
        if loops and call.name in CUSTOM
        if any(id(node.equation) in loops for body in call.bodies for node in body.walk())
    }
    if not whole:
        return opened, facts
    graph = open_calls(
        graph, lambda node: id(node.equation) not in whole and _opens(node, composite)
    )
    return graph, known(graph)


def _steps(choices: Iterable[Choice], weights: bool) -> dict[Node, Step]:
    steps: dict[Node, Step] = {}
    for choice in choices:
        operation, rule = choice.operation, choice.rule
        if rule is None:
            continue
        taken = operation.kind == "add" and operation.node in steps
        if taken and isinstance(rule, Epsilon | Gradient):
            # A sum that a linear operation has taken in shares by its own rule.
            if isinstance(rule, Epsilon):
                steps[operation.node] = _then_shared(steps[operation.node], rule)
            continue
        step = step_for(operation, rule, probe=choice.probe, weights=weights)
        if step is not None:
            steps[step[0]] = step[1]
    return steps


def _then_shared(step: Step, rule: Epsilon) -> Step:
    key = None if step.key is None else (step.key, rule)
    return Step(step.ins, lambda *ins: [share_sum(step.function(*ins)[0], rule.epsilon)], key=key)


# Coverage.


def _covered(
    found: Sequence[tuple[Operation, int | None, Rule | None]], unknown: str
) -> Iterator[Choice]:
    found = [(one, entry, _fitting(one, rule)) for one, entry, rule in found]
    missing = [operation for operation, _, rule in found if rule is None]
    if missing and unknown != "show":
        message = _missing(missing, [one for one, _, rule in found if rule is not None])
        impossible = [one for one in missing if cure(one.node)]
        if unknown != "warn" or impossible:
            raise NotImplementedError(message)
        warnings.warn(f"{message}\nTheir plain derivative is used.", stacklevel=5)
    for operation, entry, rule in found:
        default = None if unknown == "show" else Gradient()
        yield Choice(operation, default if rule is None else rule, entry)


def _fitting(operation: Operation, rule: Rule | None) -> Rule | None:
    """The rule, if it is not Pass on what is no activation: f(x) / x would be without bound."""
    if isinstance(operation, Elementwise) and isinstance(rule, Pass):
        return rule if operation.is_activation else None
    return rule


def _missing(operations: Sequence[Operation], others: Sequence[Operation]) -> str:
    lines = [f"lrp: {len(operations)} operation(s) carry relevance and have no rule:"]
    for operation in operations[:8]:
        paths = f", parameters {', '.join(operation.paths)}" if operation.paths else ""
        advice = cure(operation.node) or _advice(operation, others)
        place = f" ({operation.where()}{paths})" if operation.where() else paths
        lines.append(f"  {operation.kind}{place}: {advice}")
    if len(operations) > 8:
        lines.append(f"  and {len(operations) - 8} more; jaxrel.plan lists all")
    return "\n".join(lines)


def _advice(operation: Operation, others: Iterable[Operation]) -> str:
    """An entry for an operation, and for none of the others, which have rules."""
    if isinstance(operation, Elementwise):
        return (
            "no activation (not 0 at 0, or huge beside it), so relevance cannot pass it "
            "unchanged; if it is part of a softmax (also of one that divides after the product "
            "with the values) or a norm, write that with jax.nn.softmax or jnp.sqrt, else "
            f"put (jaxrel.op({operation.name!r}), jaxrel.rules.Gradient()) before the "
            "other entries of the composite for its plain derivative"
        )
    where = f"jaxrel.op({operation.kind!r})"
    if operation.kind in KINDS:
        return f"add ({where}, jaxrel.rules.Epsilon()) at the end of the composite"
    like = sorted({one.kind for one in others if one.name == operation.kind})
    if like:
        where += f" & ~jaxrel.op({', '.join(map(repr, like))})"
    return (
        f"add ({where}, jaxrel.rules.Gradient()) at the end of the composite for its plain "
        "derivative"
    )


def _check_matches(composite: Composite, choices: Sequence[Choice]) -> None:
    """A path or a layer that nothing has is a mistake; so is one that another entry hides."""
    used = {choice.entry for choice in choices}
    for index, (where, rule) in enumerate(composite.entries):
        if index in used or not specific(where):
            continue
        hidden = [
            choice
            for choice in choices
            if rule.covers(choice.operation.kind, choice.operation.kind in kinds_named(where))
            and where(choice.operation)
            and choice.entry is not None
        ]
        if hidden:
            first = composite.entries[hidden[0].entry or 0]
            raise ValueError(
                f"lrp: entry {index} of the composite, ({where!r}, {rule}), never decides: entry "
                f"{hidden[0].entry}, ({first[0]!r}, {first[1]}), comes first; put it before that"
            )
        paths = sorted({path for choice in choices for path in choice.operation.paths})
        near = difflib.get_close_matches(repr(where)[6:-2], paths, n=3, cutoff=0.6)
        hint = f"; did you mean {', '.join(near)}?" if near else "."
        shown = ", ".join(paths[:12]) + (", ..." if len(paths) > 12 else "")
        kinds = sorted({choice.operation.kind for choice in choices})
        raise ValueError(
            f"lrp: entry {index} of the composite, ({where!r}, {rule}), matches no operation. "
            f"Parameters: {shown or 'none with a path'}{hint} Kinds: {', '.join(kinds)}; "
            "jaxrel.plan lists everything"
        )
