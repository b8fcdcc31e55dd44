"""`lrp`: layer-wise relevance propagation as a transformation, as `grad` is one."""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import numpy as np
from jax import numpy as jnp

from jaxrel.propagation.assignment import Prepared, prepare
from jaxrel.propagation.composites import Where, as_composite
from jaxrel.tracing.capture import find_tags, gather, tap_names
from jaxrel.tracing.evaluate import Edits, Interceptor, evaluate, tap_shapes
from jaxrel.tracing.facts import Fact
from jaxrel.tracing.graph import Traced, Value, trace
from jaxrel.tracing.sharding import shaped_like, zeros

Unknown = Literal["error", "warn"]


def lrp(
    fun: Callable,
    rules: Any,
    *,
    argnums: int | Sequence[int] | None = 0,
    has_aux: bool = False,
    at: Any = (),
    unknown: Unknown = "error",
) -> Callable:
    """Make a function return the relevance of its input for its output.

    One forward and one backward pass through the user's own function, whose derivative is
    replaced, operation by operation, by the rules (Bach et al. 2015). What adds, moves or
    selects values needs no rule. Wrap the result in `jit`: tracing happens at every call.

    Args:
      fun: a JAX function of any framework that returns one real array. An NNX module may be an
        argument, or the function itself.
      rules: a `Composite`, one rule for everything, or a list of (where, rule).
      argnums: the argument or arguments that are explained. Where parameters are arguments,
        the others, their leaves' paths name them for the composite.
      has_aux: `fun` returns (output, anything).
      at: more places whose relevance is wanted: names of values marked by `jaxrel.tag`, and
        `jaxrel.path(...)` for parameters (the sum of the messages through each weight). With
        `argnums=None` only these are explained: for functions of integer tokens, tag what is
        looked up.
      unknown: 'error', or 'warn' to use the derivative of operations that have no rule.

    Returns:
      A function `(*args, seed=None, **kwargs)`. `seed` is the relevance of the output, an array
      of its shape or a function of the output; by default the output itself. Booleans, strings
      and None among the arguments are passed on as they are, keyword arguments too. It returns
      relevance in the structure of the explained argument, float32 (float64 for float64 values;
      0 for integers), or a tuple for several; with `at`, `(relevance, {name or path:
      relevance})`, or the dict alone with `argnums=None`. With `has_aux`, `(all that, aux)`.

    Raises:
      TypeError: (when called) the output is not one real array; nothing explained is real.
      ValueError: (when called) a seed of the wrong shape; NaN or infinity in an argument or seed
        (only where values are known: not inside jit); an entry of the composite that matches
        nothing; an unknown tag or path.
      NotImplementedError: (when called) an operation carries relevance and has no rule.
    """
    explain = value_and_lrp(fun, rules, argnums=argnums, has_aux=has_aux, at=at, unknown=unknown)

    @functools.wraps(fun, assigned=("__name__", "__doc__"), updated=())
    def explained(*args, seed: Any = None, **kwargs):
        value, relevance = explain(*args, seed=seed, **kwargs)
        return (relevance, value[1]) if has_aux else relevance

    return explained


def value_and_lrp(
    fun: Callable,
    rules: Any,
    *,
    argnums: int | Sequence[int] | None = 0,
    has_aux: bool = False,
    at: Any = (),
    unknown: Unknown = "error",
) -> Callable:
    """Like `lrp`, but the function returns `(fun(*args), relevance)`."""
    composite = as_composite(rules)
    at = as_places(at)
    _check_argnums(argnums, at)
    if unknown not in get_args(Unknown):
        raise ValueError(f"lrp: unknown must be 'error' or 'warn', got {unknown!r}")

    def explained(*args, seed: Any = None, **kwargs):
        call = Call.of(functools.partial(fun, **kwargs), args, argnums, has_aux, "lrp")
        prepared = call.prepare(composite, at, unknown)
        out, cotangents, _ = pull_back(call, prepared, at, lambda out: cotangent(out, seed))
        relevance = call.gather(cotangents, as_relevance)
        return call.value(out), relevance

    return explained


