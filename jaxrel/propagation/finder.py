"""Which operations a graph has, found by what its nodes compute, not by names."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from jaxrel.propagation.linear_maps import LinearMaps
from jaxrel.propagation.operations import Block, Elementwise, Operation, Product
from jaxrel.propagation.samples import Samples
from jaxrel.tracing.facts import Facts, active_ins, fact_of, is_elementwise
from jaxrel.tracing.flow import Backward, operands
from jaxrel.tracing.graph import Constant, Graph, Node, Value, tag_name
from jaxrel.tracing.patterns import between, logsumexps, softmaxes
from jaxrel.tracing.primitives import (
    COMPLEX,
    DIV,
    DOT,
    EXACT,
    EXP,
    LINEAR,
    LINEAR_IN,
    LOG,
    MAXIMA,
    MEANS,
    MOVES,
    REDUCE_PROD,
    REDUCTIONS,
    ROOTS,
    SCALES,
    SCATTER_ADD,
    SCATTER_EXTREMA,
    SHAPES,
    SUMS,
)

# What takes the values of a statistic together.
_TOGETHER = REDUCTIONS | DOT | SCATTER_ADD | SCATTER_EXTREMA


def carriers(
    graph: Graph, facts: Facts, cut: Mapping[Node, frozenset[Value]] | None = None
) -> set[Value]:
    """The values, in all bodies, whose relevance reaches what is explained and the output.

    `cut` names the inputs of nodes to which nothing passes: the gates of products, say.
    """
    walk = _Carriers(facts, cut or {})
    # Relevance starts at the first output; others are auxiliary.
    walk.run(graph, [True] + [False] * (len(graph.outs) - 1))
    return walk.found


class _Carriers(Backward):
    def __init__(self, facts: Facts, cut: Mapping[Node, frozenset[Value]]):
        super().__init__()
        self.facts, self.cut = facts, cut

    def carries(self, value: Value) -> bool:
        return self.facts[value].active

    def passed(self, node: Node) -> Iterable[Value]:
        cut = self.cut.get(node, frozenset())
        return [value for value in active_ins(self.facts, node) if value not in cut]


def softmax_nodes(graph: Graph, facts: Facts) -> dict[Node, tuple[Value, set[Node]]]:
    """Each softmax's last node, with the scores it begins with and all of its nodes."""

    def active(value: Value) -> bool:
        return facts[value].active

    found = softmaxes(graph, active, again=True)
    return {last: (start, between(graph, start, last)) for last, start in found if active(start)}


def logsumexp_nodes(graph: Graph, facts: Facts) -> dict[Node, tuple[Value, set[Node]]]:
    """The same of each log(sum(exp(s)))."""
    found = logsumexps(graph, lambda value: facts[value].active)
    nodes = {last: (start, between(graph, start, last)) for last, start in found}
    return {last: one for last, one in nodes.items() if facts[one[0]].active}


def norm_nodes(graph: Graph, facts: Facts) -> tuple[list[Node], set[Node]]:
    """Roots of statistics that then divide or multiply a value: standard deviations, norms.

    A model whose output itself is a norm has none: its root scales nothing. Also what is made of
    these roots alone before it scales: an epsilon added, a maximum, the product of two norms.
    """
    users = graph.users()
    by_logs = _roots_by_logs(graph, facts)
    roots = [
        node
        for node in graph.nodes
        if (node.name in ROOTS or node in by_logs)
        and facts[node.outs[0]].active
        and facts[node.outs[0]].stat
    ]
    sizes = {node.outs[0] for node in roots}
    made: set[Node] = set()
    for node in graph.nodes:
        ins = active_ins(facts, node)
        if ins and sizes.issuperset(ins) and (is_elementwise(node) or node.name in SHAPES):
            sizes.update(node.outs)
            made.add(node)

    def scales(node: Node) -> bool:
        return any(_scales(out, users, facts, sizes) for out in node.outs)

    return [*filter(scales, roots)], {*filter(scales, made)}


