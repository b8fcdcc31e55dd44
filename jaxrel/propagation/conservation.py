"""`conservation`: how much relevance each operation receives, passes on and loses, and to what."""

import collections
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp

from jaxrel.propagation.assignment import Choice, Prepared
from jaxrel.propagation.composites import as_composite
from jaxrel.propagation.lrp import (
    as_places,
    as_relevance,
    cotangent,
    forward,
    prepare_call,
    quotient,
    results,
    traced_call,
)
from jaxrel.propagation.operations import Block, Linear
from jaxrel.propagation.plan import Row, row_of, table
from jaxrel.propagation.rules import STABILISERS, Gradient, Rule
from jaxrel.propagation.steps import step_for
from jaxrel.tracing.evaluate import Interceptor, Step
from jaxrel.tracing.facts import active_ins
from jaxrel.tracing.graph import Node, Value, tag_name
from jaxrel.tracing.primitives import BRINGS, EXACT
from jaxrel.tracing.pullback import Call, seed_of


@dataclasses.dataclass(frozen=True)
class Balance:
    """What becomes of the relevance of one operation, summed over the batch and its layers.

    received = passed + bias + stabiliser + rule.

    Attributes:
      kind: the operation's kind, 'constant' where one is added, or the primitive's name.
      row: the operation and its rule, as in the plan; None where no rule was chosen.
      where: the user's source line.
      received: the relevance of the operation's output.
      passed: what its inputs get.
      bias: what its bias, or another constant that it adds or puts in, absorbs.
      stabiliser: what the stabiliser absorbs.
      rule: what the rule itself does not pass on (or makes up, if negative).
    """

    kind: str
    row: Row | None
    where: str
    received: float
    passed: float
    bias: float
    stabiliser: float
    rule: float

    @property
    def lost(self) -> float:
        """received - passed."""
        return self.received - self.passed


@dataclasses.dataclass(frozen=True)
class Conservation:
    """The balance of every operation; `str(conservation)` is a table.

    Attributes:
      balances: one per operation, in order of execution.
      output: the relevance that started at the output.
      input: the relevance that arrived at what is explained.
    """

    balances: tuple[Balance, ...]
    output: float
    input: float

    def __iter__(self) -> Iterator[Balance]:
        return iter(self.balances)

    def summary(self) -> dict[str, float]:
        """Totals: output, input, and what was lost to bias, stabiliser, rule, and elsewhere.

        Elsewhere is what constants take that enter through control flow: the first state of a
        scan, a branch of a cond; and the rounding of the sums, which are kept in float32.
        """
        totals = {
            name: float(sum(getattr(one, name) for one in self.balances))
            for name in ("bias", "stabiliser", "rule")
        }
        elsewhere = self.output - self.input - sum(totals.values())
        return {"output": self.output, "input": self.input, **totals, "elsewhere": elsewhere}

    def __str__(self) -> str:
        heads = ["operation", "parameters", "rule", "received", "passed", "to bias"]
        heads += ["to stabiliser", "to rule", "where"]
        scale = max((abs(one.received) for one in self.balances), default=0.0)
        lines = [
            (
                one.kind,
                "" if one.row is None else ", ".join(one.row.paths),
                "" if one.row is None else str(one.row.rule),
                *(
                    _number(x, scale)
                    for x in (one.received, one.passed, one.bias, one.stabiliser, one.rule)
                ),
                one.where,
            )
            for one in self.balances
        ]
        total = self.summary()
        names = ("output", "input", "bias", "stabiliser", "rule")
        ends = ("total", "", "", *(_number(total[name], scale) for name in names), "")
        return table(heads, [*lines, ends])


def _number(x: float, scale: float) -> str:
    """A sum, with what float32 cannot tell from zero shown as zero."""
    return "0" if abs(x) < 1e-6 * scale else f"{x:.4g}"


def conservation(
    fun: Callable,
    rules: Any,
    *,
    argnums: int | Sequence[int] | None = 0,
    at: Any = (),
    unknown: Any = "error",
) -> Callable:
    """Make a function return where relevance is lost on its way from output to input.

    Measures, never alters: the same rules run as in `jaxrel.lrp`, once more per linear operation
    without its stabiliser and without its bias. A diagnosis of known inputs, not for use in jit:
    one program is compiled and run, in two to three times the time of the explanation.

    Args:
      fun: see `jaxrel.lrp`.
      rules: a composite, a rule, or a list of (where, rule).
      argnums: what is explained.
      at: names of tagged values; relevance that arrives there counts as arrived, so they should
        not lie on each other's way.
      unknown: see `jaxrel.lrp`.

    Returns:
      A function `(*args, seed=None, target=None) -> Conservation`.

    Raises:
      TypeError, ValueError, NotImplementedError: as for `jaxrel.lrp`.
    """
    composite = as_composite(rules)
    at = as_places(at)

    def conserved(*args, seed: Any = None, target: Any = None) -> Conservation:
        call = traced_call("conservation", fun, args, argnums)
        seed = seed_of("conservation", seed, target, relevance=True)
        prepared = prepare_call(call, composite, at, unknown)
        places = _places(prepared)

        def measure(leaves: tuple) -> tuple:
            traced = dataclasses.replace(call.traced, args=leaves)
            known = dataclasses.replace(call, traced=traced)
            return _measure(known, prepared, places, at, seed)[2:]

        output, arrived, table = _at_once(measure, call.traced.args)
        balances = (
            _balance(choice, node, row)
            for (node, choice, _), row in zip(places, table, strict=True)
        )
        return Conservation(tuple(balances), output, arrived)

    return conserved