def lrp_vjp(
    fun: Callable,
    rules: Any,
    *,
    argnums: int | Sequence[int] | None = 0,
    at: Any = (),
    unknown: Unknown = "error",
    gradient: bool = False,
) -> Callable:
    """Run a function once, and explain its output as often as wanted, as `jax.vjp` does.

    `vmap` of the second result explains many targets at the cost of one forward pass and one
    backward pass each:

        value, explain = jaxrel.lrp_vjp(fun, rules)(x)
        relevance = jax.vmap(explain)(jnp.eye(classes) * value)

    Args:
      fun, rules, argnums, at, unknown: as in `lrp`.
      gradient: whether the cotangents themselves, relevance / value, go in and come out in the
        place of relevance: with rules that change the derivative (`Guided`, `Deconvnet`) these
        are their method's result, and with `Gradient` everywhere the gradient.

    Returns:
      A function `(*args) -> (value, explain)`, and `explain(seed)` returns what `lrp` does for
      that seed.

    Raises:
      TypeError, ValueError, NotImplementedError: see `lrp`.
    """
    return _vjp("lrp_vjp", fun, rules, argnums, at, unknown, gradient)


def _vjp(
    caller: str, fun: Callable, rules: Any, argnums: Any, at: Any, unknown: Unknown, gradient: bool
) -> Callable:
    composite = as_composite(rules)
    at = as_places(at)
    _check_argnums(argnums, at)
    if unknown not in get_args(Unknown):
        raise ValueError(f"{caller}: unknown must be 'error' or 'warn', got {unknown!r}")

    def run(*args, **kwargs):
        call = Call.of(functools.partial(fun, **kwargs), args, argnums, False, caller)
        outs, back = forward(call, call.prepare(composite, at, unknown), at)

        def explain(seed: Any) -> Any:
            start = _modified(caller, outs[0], seed) if gradient else cotangent(outs[0], seed)
            return call.gather(back(start)[0], as_cotangent if gradient else as_relevance)

        return call.value(outs), explain

    return run


def modified_gradient(
    fun: Callable,
    rules: Any,
    *,
    argnums: int | Sequence[int] = 0,
    unknown: Unknown = "error",
) -> Callable:
    """Like `lrp`, but what comes back is the cotangent, relevance / value, itself.

    With rules that change the derivative (`Guided`, `Deconvnet`) this is their method's result.
    `seed` is the cotangent of the output; by default ones.
    """
    run = _vjp("modified_gradient", fun, rules, argnums, (), unknown, gradient=True)

    def explained(*args, seed: Any = None, **kwargs):
        return run(*args, **kwargs)[1](seed)

    return explained


@dataclasses.dataclass(frozen=True)
class Cotangents:
    """By leaf, tag and parameter: (value, c), and for leaves relevance that is given directly."""

    leaves: dict[int, tuple[Any, Any, Any]]
    places: dict[str, tuple[Any, Any]]


