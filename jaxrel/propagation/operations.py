"""The operations of a graph, as LRP sees them: what a rule is chosen for.

An operation may be several nodes: a matrix product with its bias; a convolution with the batch
normalisation that follows; the dozen nodes of a GELU. They are found by what they compute, with
the facts of the values (`jaxrel.tracing.facts`), not by names.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from jaxrel.tracing import primitives
from jaxrel.tracing.facts import Facts, active_ins, fact_of, is_elementwise, is_relu
from jaxrel.tracing.flow import Backward, operands
from jaxrel.tracing.graph import Atom, Constant, Graph, Node, Value, tag_name
from jaxrel.tracing.patterns import softmaxes
from jaxrel.tracing.primitives import (
    ADD,
    BROADCAST,
    CONV,
    CUSTOM_JVP,
    DIV,
    DOT,
    ELEMENTWISE,
    EXACT,
    LINEAR,
    LINEAR_IN,
    MAXIMA,
    MEANS,
    MOVES,
    REDUCE_PROD,
    REDUCTIONS,
    ROOTS,
    SCALES,
    SUB,
    SUMS,
    TRANSPOSE,
)

_IN_SOFTMAX = ELEMENTWISE | MOVES | REDUCTIONS


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Operation:
    """One operation that carries relevance.

    Attributes:
      kind: see `jaxrel.op`; the primitive's name for operations LRP does not know.
      node: the node that computes the operation's output.
      paths: the parameters it reads.
      first: a linear operation with no other before it.
      layer: its layer's index, if it is in a stack (see `jaxrel.layer`).
      stack: (start, stop, length) of the part of a scanned stack that the operation stands for.
    """

    kind: str
    node: Node
    paths: tuple[str, ...] = ()
    first: bool = False
    layer: int | None = None
    stack: tuple[int, int, int] | None = None

    @property
    def layers(self) -> int | None:
        """How many layers its stack has, if that is known."""
        return self.stack[2] if self.stack else None

    @property
    def name(self) -> str:
        """The primitive that names the operation."""
        return self.node.name

    def where(self) -> str:
        """The user's source line."""
        return self.node.where()


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Linear(Operation):
    """z = moves(core(x, w * scales)) + bias, plus `beside`, a summand of its own.

    `bias` lists the (node, operand) pairs that add, subtract, multiply or divide, in order;
    those that scale are there only where a normalisation is folded into the weight. `features`
    pairs the axes of z that come from the weight with the weight's own.
    """

    core: Node
    x: Value
    w: Atom
    moves: tuple[Node, ...] = ()
    bias: tuple[tuple[Node, Atom], ...] = ()
    features: tuple[tuple[int, int], ...] = ()
    beside: Value | None = None
    nonneg: bool = False
    relu_after: bool = False

    @property
    def name(self) -> str:
        """The primitive of the linear map itself."""
        return self.core.name

    @property
    def folded(self) -> bool:
        """Whether a normalisation with constant statistics is part of it."""
        return any(node.name in SCALES for node, _ in self.bias)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class BatchNorm(Linear):
    """z = x scale + shift with constants for each feature, where it is no part of a linear map.

    `bias` lists all that scales and shifts, in order; `core` and `w` are the first that scales.
    """


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Block(Operation):
    """Several nodes that are one function of one value, `start`, such as a softmax."""

    start: Value
    nodes: tuple[Node, ...]
    consts: tuple[Value, ...]

    def function(self) -> Callable:
        """(start, consts) -> output."""
        (out,) = self.node.outs

        def f(x, consts):
            known = {self.start: x, **dict(zip(self.consts, consts, strict=True))}
            return _run(self.nodes, known)[out]

        return f


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Elementwise(Block):
    """An elementwise function of one value."""

    @property
    def name(self) -> str:
        """The names of the primitives, or of the function that JAX gives a derivative."""
        return "+".join(primitives.function_name(node.equation) for node in self.nodes)

    @property
    def is_relu(self) -> bool:
        """Whether the derivative is Pass already."""
        return len(self.nodes) == 1 and is_relu(self.nodes[0])

    def scalar(self) -> Callable | None:
        """The function of one number, if it depends on nothing else."""
        (out,) = self.node.outs
        return (
            None if self.consts else lambda x: _run(self.nodes, {self.start: x}, opened=True)[out]
        )


