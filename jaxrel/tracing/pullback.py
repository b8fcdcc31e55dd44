"""One traced call, run forward once and then backward: what every kind of relevance drives.

`pullback` is `jax.vjp` of a graph with edits. Cotangents come back for chosen arguments, for tapped
values, and for the carrier that interceptors thread through the program. `Call` knows which leaves
of a call's arguments are explained, and puts results back into the arguments' structure.
"""

import dataclasses
import inspect
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax import numpy as jnp

from jaxrel.tracing.evaluate import Edits, Evaluated, evaluate, tap_shapes
from jaxrel.tracing.facts import inexact
from jaxrel.tracing.flow import dependents, looked_up
from jaxrel.tracing.graph import Graph, Traced, Value, trace
from jaxrel.tracing.modules import pure, split
from jaxrel.tracing.primitives import RANDOM
from jaxrel.tracing.sharding import shaped_like, zeros


class PulledBack(NamedTuple):
    """Cotangents: of the chosen arguments, of taps by name, and of the initial carrier."""

    args: list
    taps: dict[str, Any]
    carrier: Any


def pullback(
    graph: Graph,
    args: Sequence,
    edits: Edits | None = None,
    *,
    by: Sequence[int] = (),
    carrier: Any = None,
) -> tuple[Evaluated, Callable[..., PulledBack]]:
    """Run a graph forward, and make the function that goes backward through it.

    Args:
      graph, args, edits, carrier: as for `evaluate`.
      by: the arguments whose cotangents are wanted, by place.

    Returns:
      `(evaluated, back)`. `back(c, carrier=None)` takes the cotangent of the first output and that
      of the final carrier, by default zeros; it may be called several times, and under `vmap`.
    """
    edits = edits or Edits()
    # Inside of a program that is traced, what is new is an equation of it, not an array.
    edits = dataclasses.replace(edits, once=isinstance(jnp.zeros(()), jax.core.Tracer))
    shapes = tap_shapes(graph, edits.taps)

    def run(xs, probes, carrier):
        values = list(args)
        for i, x in zip(by, xs, strict=True):
            values[i] = x
        result = evaluate(graph, values, edits, probes=probes, carrier=carrier)
        return (result.outs[0], result.carrier), result

    # The derivative by a probe of zeros is the derivative by the value that it is added to.
    probes = {name: zeros(shape) for name, shape in shapes.items()}
    (_, carried), pull, result = jax.vjp(run, [args[i] for i in by], probes, carrier, has_aux=True)

    def back(c: Any, carrier: Any = None) -> PulledBack:
        still = jax.tree.map(jnp.zeros_like, carried) if carrier is None else carrier
        return PulledBack(*pull((c, still)))

    return result, back