@dataclasses.dataclass(frozen=True)
class Call:
    """A traced call: which leaves of its arguments are explained, and how to put them back."""

    fun: Callable
    args: tuple[Any, ...]
    argnums: tuple[int, ...]
    single: bool
    has_aux: bool
    traced: Traced
    paths: tuple[str, ...]
    owner: tuple[int, ...]

    @classmethod
    def of(cls, fun: Callable, args: tuple, argnums: Any, has_aux: bool, caller: str) -> "Call":
        """Trace a call and check what it explains."""
        chosen = explained_arguments(caller, argnums, args)
        static = [arg is None or isinstance(arg, bool | str) for arg in args]
        given, args = args, tuple(() if s else arg for s, arg in zip(static, args, strict=True))
        leaves = labelled(fun, args)
        _check_finite(caller, leaves, chosen)

        def call_fun(*args):
            merged = zip(given, args, static, strict=True)
            return fun(*(kept if s else arg for kept, arg, s in merged))

        traced = trace(call_fun if any(static) else fun, *args)
        _check_output(traced, has_aux, caller)
        call = cls(
            fun=fun,
            args=args,
            argnums=chosen,
            single=isinstance(argnums, int),
            has_aux=has_aux,
            traced=traced,
            paths=tuple(path for _, path, _ in leaves),
            owner=tuple(index for index, _, _ in leaves),
        )
        if chosen and not call.explained():
            kinds = ", ".join(sorted({str(call.traced.args[i].dtype) for i in call.chosen()}))
            raise TypeError(
                f"{caller}: the explained argument holds no real numbers ({kinds or 'nothing'}); "
                "for integer tokens mark what is looked up, jaxrel.tag(embedding, 'embed'), and "
                "ask jaxrel.lrp for argnums=None, at='embed'"
            )
        return call

    def chosen(self) -> list[int]:
        """The leaves of the explained arguments."""
        return [i for i, owner in enumerate(self.owner) if owner in self.argnums]

    def explained(self) -> list[int]:
        """Those of them that are real numbers."""
        leaves = self.traced.args
        return [i for i in self.chosen() if jnp.issubdtype(leaves[i].dtype, jnp.floating)]

    def prepare(self, composite: Any, at: Sequence, unknown: Any) -> Prepared:
        """Choose and make the rules' steps."""
        explained = {*self.explained()}
        ins = [
            Fact(active=True, fresh=True) if i in explained else Fact(paths=frozenset({path}))
            for i, path in enumerate(self.paths)
        ]
        tags = [name for name in at if isinstance(name, str)]
        known = _closed_over(self.fun)
        return prepare(
            self.traced.graph,
            composite,
            ins,
            tags=lambda graph: [value for _, value in find_tags(graph, tags, "lrp")],
            names=lambda constant: known.get(id(constant)),
            weights=any(isinstance(place, Where) for place in at),
            unknown=unknown,
        )

    def value(self, outs: list) -> Any:
        """What the function returned."""
        return self.traced.unflatten(outs)

    def gather(self, cotangents: Cotangents, make: Callable[..., Any]) -> Any:
        """Results in the structure that was asked for."""
        found = []
        for index in self.argnums:
            leaves = []
            for i in (i for i, owner in enumerate(self.owner) if owner == index):
                if i in cotangents.leaves:
                    leaves.append(make(*cotangents.leaves[i]))
                else:
                    leaves.append(zeros(shaped_like(self.traced.args[i], dtype=jnp.float32)))
            found.append(jax.tree.unflatten(jax.tree.structure(self.args[index]), leaves))
        result = found[0] if self.single else tuple(found)
        places = {name: make(value, c, None) for name, (value, c) in cotangents.places.items()}
        if not places:
            return result
        return (result, places) if self.argnums else places


def pull_back(
    call: Call,
    prepared: Prepared,
    at: Sequence,
    start: Callable[[Any], Any],
    *,
    interceptors: Mapping[Value, Interceptor] | None = None,
    carrier: Any = None,
) -> tuple[list, Cotangents, Any]:
    """Run forward and, from `start(output)`, backward through the rules.

    Returns the flat outputs, the cotangents, and that of the carrier that `interceptors` thread
    through the program.
    """
    outs, back = forward(call, prepared, at, interceptors=interceptors, carrier=carrier)
    return outs, *back(start(outs[0]))


def forward(
    call: Call,
    prepared: Prepared,
    at: Sequence,
    *,
    interceptors: Mapping[Value, Interceptor] | None = None,
    carrier: Any = None,
) -> tuple[list, Callable[[Any], tuple[Cotangents, Any]]]:
    """Run forward; return the flat outputs, and what goes backward from the output's cotangent.

    See `pull_back`.
    """
    graph, args = prepared.graph, list(call.traced.args)
    leaves = [i for i, value in enumerate(graph.ins[: len(args)]) if value in prepared.explained]
    tagged = find_tags(graph, [name for name in at if isinstance(name, str)], "lrp")
    taps = tap_names(tagged)
    edits = Edits(steps=prepared.steps, taps=taps, interceptors=interceptors or {})
    weights = _weights(call, [place for place in at if isinstance(place, Where)])
    probes = {name: zeros(shape) for name, shape in tap_shapes(graph, taps).items()}

    def run(xs, ws, channels, probes, carrier):
        values = list(args)
        for i, x in zip([*leaves, *weights], [*xs, *ws], strict=True):
            values[i] = x
        result = evaluate(graph, [*values, *channels], edits, probes=probes, carrier=carrier)
        return (result.outs[0], result.carrier), (result.outs, result.taps)

    xs, ws = [args[i] for i in leaves], [args[i] for i in weights]
    channels = [jnp.zeros_like(x) for x in xs]
    (_, carried), pullback, (outs, values) = jax.vjp(
        run, xs, ws, channels, probes, carrier, has_aux=True
    )

    def back(c: Any) -> tuple[Cotangents, Any]:
        still = jax.tree.map(jnp.zeros_like, carried)
        cx, cw, direct, ct, carrier = pullback((c, still))
        found = {i: (x, c, r) for i, x, c, r in zip(leaves, xs, cx, direct, strict=True)}
        at_tags, c_at_tags = gather(tagged, values), gather(tagged, ct)
        gathered = {name: (value, c_at_tags[name]) for name, value in at_tags.items()}
        gathered |= {call.paths[i]: (w, c) for i, w, c in zip(weights, ws, cw, strict=True)}
        return Cotangents(found, gathered), carrier

    return outs, back