def _at_once(measure: Callable, leaves: tuple) -> Any:
    """Run a program that is needed once: numbers, and lists of them, instead of arrays."""
    # On a CPU most of the time is the compiler's, and the rules' products are a library's.
    quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    found = jax.jit(measure, compiler_options=quick)(leaves)
    return jax.tree.map(lambda x: np.asarray(x).tolist(), found)


def value_and_measured_lrp(
    fun: Callable, rules: Any, *, argnums: int | Sequence[int] | None = 0, at: Any = ()
) -> Callable:
    """Like `value_and_lrp`, but the function returns `(value, relevance, report)`; fit for jit.

    The report counts the operations of each kind and rule, and sums what `conservation` shows,
    as arrays: `{"rules": {"dense: Epsilon()": 14, ...}, "relevance": {"output": ..., "input": ...,
    "bias": ..., "stabiliser": ..., "rule": ...}}`. It costs about one more backward pass.
    """
    composite = as_composite(rules)
    at = as_places(at)

    def measured(*args, seed: Any = None, target: Any = None):
        call = traced_call("lrp", fun, args, argnums)
        seed = seed_of("lrp", seed, target, relevance=True)
        prepared = prepare_call(call, composite, at, "error")
        places = _places(prepared)
        outs, found, output, arrived, table = _measure(call, prepared, places, at, seed)
        totals = dict(zip(("bias", "stabiliser", "rule"), table.sum(0)[2:], strict=True))
        kinds = (f"{one.operation.kind}: {one.rule}" for one in prepared.choices)
        report = {
            "rules": dict(collections.Counter(kinds)),
            "relevance": {"output": output, "input": arrived, **totals},
        }
        return call.traced.unflatten(outs), results(call, found, as_relevance), report

    return measured


Place = tuple[Node, Choice | None, Step]


def _places(prepared: Prepared) -> list[Place]:
    """Every node to measure: those of operations, and those that bring in constants."""
    graph, carrying = prepared.graph, prepared.carrying
    owned: dict[Node, Choice] = {}
    inner: set[Node] = set()
    for choice in prepared.choices:
        operation = choice.operation
        made = choice.rule and step_for(operation, choice.rule, probe=choice.probe)
        owned.setdefault(made[0] if made else operation.node, choice)
        if isinstance(operation, Block):
            inner |= {*operation.nodes}
        elif isinstance(operation, Linear):
            inner.add(operation.core)
            if made and made[0] is operation.node:
                inner |= {term.node for term in operation.bias}
    places: list[Place] = []
    for node in graph.walk():
        if node.is_control or len(node.outs) != 1 or node.outs[0] not in carrying:
            continue
        step = prepared.steps.get(node, Step(node.ins, node.bind))
        if node in owned:
            places.append((node, owned[node], _whole(owned[node], step)))
        elif node not in inner and _may_lose(prepared, node):
            places.append((node, None, step))
    return places


def _whole(choice: Choice, step: Step) -> Step:
    """A block that keeps its derivative is measured as one function too."""
    block = choice.operation
    if not isinstance(block, Block) or not isinstance(choice.rule, Gradient):
        return step
    f = block.function()
    return Step((block.start, *block.consts), lambda x, *consts: [f(x, consts)])


def _may_lose(prepared: Prepared, node: Node) -> bool:
    """Whether a node without a rule of its own brings in constants or is not linear."""
    if node.name not in BRINGS:
        return node.name not in EXACT and not tag_name(node)
    active = active_ins(prepared.facts, node)
    floats = [atom for atom in node.ins if jnp.issubdtype(atom.aval.dtype, jnp.inexact)]
    return 0 < len(active) < len(floats)


def _measure(
    call: Call, prepared: Prepared, places: Sequence[Place], at: tuple, seed: Any
) -> tuple[list, Any, Any, Any, Any]:
    """Outputs, cotangents, the output's and the input's relevance, and a row for each place.

    A row is (received, passed, bias, stabiliser, rule). It is the cotangent of the place's own
    zeros in the carrier, which nothing changes on its way through the program.
    """
    interceptors = {
        node.outs[0]: Interceptor(
            _interceptor(i, _weigher(prepared, node, choice, step)), _values(step)
        )
        for i, (node, choice, step) in enumerate(places)
    }
    zeros = [jnp.zeros(5, jnp.float32) for _ in places]
    outs, back = forward(call, prepared, at, interceptors=interceptors, carrier=zeros)
    found, rows = back(cotangent(outs[0], seed))
    arrived = [as_relevance(*leaf).sum() for leaf in found.leaves.values()]
    arrived += [as_relevance(*place).sum() for place in found.places.values()]
    out = outs[0]
    table = jnp.stack(rows) if rows else jnp.zeros((0, 5), jnp.float32)
    return outs, found, _total(out, cotangent(out, seed)), sum(arrived), table