def _run(nodes: Iterable[Node], known: dict[Value, Any], opened: bool = False) -> dict[Value, Any]:
    """Compute nodes in order; `opened` runs the bodies of calls, which fit any shape."""
    env = dict(known)

    def read(atom: Atom) -> Any:
        return atom.value if isinstance(atom, Constant) else env[atom]

    for node in nodes:
        ins = list(map(read, node.ins))
        if opened and node.name in CUSTOM_JVP:
            (body,) = node.bodies
            inner = _run(body.nodes, dict(zip(body.ins, ins, strict=True)), opened)
            outs = [a.value if isinstance(a, Constant) else inner[a] for a in body.outs]
        else:
            outs = node.bind(*ins)
        env.update(zip(node.outs, outs, strict=True))
    return env


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Product(Operation):
    """A product of values that both carry relevance, and whether each is a gate."""

    gates: tuple[str, ...]


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
    producers = graph.producers()
    found: dict[Node, tuple[Value, set[Node]]] = {}
    for last, scores in softmaxes(graph):
        inside: set[Node] = set()
        todo = [last]
        while todo:
            node = todo.pop()
            if node in inside:
                continue
            inside.add(node)
            made = (producers.get(v) for v in active_ins(facts, node) if v is not scores)
            todo += [one for one in made if one is not None and one.name in _IN_SOFTMAX]
        found[last] = scores, inside
    return found


def norm_nodes(graph: Graph, facts: Facts) -> list[Node]:
    """Roots of statistics that then divide or multiply a value: standard deviations, norms.

    A model whose output itself is a norm has none: its root scales nothing.
    """
    users = graph.users()
    roots = [
        node
        for node in graph.nodes
        if node.name in ROOTS and facts[node.outs[0]].active and facts[node.outs[0]].stat
    ]
    # The roots, and what is made of roots alone, such as the product of two norms.
    sizes = {node.outs[0] for node in roots}
    for node in graph.nodes:
        ins = active_ins(facts, node)
        if ins and sizes.issuperset(ins) and (is_elementwise(node) or node.name in MOVES):
            sizes.update(node.outs)
    return [node for node in roots if _scales(node.outs[0], users, facts, sizes)]


def _scales(value: Value, users: dict[Value, list[Node]], facts: Facts, sizes: set[Value]) -> bool:
    """Whether a size multiplies or divides something that is none."""
    for node in users.get(value, ()):
        if node.name in SCALES and any(v not in sizes for v in active_ins(facts, node)):
            return True
        if node.outs[0] in sizes and _scales(node.outs[0], users, facts, sizes):
            return True
    return False


def operations(
    graph: Graph, facts: Facts, carrying: set[Value], apart: Callable[[Operation], bool]
) -> Iterator[Operation]:
    """Every operation that carries relevance, bodies included, in order of execution.

    `apart` says of a batch normalisation whether it is an operation of its own.
    """
    yield from _Finder(graph, facts, carrying, apart, None).find()


def stacked(node: Node, facts: Facts) -> bool:
    """Whether a scan runs over layers: some of what it scans over are parameters."""
    if node.scan is None:
        return False
    known = (fact_of(facts, x) for x in operands(node, node.ins).scanned)
    return any(fact.paths and not fact.active for fact in known)