def as_relevance(value: Any, c: Any, direct: Any) -> Any:
    """Relevance of a value with cotangent c, and what a rule gave it directly."""
    dtype = jnp.promote_types(value.dtype, jnp.float32)
    relevance = value.astype(dtype) * c.astype(dtype)
    return relevance if direct is None else relevance + direct.astype(dtype)


def as_cotangent(value: Any, c: Any, direct: Any) -> Any:
    """The cotangent c itself."""
    return c


def _modified(caller: str, out: Any, seed: Any) -> Any:
    """The output's cotangent, as it is given."""
    if seed is None:
        return jnp.ones_like(out)
    return _finite(as_seed(caller, out, seed, "cotangent")).astype(out.dtype)


def cotangent(out: Any, seed: Any) -> Any:
    """relevance / value at the output: 1 for the output itself, 0 where the output is 0."""
    if seed is None:
        return jnp.ones_like(out)
    return quotient(_finite(as_seed("lrp", out, seed, "relevance")).astype(out.dtype), out)


def quotient(relevance: Any, value: Any) -> Any:
    """relevance / value, and 0 where the value is 0."""
    return jnp.where(value == 0, 0, relevance / jnp.where(value == 0, 1, value))


def as_seed(caller: str, out: Any, seed: Any, what: str) -> Any:
    """What goes backward from the output, an array of its shape: its relevance or cotangent."""
    seed = jnp.asarray(seed(out) if callable(seed) else seed)
    if seed.shape != out.shape:
        one = "jax.nn.one_hot(target, classes)"
        raise ValueError(
            f"{caller}: the seed has shape {seed.shape} and the output {out.shape}; the seed is "
            f"the output's {what}, such as {one if what == 'cotangent' else one + ' * logits'}"
        )
    return seed


def _finite(seed: Any) -> Any:
    if not isinstance(seed, jax.core.Tracer):
        with jax.ensure_compile_time_eval():
            finite = bool(jnp.all(jnp.isfinite(seed)))
        if not finite:
            raise ValueError("lrp: the seed holds NaN or infinity")
    return seed


def _weights(call: Call, places: Sequence[Where]) -> list[int]:
    """The parameter leaves that some path means."""
    found: list[int] = []
    for place in places:
        matches = [
            i
            for i, path in enumerate(call.paths)
            if call.owner[i] not in call.argnums and place(_Leaf((path,)))
        ]
        if not matches:
            raise ValueError(
                f"lrp: at={place!r} matches no parameter; there are "
                f"{', '.join(call.paths[:12]) or 'none among the arguments'}"
            )
        found += [i for i in matches if i not in found]
    return found


@dataclasses.dataclass(frozen=True)
class _Leaf:
    """What a path condition looks at."""

    paths: tuple[str, ...]


def labelled(fun: Callable, args: tuple) -> list[tuple[int, str, Any]]:
    """(argument, path, leaf) of every leaf; a bare array is named after its parameter."""
    try:
        names = list(inspect.signature(fun).parameters)
    except (TypeError, ValueError):
        names = []
    found = []
    for index, arg in enumerate(args):
        name = names[index] if index < len(names) else f"argument{index}"
        for key, leaf in jax.tree_util.tree_flatten_with_path(arg)[0]:
            found.append((index, _path(key) or name, leaf))
    return found


def _path(key: Any) -> str:
    path = jax.tree_util.keystr(key, simple=True, separator="/")
    # An NNX variable's array is a leaf of its own.
    return path.removesuffix("/value")