@dataclasses.dataclass(frozen=True)
class Call:
    """A traced call, and which of its arguments are explained.

    Attributes:
      caller: whose call it is, for errors.
      fun: the function.
      args: its arguments; what is no number in them (booleans, strings, functions) left out.
      argnums: the explained arguments.
      single: whether one was asked for, not several.
      traced: the graph and its flat arguments, the leaves.
      owner: by leaf, the argument that it belongs to.
      paths: by leaf, its path in the argument; a bare array is named after its parameter.
    """

    caller: str
    fun: Callable
    args: tuple[Any, ...]
    argnums: tuple[int, ...]
    single: bool
    traced: Traced
    owner: tuple[int, ...]
    paths: tuple[str, ...]

    @classmethod
    def of(
        cls,
        caller: str,
        fun: Callable,
        args: tuple,
        argnums: Any,
        has_aux: bool | None = None,
        tokens: bool = False,
    ) -> "Call":
        """Trace a call and check what it explains; see `check_output` for `has_aux`.

        With `tokens`, integers may be explained that look up rows of a table.
        """
        chosen = _explained_arguments(caller, argnums, args)
        parts = [split(arg) for arg in args]
        args = tuple(arg for arg, _ in parts)
        whole = pure(fun)

        def call_fun(*args):
            return whole(*(merge(arg) for (_, merge), arg in zip(parts, args, strict=True)))

        traced = trace(call_fun, *args)
        check_output(caller, traced, has_aux)
        leaves = leaf_paths(fun, args)
        call = cls(
            caller=caller,
            fun=fun,
            args=args,
            argnums=chosen,
            single=isinstance(argnums, int),
            traced=traced,
            owner=tuple(index for index, _ in leaves),
            paths=tuple(path for _, path in leaves),
        )
        if chosen and not call.explained() and not (tokens and call.rows()):
            raise TypeError(_no_numbers(caller, [traced.args[i] for i in call.chosen()]))
        return call

    def chosen(self) -> list[int]:
        """The leaves of the explained arguments, argument by argument."""
        return [i for index in self.argnums for i, own in enumerate(self.owner) if own == index]

    def explained(self) -> list[int]:
        """Those of them that are real numbers."""
        leaves = self.traced.args
        return [i for i in self.chosen() if jnp.issubdtype(leaves[i].dtype, jnp.floating)]

    def rows(self) -> list[tuple[int, Value]]:
        """By leaf, what integers look up in tables, where that is all that is explained."""
        graph, leaves = self.traced.graph, self.traced.args
        if self.explained():
            return []
        return [
            (i, row)
            for i in self.chosen()
            if jnp.issubdtype(leaves[i].dtype, jnp.integer)
            for row in looked_up(graph, dependents(graph, [graph.ins[i]]))
            if row.shape[: leaves[i].ndim] == leaves[i].shape
        ]

    def gather(self, found: Mapping[int, Any]) -> Any:
        """Results by leaf in the structure that is explained; zeros where there is none."""
        leaves = [
            found[i] if i in found else zeros(shaped_like(self.traced.args[i], dtype=jnp.float32))
            for i in self.chosen()
        ]
        return jax.tree.unflatten(self.structure(), leaves)

    def structure(self) -> Any:
        """The tree of the explained argument, or of the tuple of several."""
        many = tuple(self.args[index] for index in self.argnums)
        return jax.tree.structure(many[0] if self.single else many)


def _no_numbers(caller: str, leaves: Sequence) -> str:
    """What to explain in the place of integers: an image as reals, or a token's embedding."""
    kinds = ", ".join(sorted({str(leaf.dtype) for leaf in leaves})) or "nothing"
    text = f"{caller}: the explained argument holds no real numbers ({kinds}); "
    if leaves and all(leaf.dtype == jnp.uint8 for leaf in leaves):
        return text + (
            "cast the images, x.astype(jnp.float32), and explain the function of the cast ones; "
            "or in jaxrel.lrp mark them where the function casts them, "
            "jaxrel.tag(images, 'pixels'), and ask for argnums=None, at='pixels'"
        )
    return text + (
        "explain a real one, such as the embedding of integer tokens, where it is: "
        "mark it, jaxrel.tag(embedding, 'embed'), and ask for "
        "argnums=None, at='embed'"
    )


def _explained_arguments(caller: str, argnums: Any, args: tuple) -> tuple[int, ...]:
    """The places of the explained arguments; ValueError for one that is not there."""
    chosen = (argnums,) if isinstance(argnums, int) else tuple(argnums or ())
    for index in chosen:
        if not -len(args) <= index < len(args):
            raise ValueError(
                f"{caller}: argnums={argnums}, but the function was called with {len(args)} "
                "argument(s)"
            )
    return tuple(index % len(args) for index in chosen)


def leaf_paths(fun: Callable, args: tuple) -> list[tuple[int, str]]:
    """(argument, path) of every leaf; a bare array is named after the function's parameter."""
    try:
        names = list(inspect.signature(fun).parameters)
    except (TypeError, ValueError):
        names = []
    found = []
    for index, arg in enumerate(args):
        name = names[index] if index < len(names) else f"argument{index}"
        leaves = jax.tree_util.tree_flatten_with_path(arg)[0]
        found += [(index, path_of(key) or name) for key, _ in leaves]
    return found


def path_of(key: Any) -> str:
    """A leaf's path in a tree, its parts joined by '/'."""
    path = jax.tree_util.keystr(key, simple=True, separator="/")
    # An NNX variable's array is a leaf of its own.
    return path.removesuffix("/value")