class _Finder:
    """The operations of one graph or body."""

    def __init__(
        self,
        graph: Graph,
        facts: Facts,
        carrying: set[Value],
        apart: Callable[[Operation], bool],
        stack: tuple[int, int, int] | None,
    ):
        self.graph, self.facts, self.carrying = graph, facts, carrying
        self.apart, self.stack = apart, stack
        self.producers = graph.producers()
        self.softmaxes = softmax_nodes(graph, facts)
        self.norms = norm_nodes(graph, self.facts)
        self.users: dict[Value, list[Node | None]] = {
            value: list(nodes) for value, nodes in graph.users().items()
        }
        for atom in graph.outs:
            if isinstance(atom, Value):
                self.users.setdefault(atom, []).append(None)
        softmaxes = (inside for _, inside in self.softmaxes.values())
        self.inside = set().union(*softmaxes, *map(self._statistic, self.norms))
        self.parts: set[Node] = set()
        # A sum that a linear operation has taken in, and the node that then computes it.
        self.sums: dict[Node, Node] = {}

    def find(self) -> Iterator[Operation]:
        for node in self.graph.nodes:
            if node.is_open:
                yield from self._control(node)
            elif any(out in self.carrying for out in node.outs):
                yield from self._of(node)

    def _control(self, node: Node) -> Iterator[Operation]:
        if node.scan is None:
            for body in node.bodies:
                yield from self._inside(body, self.stack)
            return
        for start, stop, body in node.segments():
            inner = self.stack
            if stacked(node, self.facts):
                inner = (start, stop, node.scan.length)
            yield from self._inside(body, inner)

    def _inside(self, body: Graph, stack: tuple[int, int, int] | None) -> Iterator[Operation]:
        yield from _Finder(body, self.facts, self.carrying, self.apart, stack).find()

    def _of(self, node: Node) -> Iterator[Operation]:
        active = active_ins(self.facts, node)
        out = self.facts[node.outs[0]]
        if not active or tag_name(node):
            return
        if any(v.aval.dtype.kind == "c" for v in [*active, *node.outs]):
            yield self._make(Operation, node, kind=node.name)
        elif node in self.softmaxes:
            scores, inside = self.softmaxes[node]
            yield self._block(Block, "softmax", node, scores, inside)
        elif node in self.norms:
            yield self._make(Operation, node, kind="norm")
        elif node in self.inside or self._is_move(node, active):
            return
        elif node.name in LINEAR and len(active) == 1:
            yield from self._linear(node)
        elif node.name in LINEAR or (
            node.name in SCALES and len(active) == 2 and self._apart(node)
        ):
            gates = tuple(self.facts[v].gate for v in active)
            kind = "matmul" if node.name in LINEAR else "product"
            yield self._make(Product, node, kind=kind, gates=gates)
        elif node.name in REDUCE_PROD:
            yield self._make(Product, node, kind="product", gates=())
        elif out.root is not node.outs[0] and is_elementwise(node):
            if out.nonlinear and self._leaves(node):
                yield from self._activation(node)
            elif self._is_mean(node):
                yield self._make(Operation, node, kind="mean")
        elif node.name in SUMS and len(active) == 2:
            yield self._make(Operation, self.sums.get(node, node), kind="add")
        elif node.name in MEANS and not self._divided(node):
            yield self._make(Operation, node, kind="mean")
        elif node.name in MAXIMA:
            yield self._make(Operation, node, kind="max_pool")
        elif node.name not in EXACT and not self._is_scaling(node, active):
            yield self._make(Operation, node, kind=node.name)

    def _make(self, kind_of: type, node: Node, *, paths: frozenset[str] = frozenset(), **fields):
        names = tuple(sorted(paths))
        layer = self.stack[0] if self.stack else _layer_in(names)
        return kind_of(node=node, paths=names, layer=layer, stack=self.stack, **fields)

    def _is_move(self, node: Node, active: list[Value]) -> bool:
        """Whether a linear map's weights are written into the program, as a resize's are."""
        if node.name in LINEAR_IN:
            return active == [node.ins[LINEAR_IN[node.name]]]
        others = [fact_of(self.facts, atom) for atom in node.ins if atom not in active]
        return node.name in LINEAR and len(active) == 1 and all(f.literal for f in others)

    def _statistic(self, norm: Node) -> set[Node]:
        """What computes a statistic: its derivative is one thing, not a rule for each node."""
        inside: set[Node] = set()
        todo = [norm]
        while todo:
            node = todo.pop()
            inside.add(node)
            made = (self.producers.get(v) for v in active_ins(self.facts, node))
            for producer in made:
                if producer is None or producer in inside or len(producer.outs) != 1:
                    continue
                fact = self.facts[producer.outs[0]]
                users = self.users[producer.outs[0]]
                own = fact.nonlinear and all(user in inside for user in users)
                if fact.stat or (node.name in REDUCTIONS and own):
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
        producer = self.producers.get(active_ins(self.facts, node)[0])
        return producer is not None and producer.name in MEANS and self._divided(producer)

    def _divided(self, node: Node) -> bool:
        user = self._only_user(node.outs[0])
        return (
            user is not None
            and user.name in SCALES
            and len(active_ins(self.facts, user)) == 1
            and user.ins[0] is node.outs[0]
            and user.outs[0] in self.carrying
        )

    def _only_user(self, value: Value) -> Node | None:
        users = self.users.get(value, [])
        return users[0] if len(users) == 1 else None

    # Linear operations.

    def _linear(self, core: Node) -> Iterator[Linear]:
        """The linear map, and its batch normalisation if that is an operation of its own."""
        x = active_ins(self.facts, core)[0]
        position = core.ins.index(x)
        w = core.ins[1 - position]
        beside = None
        end, moves = self._moved(core)
        features = moved_axes(feature_axes(core, position), moves)
        bias = self._normalisation(end, features)
        norm = self._batch_norm(bias)
        if norm is not None:
            bias = bias[: -len(norm.bias)]
        elif not bias:
            end, bias, beside = self._bias(end)
        if bias:
            end = bias[-1][0]
        else:
            end, moves = core, []
        out = end.outs[0]
        users = self.users.get(out, [])
        fact = fact_of(self.facts, w)
        yield self._make(
            Linear,
            end,
            kind="dense" if core.name in DOT else "conv",
            paths=fact.paths,
            first=self.facts[x].fresh,
            core=core,
            x=x,
            w=w,
            moves=tuple(moves),
            bias=tuple(bias),
            features=tuple(features.items()),
            beside=beside,
            nonneg=self.facts[x].nonneg,
            relu_after=beside is None
            and bool(users)
            and all(user is not None and is_relu(user) for user in users),
        )
        if norm is not None:
            yield norm

    def _moved(self, node: Node) -> tuple[Node, list[Node]]:
        """Past the moves that the node's output goes through, each used once."""
        moves: list[Node] = []
        while True:
            user = self._only_user(node.outs[0])
            moved = user is not None and user.name in MOVES and not tag_name(user)
            if not moved or user is None or user.name in BROADCAST:
                return node, moves
            node = user
            moves.append(user)

    def _bias(self, end: Node) -> tuple[Node, list[tuple[Node, Atom]], Value | None]:
        found: list[tuple[Node, Atom]] = []
        while (user := self._only_user(end.outs[0])) is not None and user.name in SUMS:
            operand = self._added(user, end.outs[0])
            if operand is None:
                break
            found.append((user, operand))
            end = user
        if found or user is None or user.name not in SUMS:
            return end, found, None
        # x + h @ W + b is read as (x + h @ W) + b: the bias belongs to the product.
        last = self._only_user(user.outs[0])
        if user.name in SUB or last is None or last.name not in SUMS:
            return end, [], None
        operand = self._added(last, user.outs[0])
        beside = next((v for v in user.ins if v is not end.outs[0]), None)
        same = all(v.shape == last.outs[0].shape for v in (end.outs[0], user.outs[0]))
        if operand is None or not isinstance(beside, Value) or last in self.parts or not same:
            return end, [], None
        self.parts.add(last)
        self.sums[user] = last
        return last, [(last, operand)], beside

    def _added(self, node: Node, value: Value) -> Atom | None:
        """What the node adds to (or subtracts from) a value, if that is a constant."""
        if node.name in SUB and node.ins[0] is not value:
            return None
        others = [atom for atom in node.ins if atom is not value]
        if len(others) != 1 or fact_of(self.facts, others[0]).active:
            return None
        return others[0] if node.outs[0].shape == value.shape else None

    def _normalisation(self, end: Node, features: dict[int, int]) -> list[tuple[Node, Atom]]:
        """Additions and per-feature scalings after a linear map: batch normalisation."""
        chain: list[tuple[Node, Atom]] = []
        value = end.outs[0]
        while (user := self._only_user(value)) is not None:
            if user.name in SUMS:
                operand = self._added(user, value)
            elif user.name in SCALES:
                operand = self._scaled(user, value, features)
            else:
                operand = None
            if operand is None:
                break
            chain.append((user, operand))
            value = user.outs[0]
        while chain and chain[-1][0].name in SCALES and chain[-1][1].shape == ():
            chain.pop()
        scaled = [node.name in SCALES for node, _ in chain]
        if all(scaled) or not any(scaled):
            return []
        if not scaled[-1]:
            # Additions after the last scaling but one are not the normalisation's.
            last = max(i for i, is_scale in enumerate(scaled) if is_scale)
            chain = chain[: last + 2]
        return chain

    def _batch_norm(self, chain: Sequence[tuple[Node, Atom]]) -> BatchNorm | None:
        """What scales and shifts the features in a normalisation, if it is an operation apart.

        What is added before it is the linear map's bias; what is subtracted is a mean.
        """
        bias = [*itertools.takewhile(lambda term: term[0].name in ADD, chain)]
        terms = tuple(chain[len(bias) :])
        scales = [(node, k) for node, k in terms if node.name in SCALES and k.shape != ()]
        if not scales or all(node.name in SCALES for node, _ in terms):
            return None
        first, operand = terms[0]
        (x,) = (atom for atom in first.ins if atom is not operand)
        assert isinstance(x, Value)
        norm = self._make(
            BatchNorm,
            terms[-1][0],
            kind="batch_norm",
            paths=frozenset().union(*(fact_of(self.facts, k).paths for _, k in terms)),
            core=scales[0][0],
            x=x,
            w=scales[0][1],
            bias=terms,
        )
        return norm if self.apart(norm) else None

    def _scaled(self, node: Node, value: Value, features: dict[int, int]) -> Atom | None:
        if node.ins[0] is not value and node.name in DIV:
            return None
        others = [atom for atom in node.ins if atom is not value]
        if len(others) != 1 or fact_of(self.facts, others[0]).active:
            return None
        shape = others[0].shape
        fits = shape == () or (
            len(shape) == len(value.shape)
            and all(n == 1 or axis in features for axis, n in enumerate(shape))
        )
        return others[0] if fits and node.outs[0].shape == value.shape else None

    # Elementwise functions.

    def _activation(self, node: Node) -> Iterator[Operation]:
        """The function that ends here; of x + f(x) it is f, and the sum is one of its own."""
        bent = [v for v in active_ins(self.facts, node) if self.facts[v].nonlinear]
        if node.name in SUMS and len(active_ins(self.facts, node)) == 2 and len(bent) == 1:
            yield from self._activation(self.producers[bent[0]])
            yield self._make(Operation, node, kind="add")
        elif node not in self.parts:
            self.parts.add(node)
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
            values = [v for v in active_ins(self.facts, one) if v is not root]
            todo += [self.producers[v] for v in values if self.producers[v] not in inside]
        nodes = [one for one in self.graph.nodes if one in inside]
        start, nodes = self._past_affine(root, nodes)
        return self._block(Elementwise, "activation", node, start, nodes)

    def _block(self, block: type, kind: str, node: Node, start: Value, nodes: Iterable[Node]):
        inside = set(nodes)
        ordered = tuple(one for one in self.graph.nodes if one in inside)
        made = {out for one in ordered for out in one.outs} | {start}
        reads = dict.fromkeys(a for one in ordered for a in one.ins if isinstance(a, Value))
        consts = tuple(value for value in reads if value not in made)
        return self._make(block, node, kind=kind, start=start, nodes=ordered, consts=consts)

    def _past_affine(self, root: Value, nodes: list[Node]) -> tuple[Value, list[Node]]:
        """Split off what is affine: a bias added before an activation is not part of it.

        The split is at the last value that is affine in the root and through which every path
        to the output leads.
        """
        values = [root, *(node.outs[0] for node in nodes)]
        place = {value: i for i, value in enumerate(values)}
        reach = [0] * len(values)
        for i, node in enumerate(nodes, start=1):
            for value in active_ins(self.facts, node):
                reach[place[value]] = max(reach[place[value]], i)
        split, furthest = 0, 0
        for i, value in enumerate(values[:-1]):
            if furthest <= i and (i == 0 or not self.facts[value].nonlinear):
                split = i
            furthest = max(furthest, reach[i])
        return values[split], nodes[split:]