def _roots_by_logs(graph: Graph, facts: Facts) -> set[Node]:
    """Exponentials of logarithms times a number, as `exp(0.5 * log(x))` spells a root."""
    sums = {last for last, _ in logsumexps(graph, lambda value: facts[value].active)}
    logs = {node.outs[0] for node in graph.nodes if node.name in LOG and node not in sums}
    roots = set()
    for node in graph.nodes:
        (*ins,) = active_ins(facts, node)
        if len(ins) == 1 and ins[0] in logs:
            if node.name in EXP:
                roots.add(node)
            elif node.name in SCALES or node.name in MOVES:
                logs.update(node.outs)
    return roots


def _scales(value: Value, users: dict[Value, list[Node]], facts: Facts, sizes: set[Value]) -> bool:
    """Whether a size multiplies or divides something that is none."""
    for node in users.get(value, ()):
        if node.name in SCALES and any(v not in sizes for v in active_ins(facts, node)):
            return True
        if any(out in sizes and _scales(out, users, facts, sizes) for out in node.outs):
            return True
    return False


def operations(
    graph: Graph,
    facts: Facts,
    carrying: set[Value],
    apart: Callable[[Operation], bool],
    known: dict[Any, Any] | None = None,
) -> Iterator[Operation]:
    """Every operation that carries relevance, bodies included, in order of execution.

    `apart` says of a batch normalisation whether it is an operation of its own; `known` are
    functions that have been sampled before.
    """
    known = {} if known is None else known
    yield from _Finder(graph, facts, carrying, None, apart=apart, known=known).find()


def stacked(node: Node, facts: Facts) -> bool:
    """Whether a scan runs over layers: some of what it scans over are parameters."""
    if node.scan is None:
        return False
    known = (fact_of(facts, x) for x in operands(node, node.ins).scanned)
    return any(fact.paths and not fact.active for fact in known)