def check_output(caller: str, traced: Traced, has_aux: bool | None = None) -> None:
    """TypeError unless a traced function returns one real array, or with `has_aux` (array, aux).

    None is for callers that cannot be told of an aux.
    """
    avals = [atom.aval for atom in traced.graph.outs]
    if has_aux:
        data = traced.out_tree.node_data()
        parts = traced.out_tree.children() if data and data[0] is tuple else []
        if len(parts) != 2:
            raise TypeError(f"{caller}: with has_aux the function must return (output, aux)")
        avals = avals[: parts[0].num_leaves]
    if len(avals) == 1 and jnp.issubdtype(avals[0].dtype, jnp.floating):
        _warn_of_dropout(caller, traced.graph)
        return
    got = ", ".join(aval.str_short() for aval in avals) or "nothing"
    aux = "" if has_aux is None else ", or say has_aux=True for (output, aux)"
    raise TypeError(
        f"{caller}: the function must return one real array, such as logits or one score per "
        f"example, but it returned {got}; wrap it, as in lambda x: fun(x)[0]{aux}"
    )


def _warn_of_dropout(caller: str, graph: Graph) -> None:
    """Warn of masks that are drawn at random, whatever the data are."""
    draws = [out for node in graph.walk() if node.name in RANDOM for out in node.outs]
    if not draws:
        return
    drawn = dependents(graph, draws)
    drawn -= dependents(graph, [value for value in graph.ins if inexact(value)])
    for node in graph.walk():
        if any(out in drawn and out.aval.dtype == bool for out in node.outs):
            warnings.warn(
                f"{caller}: the function draws a random mask at {node.where()}, as dropout does, "
                "and what is explained is the function with this mask; turn dropout off, as with "
                "model.eval() of Flax NNX, deterministic=True of Linen or "
                "equinox.nn.inference_mode(model)",
                stacklevel=2,
            )
            return


def as_seed(caller: str, out: Any, seed: Any, what: str) -> Any:
    """The seed, or what it says of the output if it is a function, as an array of its shape.

    `what` it is of the output, 'relevance' or 'cotangent', is for the error.
    """
    seed = jnp.asarray(seed(out) if callable(seed) else seed)
    if seed.shape != out.shape:
        one = "jax.nn.one_hot(target, classes)"
        raise ValueError(
            f"{caller}: the seed has shape {seed.shape} and the output {out.shape}; the seed is "
            f"the output's {what}, such as {one if what == 'cotangent' else one + ' * logits'}"
        )
    return seed


def seed_of(caller: str, seed: Any, target: Any, *, relevance: bool) -> Any:
    """The seed that explains a target, an index along the output's last axis, or the seed given.

    Args:
      caller: the function to name in an error.
      seed: as of the caller; None where a target is given.
      target: an int, or integers of the output's shape without its last axis.
      relevance: whether a seed is relevance, the target's output, or a cotangent, 1.

    Raises:
      ValueError: both are given, or the target does not fit the output (of a known one, also its
        range).
      TypeError: the target is no integer.
    """
    if target is None:
        return seed
    if seed is not None:
        raise ValueError(f"{caller}: give seed=, an array, or target=, an index; not both")
    given = target
    target = target if isinstance(target, jax.Array) else np.asarray(target)
    if not jnp.issubdtype(target.dtype, jnp.integer):
        raise TypeError(
            f"{caller}: target must be an index along the output's last axis, or one for each "
            f"example, got {given!r}"
        )

    def of(out: Any) -> Any:
        shape = jnp.shape(target)
        if not out.shape or shape not in ((), out.shape[:-1]):
            raise ValueError(
                f"{caller}: target has shape {shape} and the output {out.shape}; give one index "
                "along its last axis, or one for each entry of the other axes"
            )
        count = out.shape[-1]
        if not isinstance(target, jax.core.Tracer):
            with jax.ensure_compile_time_eval():
                lost = bool(
                    jnp.any((jnp.asarray(target) < -count) | (jnp.asarray(target) >= count))
                )
            if lost:
                raise ValueError(f"{caller}: target {target} does not exist; there are {count}")
        index = jnp.asarray(target) % count
        chosen = (jnp.arange(count) == jnp.expand_dims(index, -1)).astype(out.dtype)
        chosen = jnp.broadcast_to(chosen, out.shape)
        return chosen * out if relevance else chosen

    return of


def seed_cotangent(caller: str, out: Any, seed: Any) -> Any:
    """The output's cotangent that a seed says, in the output's dtype; ones by default."""
    if seed is None:
        return jnp.ones_like(out)
    return as_seed(caller, out, seed, "cotangent").astype(out.dtype)