def feature_axes(core: Node, position: int) -> dict[int, int]:
    """Axes of a linear map's output that come from its weight, and the weight's axes."""
    if core.name in CONV:
        return dict([primitives.conv_features(core.equation)]) if position == 0 else {}
    contract, batch = primitives.contraction(core.equation)
    side = 1 - position
    taken = {*contract[side], *batch[side]}
    free = [axis for axis in range(len(core.ins[side].shape)) if axis not in taken]
    other = {*contract[position], *batch[position]}
    lead = len(batch[0])
    if side == 1:
        lead += len(core.ins[0].shape) - len(other)
    return {lead + i: axis for i, axis in enumerate(free)}


def moved_axes(axes: dict[int, int], moves: Iterable[Node]) -> dict[int, int]:
    """Where axes lie after moves; none where a reshape takes one apart."""
    for node in moves:
        before, after = node.ins[0].shape, node.outs[0].shape
        if node.name in TRANSPOSE:
            order = primitives.permutation(node.equation)
            axes = {order.index(axis): to for axis, to in axes.items()}
        elif before != after:
            # From the front or from the back, whichever side is left as it was.
            new: dict[int, int] = {}
            for axis, to in axes.items():
                back = axis - len(before)
                if before[: axis + 1] == after[: axis + 1]:
                    new[axis] = to
                elif len(after) + back >= 0 and before[back:] == after[back:]:
                    new[len(after) + back] = to
                else:
                    return {}
            axes = new
    return axes


def _layer_in(paths: Sequence[str]) -> int | None:
    """The first number in a parameter's path: 'blocks/3/kernel', 'block_3/kernel'."""
    for path in paths:
        for part in path.split("/"):
            if match := re.fullmatch(r"(?:.*_)?(\d+)", part):
                return int(match[1])
    return None