def _closed_over(fun: Callable) -> dict[int, str]:
    """Paths of the arrays that a function brings with it: as a module, or in its closure."""
    owners: list[tuple[str, Any]] = []
    while isinstance(fun, functools.partial):
        owners += [("", arg) for arg in (*fun.args, *fun.keywords.values())]
        fun = fun.func
    owners.append(("", getattr(fun, "__self__", fun)))
    function = inspect.unwrap(fun) if callable(fun) else fun
    code, cells = getattr(function, "__code__", None), getattr(function, "__closure__", None)
    if code is not None and cells:
        for name, cell in zip(code.co_freevars, cells, strict=True):
            try:
                owners.append((name, cell.cell_contents))
            except ValueError:  # an empty cell
                continue
    if code is not None:
        scope = getattr(function, "__globals__", {})
        owners += [(name, scope[name]) for name in code.co_names if name in scope]
    found: dict[int, str] = {}
    for name, owner in owners:
        try:
            leaves = jax.tree_util.tree_flatten_with_path(owner)[0]
        except Exception:
            # Any object may be captured, and some cannot be flattened: they name nothing.
            continue
        for key, leaf in leaves:
            if isinstance(leaf, jax.Array):
                found.setdefault(id(leaf), _path(key) or name)
    return found


def explained_arguments(caller: str, argnums: Any, args: tuple) -> tuple[int, ...]:
    """The places of the explained arguments; ValueError for one that is not there."""
    chosen = (argnums,) if isinstance(argnums, int) else tuple(argnums or ())
    for index in chosen:
        if not -len(args) <= index < len(args):
            raise ValueError(
                f"{caller}: argnums={argnums}, but the function was called with {len(args)} "
                "argument(s)"
            )
    return tuple(index % len(args) for index in chosen)


def as_places(at: Any) -> tuple[Any, ...]:
    """One place, or several, as a tuple."""
    return (at,) if isinstance(at, str | Where) else tuple(at)


def _check_argnums(argnums: Any, at: tuple) -> None:
    if argnums is None and not at:
        raise ValueError("lrp: argnums=None explains no argument; name a tag with at='...'")
    many = (argnums,) if isinstance(argnums, int) else argnums
    if many is not None and not all(isinstance(index, int) for index in many):
        raise TypeError(f"lrp: argnums must be an int, several, or None, got {argnums!r}")


def _check_finite(
    caller: str, labelled: list[tuple[int, str, Any]], explained: Sequence[int]
) -> None:
    """NaN is wrong anywhere; infinity may be a mask, but not in what is explained."""
    known = [
        (index, path, leaf)
        for index, path, leaf in labelled
        if isinstance(leaf, jax.Array | np.ndarray)
        and not isinstance(leaf, jax.core.Tracer)
        and jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    # A value may be known although this call is being traced: it is looked at now.
    with jax.ensure_compile_time_eval():
        counts = jax.device_get(_count_bad([leaf for _, _, leaf in known]))
    for (index, path, leaf), (nans, infinities) in zip(known, counts, strict=True):
        bad = nans + (infinities if index in explained else 0)
        if bad:
            raise ValueError(
                f"{caller}: argument {index} ({path}) holds NaN or infinity in {bad} of "
                f"{leaf.size} places"
            )


@jax.jit
def _count_bad(leaves: list) -> list:
    return [(jnp.sum(jnp.isnan(leaf)), jnp.sum(jnp.isinf(leaf))) for leaf in leaves]


def _check_output(traced: Traced, has_aux: bool, caller: str) -> None:
    avals = [atom.aval for atom in traced.graph.outs]
    tree = traced.out_tree
    if has_aux:
        data = tree.node_data()
        parts = tree.children() if data and data[0] is tuple else []
        if len(parts) != 2:
            raise TypeError(f"{caller}: with has_aux the function must return (output, aux)")
        tree, avals = parts[0], avals[: parts[0].num_leaves]
    if len(avals) == 1 and jnp.issubdtype(avals[0].dtype, jnp.floating):
        return
    got = ", ".join(aval.str_short() for aval in avals) or "nothing"
    raise TypeError(
        f"{caller}: the function must return one real array, such as logits, but it returned "
        f"{got}; wrap it, as in lambda x: fun(x)[0], or say has_aux=True for (output, aux)"
    )