def _values(step: Step) -> tuple[Value, ...]:
    return tuple(atom for atom in step.ins if isinstance(atom, Value))


def _weighing(prepared: Prepared, step: Step) -> tuple[str, ...]:
    """How each of a step's values shows relevance: by value times c, directly, or not at all."""
    probes = {choice.probe.value for choice in prepared.choices if choice.probe is not None}

    def how(value: Value) -> str:
        if value in probes:
            return "direct"
        return "value" if prepared.facts[value].active else ""

    return tuple(how(value) for value in _values(step))


def _variants(choice: Choice | None) -> dict[bool, Callable]:
    """A linear operation without its stabiliser, with its bias or not, where it is another one."""
    operation, rule = (None, None) if choice is None else (choice.operation, choice.rule)
    if not isinstance(operation, Linear) or rule is None or isinstance(rule, Gradient):
        return {}
    assert choice is not None
    plain = _unstabilised(rule)
    wanted = [True] * (plain != rule) + [False] * bool(operation.bias)
    made = {b: step_for(operation, plain, probe=choice.probe, biased=b) for b in wanted}
    return {biased: step[1].function for biased, step in made.items() if step is not None}


def _unstabilised(rule: Rule) -> Rule:
    names = [field.name for field in dataclasses.fields(rule) if field.name in STABILISERS]
    given = [name for name in names if callable(value := getattr(rule, name)) or value != 0]
    return dataclasses.replace(rule, **dict.fromkeys(given, 0.0)) if given else rule


def _weigher(prepared: Prepared, node: Node, choice: Choice | None, step: Step) -> Callable:
    """The row of a place: a function of its value, the value's c, and the step's values."""
    how = _weighing(prepared, step)
    variants = _variants(choice)
    absorbs = _absorbs(node, choice)

    def call(function: Callable, values: Sequence) -> Any:
        given = iter(values)
        ins = [next(given) if isinstance(atom, Value) else atom.value for atom in step.ins]
        return function(*ins)[0]

    def passed(function: Callable, values: Sequence, c_of: Callable) -> Any:
        out, pullback = jax.vjp(lambda *values: call(function, values), *values)
        cs = pullback(c_of(out))
        total = jnp.float32(0)
        for value, c, way in zip(values, cs, how, strict=True):
            if way == "value":
                total += _total(value, c)
            elif way == "direct":
                total += jnp.sum(c.astype(jnp.float32))
        return total

    def weigh(value: Any, c: Any, values: Sequence) -> Any:
        received = _total(value, c)
        through = passed(step.function, values, lambda out: c)
        zero = jnp.zeros_like(received)
        if absorbs:
            return jnp.stack([received, through, received - through, zero, zero])
        after = through
        if (stable := variants.get(True)) is not None:
            after = passed(stable, values, lambda out: c)
        shared = after
        if (bare := variants.get(False)) is not None:
            shared = passed(bare, values, lambda out: quotient(value * c, out))
            # An output that is its bias alone has nothing else to share.
            shared += _total(value, jnp.where(call(bare, values) == 0, c, 0))
        return jnp.stack([received, through, shared - after, after - through, received - shared])

    return weigh


def _absorbs(node: Node, choice: Choice | None) -> bool:
    """Whether a constant, or the bias of a plain product, takes all that is missing."""
    if choice is None:
        return node.name in BRINGS
    return isinstance(choice.operation, Linear) and isinstance(choice.rule, Gradient)


def _interceptor(index: int, weigh: Callable) -> Callable:
    """Pass a value through; its row is the cotangent of its own zeros in the carrier."""

    @jax.custom_vjp
    def weighed(zeros, value, *values):
        return value

    def fwd(zeros, value, *values):
        return value, (value, values)

    def bwd(residuals, c):
        value, values = residuals
        return (weigh(value, c, values), c, *(None for _ in values))

    weighed.defvjp(fwd, bwd)
    return lambda carrier, value, *values: (carrier, weighed(carrier[index], value, *values))


def _total(value: Any, c: Any) -> Any:
    """The sum of a value's relevance; masked (infinite) values have none."""
    if jnp.iscomplexobj(value):
        return jnp.sum((value * c).real.astype(jnp.float32))
    relevance = value.astype(jnp.float32) * c.astype(jnp.float32)
    return jnp.sum(jnp.where(jnp.isfinite(relevance), relevance, 0))


def _balance(choice: Choice | None, node: Node, row: Sequence[Any]) -> Balance:
    shown = None if choice is None else row_of(choice)
    kind = shown.kind if shown else ("constant" if node.name in BRINGS else node.name)
    return Balance(kind, shown, node.where(), *row)