class _Finder(LinearMaps):
    """A graph whose operations are found; `known` are the functions that have been sampled."""

    def __init__(self, *body: Any, apart: Callable[[Operation], bool], known: dict[Any, Any]):
        super().__init__(*body, apart=apart)
        self.known = known
        self.softmaxes = softmax_nodes(self.graph, self.facts)
        parts = set().union(*(inside for _, inside in self.softmaxes.values()))
        logs = logsumexp_nodes(self.graph, self.facts)
        # One inside of a softmax, exp(s - logsumexp(s)), is a part of that.
        self.logsumexps = {last: one for last, one in logs.items() if last not in parts}
        self.norms, sizes = norm_nodes(self.graph, self.facts)
        self._shifts: dict[Node, bool] = {}
        logged = (inside for _, inside in self.logsumexps.values())
        self.inside = parts.union(*logged, sizes, *map(self._statistic, self.norms))

    def find(self) -> Iterator[Operation]:
        for node in self.graph.nodes:
            if node.is_open:
                yield from self._control(node)
            elif any(out in self.carrying for out in node.outs):
                yield from self._of(node)

    def _control(self, node: Node) -> Iterator[Operation]:
        layers = node.scan if stacked(node, self.facts) else None
        parts = node.segments() if node.scan else [(0, 1, body) for body in node.bodies]
        for start, stop, body in parts:
            stack = (start, stop, layers.length) if layers else self.stack
            whole = self.facts, self.carrying
            inner = _Finder(body, *whole, stack, apart=self.apart, known=self.known)
            yield from inner.find()

    def _of(self, node: Node) -> Iterator[Operation]:
        active = self.active(node)
        out = self.facts[node.outs[0]]
        if not active or tag_name(node):
            return
        if any(v.aval.dtype.kind == "c" for v in [*active, *node.outs]):
            yield self._complex(node, active)
        elif node in self.softmaxes:
            yield self.block(Block, "softmax", node, *self.softmaxes[node])
        elif node in self.logsumexps:
            yield self.block(Block, "logsumexp", node, *self.logsumexps[node])
        elif node in self.norms:
            yield self.make(Operation, node, kind="norm")
        elif node in self.inside or self._is_move(node, active):
            return
        elif node.name in LINEAR and len(active) == 1:
            yield from self.linear_map(node)
        elif node.name in LINEAR or (
            node.name in SCALES and len(active) == 2 and self._apart(node)
        ):
            gates = tuple(map(self._gate, active))
            kind = "matmul" if node.name in LINEAR else "product"
            yield self.make(Product, node, kind=kind, gates=gates)
        elif node.name in REDUCE_PROD:
            yield self.make(Product, node, kind="product", gates=())
        elif out.root is not node.outs[0] and is_elementwise(node):
            if out.nonlinear and self._leaves(node):
                yield from self._activation(node)
            elif self._is_mean(node):
                yield self.make(Operation, node, kind="mean")
        elif node.name in SUMS and len(active) == 2:
            yield self.make(Operation, self.sums.get(node, node), kind="add")
        elif node.name in MEANS and not self._divided(node):
            yield self.make(Operation, node, kind="mean")
        elif node.name in MAXIMA:
            yield self.make(Operation, node, kind="max_pool")
        elif node.name not in EXACT and not self._is_scaling(node, active):
            yield self.make(Operation, node, kind=node.name)

    def _sampled(self, start: Value, out: Value) -> Samples:
        return Samples(self.producers, start, out, self.known)

    def _gate(self, value: Value) -> str:
        """What kind of gate a factor is: a sigmoid in any spelling, another activation, or none."""
        gate = self.facts[value].gate
        if gate != "activation":
            return gate
        kinds = {self._spelled(source) for source in self._unmoved(value)}
        return kinds.pop() if len(kinds) == 1 else gate

    def _spelled(self, value: Value) -> str:
        root = self.facts[value].root
        if root is None or root is value:
            return "activation"
        if self._sampled(root, value).is_gate:
            return "sigmoid"
        # One minus a gate is a gate, wherever that was cut out.
        return "activation" if self.facts[value].nonlinear else self._gate(root) or "activation"

    def _unmoved(self, value: Value) -> set[Value]:
        """What a value is made of by moving, cutting and putting side by side."""
        node = self.producers.get(value)
        if node is None or node.name not in MOVES | SHAPES:
            return {value}
        return set().union(*map(self._unmoved, self.active(node)))

    def _complex(self, node: Node, active: list[Value]) -> Operation:
        """An operation on complex values: its kind is its own, that of no real operation."""
        if len(active) == 2 and node.name in LINEAR | SCALES:
            kind = "matmul" if node.name in LINEAR else "product"
            return self.make(Product, node, kind=kind, gates=("", ""))
        kind = node.name if node.name in COMPLEX else f"complex_{node.name}"
        return self.make(Operation, node, kind=kind)

    def _is_move(self, node: Node, active: list[Value]) -> bool:
        """Whether a linear map's weights are written into the program, as a resize's are."""
        if node.name in LINEAR_IN:
            return active == [node.ins[LINEAR_IN[node.name]]]
        others = [fact_of(self.facts, atom) for atom in node.ins if atom not in active]
        return node.name in LINEAR and len(active) == 1 and all(f.literal for f in others)

    def _statistic(self, norm: Node) -> set[Node]:
        """What computes a statistic: its derivative is one thing, not a rule for each node."""
        inside: set[Node] = set()
        stat, todo = {norm}, [norm]
        while todo:
            node = todo.pop()
            inside.add(node)
            # Squares, say, which may be moved before they are taken together.
            takes = node.name in _TOGETHER or (node.name in SHAPES and node not in stat)
            made = (self.producers.get(v) for v in self.active(node))
            for producer in made:
                if producer is None or producer in inside or len(producer.outs) != 1:
                    continue
                fact = self.facts[producer.outs[0]]
                own = all(user in inside for user in self.users[producer.outs[0]])
                if fact.stat:
                    stat.add(producer)
                if fact.stat or (takes and own and (fact.nonlinear or producer.name in SHAPES)):
                    todo.append(producer)
        return inside

    def _apart(self, node: Node) -> bool:
        """Whether a product's factors are not elementwise functions of one value."""
        return self.facts[node.outs[0]].root is node.outs[0]

    def _is_scaling(self, node: Node, active: list[Value]) -> bool:
        """Whether the node scales a value, by a broadcast, with a constant."""
        if node.name in DIV and node.ins[0] not in active:
            return False
        return node.name in SCALES and len(active) == 1

    def _is_mean(self, node: Node) -> bool:
        """Whether the node divides a sum by a constant."""
        if node.name not in SCALES:
            return False
        producer = self.producers.get(self.active(node)[0])
        return producer is not None and producer.name in MEANS and self._divided(producer)

    def _divided(self, node: Node) -> bool:
        user = self.only_user(node.outs[0])
        return (
            user is not None
            and user.name in SCALES
            and len(self.active(user)) == 1
            and user.ins[0] is node.outs[0]
            and user.outs[0] in self.carrying
        )

    # Elementwise functions.

    def _activation(self, node: Node) -> Iterator[Operation]:
        """The function that ends here; of x + f(x) it is f, and the sum is one of its own."""
        bent = [v for v in self.active(node) if self.facts[v].nonlinear]
        if node.name in SUMS and len(self.active(node)) == 2 and len(bent) == 1:
            yield from self._activation(self.producers[bent[0]])
            yield self.make(Operation, node, kind="add")
        elif node not in self.taken:
            self.taken.add(node)
            yield self._elementwise(node)

    def _leaves(self, node: Node) -> bool:
        """Whether the value is used outside of the elementwise function it is part of."""
        out = node.outs[0]
        root = self.facts[out].root
        for user in self.users.get(out, ()):
            if user is None:
                return True
            carries = [value for value in user.outs if value in self.carrying]
            if carries and any(self.facts[value].root is not root for value in carries):
                return True
        return False

    def _elementwise(self, node: Node) -> Elementwise:
        root = self.facts[node.outs[0]].root
        assert root is not None
        inside: set[Node] = set()
        todo = [node]
        while todo:
            one = todo.pop()
            inside.add(one)
            values = [v for v in self.active(one) if v is not root]
            todo += [self.producers[v] for v in values if self.producers[v] not in inside]
        nodes = [one for one in self.graph.nodes if one in inside]
        start, nodes = self._past_affine(root, nodes)
        shift = self.producers.get(start)
        if shift is not None and self.shifts_gate(shift):
            (start,), nodes = self.active(shift), [shift, *nodes]
        nodes = self._without_sum(start, nodes)
        samples = self._sampled(start, nodes[-1].outs[0])
        return self.block(Elementwise, "activation", nodes[-1], start, nodes, samples=samples)

    def _without_sum(self, start: Value, nodes: list[Node]) -> list[Node]:
        """The function without a number that is added to it, if it is 0 at 0 only so."""
        last = nodes[-1]
        if last.name not in SUMS or len(self.active(last)) != 1 or len(nodes) == 1:
            return nodes
        (before,) = self.active(last)
        whole, bare = (self._sampled(start, out) for out in (last.outs[0], before))
        added = before is nodes[-2].outs[0] and bare.keeps_zero
        added = added and not (whole.keeps_zero or whole.is_gate)
        return self._without_sum(start, nodes[:-1]) if added else nodes

    def shifts_gate(self, node: Node) -> bool:
        """Whether the node adds a number that belongs to a gate after it.

        The 3 of relu6(x + 3) / 6 is no bias: the function as a whole is a sigmoid.
        """
        if node not in self._shifts:
            self._shifts[node] = self._shifts_gate(node)
        return self._shifts[node]

    def _shifts_gate(self, node: Node) -> bool:
        known = [isinstance(atom, Constant) for atom in node.ins]
        if node.name not in SUMS or sum(known) != 1 or len(self.active(node)) != 1:
            return False
        out = node.outs[0]
        made, ends = {out}, []
        for one in self.graph.nodes:
            if made & {*self.active(one)} and self.facts[out].root is self._root_of(one):
                made.update(one.outs)
                ends += [one.outs[0]] if self._leaves(one) else []
        bent = all(self.facts[end].nonlinear for end in ends)
        gates = (self._sampled(out, end).is_gate for end in ends)
        return bool(ends) and bent and all(gates)

    def _root_of(self, node: Node) -> Value | None:
        return self.facts[node.outs[0]].root

    def _past_affine(self, root: Value, nodes: list[Node]) -> tuple[Value, list[Node]]:
        """Split off what is affine: a bias added before an activation is not part of it.

        The split is at the last value that is affine in the root and through which every path
        to the output leads.
        """
        values = [root, *(node.outs[0] for node in nodes)]
        place = {value: i for i, value in enumerate(values)}
        reach = [0] * len(values)
        for i, node in enumerate(nodes, start=1):
            for value in self.active(node):
                reach[place[value]] = max(reach[place[value]], i)
        split, furthest = 0, 0
        for i, value in enumerate(values[:-1]):
            if furthest <= i and (i == 0 or not self.facts[value].nonlinear):
                split = i
            furthest = max(furthest, reach[i])
        return values[split], nodes[split:]
