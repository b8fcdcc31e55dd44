"""`lrp`: layer-wise relevance propagation as a transformation, as `grad` is one."""

import dataclasses
import functools
import inspect
import operator
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, get_args

import jax
import numpy as np
from jax import numpy as jnp

from jaxrel.propagation.assignment import Prepared, prepare
from jaxrel.propagation.blocks import by_blocks
from jaxrel.propagation.composites import Where, as_composite
from jaxrel.propagation.convolutions import quick_steps
from jaxrel.tracing.capture import find_tags, gather, tap_names
from jaxrel.tracing.evaluate import Edits, Interceptor
from jaxrel.tracing.facts import Fact
from jaxrel.tracing.graph import Graph, Value
from jaxrel.tracing.modules import held
from jaxrel.tracing.pullback import Call, as_seed, path_of, pullback, seed_cotangent, seed_of

Unknown = Literal["error", "warn"]


def lrp(
    fun: Callable,
    rules: Any,
    *,
    argnums: int | Sequence[int] | None = 0,
    has_aux: bool = False,
    at: Any = (),
    unknown: Unknown = "error",
    block: int | None = None,
) -> Callable:
    """Make a function return the relevance of its input for its output.

    One forward and one backward pass through the user's own function, whose derivative is
    replaced, operation by operation, by the rules (Bach et al. 2015). What adds, moves or
    selects values needs no rule. Wrap the result in `jit`: tracing happens at every call.

    Args:
      fun: a JAX function of any framework that returns one real array. An NNX module may be an
        argument, or the function itself.
      rules: a `Composite`, one rule for everything, or a list of (where, rule).
      argnums: the argument or arguments that are explained. Integers, such as a language model's
        tokens, have the relevance of what they look up, summed over its width. Where parameters
        are arguments, the others, their leaves' paths name them for the composite.
      has_aux: `fun` returns (output, anything).
      at: more places whose relevance is wanted: names of values marked by `jaxrel.tag`, and
        `jaxrel.path(...)` for parameters (the sum of the messages through each weight). With
        `argnums=None` only these are explained: for functions of integer tokens, tag what is
        looked up.
      unknown: 'error', or 'warn' to use the derivative of operations that have no rule.
      block: compute attention by blocks of so many queries, forward and backward, so that memory
        is tokens x block and no map of all tokens is ever there; None for whole maps.

    Returns:
      A function `(*args, seed=None, target=None, **kwargs)`. `seed` is the relevance of the output,
      an array of its shape or a function of the output; by default the output itself. `target`
      explains one entry of its last axis, by an index for all examples or one each (where `fun`
      has an argument of that name, it is that). Booleans, strings
      and None among the arguments are passed on as they are, keyword arguments too. It returns
      relevance in the structure of the explained argument, float32 (float64 for float64 values;
      0 for integers), or a tuple for several; with `at`, `(relevance, {name or path:
      relevance})`, or the dict alone with `argnums=None`. With `has_aux`, `(all that, aux)`.

    Raises:
      TypeError: (when called) the output is not one real array; nothing explained is real.
      ValueError: (when called) a seed of the wrong shape; NaN or infinity in an argument or seed
        (only where values are known: not inside jit); an entry of the composite that matches
        nothing; an unknown tag or path.
      NotImplementedError: (when called) an operation carries relevance and has no rule; with
        `block`, attention whose rows are not computed apart.
    """
    explain = value_and_lrp(
        fun, rules, argnums=argnums, has_aux=has_aux, at=at, unknown=unknown, block=block
    )

    def explained(*args, seed: Any = None, **kwargs):
        # A target is among the keywords.
        value, relevance = explain(*args, seed=seed, **kwargs)
        return (relevance, value[1]) if has_aux else relevance

    for name in ("__name__", "__doc__"):
        if isinstance(given := getattr(fun, name, None), str):
            setattr(explained, name, given)
    # `jit(..., static_argnames="seed")` reads the signature.
    if (signature := _with_seed(fun)) is not None:
        vars(explained)["__signature__"] = signature
    return explained


def _with_seed(fun: Callable) -> inspect.Signature | None:
    """The function's signature with the keywords `seed` and `target`; None if it cannot be told."""
    try:
        signature = inspect.signature(fun)
    except (TypeError, ValueError):
        return None
    *rest, last = [*signature.parameters.values(), None]
    if rest and rest[-1].kind is inspect.Parameter.VAR_KEYWORD:
        last = rest.pop()
    if "seed" in signature.parameters:
        return None
    more = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None)
        for name in ("seed", "target")
        if name not in signature.parameters
    ]
    return signature.replace(parameters=[*rest, *more, *([] if last is None else [last])])


def _takes_target(fun: Callable) -> bool:
    """Whether a function has an argument of its own that is called `target`."""
    try:
        return "target" in inspect.signature(fun).parameters
    except (TypeError, ValueError):
        return False


def value_and_lrp(
    fun: Callable,
    rules: Any,
    *,
    argnums: int | Sequence[int] | None = 0,
    has_aux: bool = False,
    at: Any = (),
    unknown: Unknown = "error",
    block: int | None = None,
) -> Callable:
    """Like `lrp`, but the function returns `(fun(*args), relevance)`."""
    run = explained_vjp(
        "lrp",
        fun,
        rules,
        argnums=argnums,
        has_aux=has_aux,
        at=at,
        unknown=unknown,
        block=block,
    )
    own = _takes_target(fun)

    def explained(*args, seed: Any = None, **kwargs):
        target = None if own else kwargs.pop("target", None)
        seed = seed_of("lrp", seed, target, relevance=True)
        value, explain = run(*args, **kwargs)
        return value, explain(seed)

    return explained


def lrp_vjp(
    fun: Callable,
    rules: Any,
    *,
    argnums: int | Sequence[int] | None = 0,
    at: Any = (),
    unknown: Unknown = "error",
    gradient: bool = False,
    block: int | None = None,
) -> Callable:
    """Run a function once, and explain its output as often as wanted, as `jax.vjp` does.

    `vmap` of the second result explains many targets at the cost of one forward pass and one
    backward pass each:

        value, explain = jaxrel.lrp_vjp(fun, rules)(x)
        relevance = jax.vmap(explain)(jnp.eye(classes) * value)

    Args:
      fun, rules, argnums, at, unknown, block: as in `lrp`.
      gradient: whether the cotangents themselves, relevance / value, go in and come out in the
        place of relevance: with rules that change the derivative (`Guided`, `Deconvnet`) these
        are their method's result, and with `Gradient` everywhere the gradient.

    Returns:
      A function `(*args) -> (value, explain)`, and `explain(seed)` returns what `lrp` does for
      that seed.

    Raises:
      TypeError, ValueError, NotImplementedError: see `lrp`.
    """
    return explained_vjp(
        "lrp_vjp",
        fun,
        rules,
        argnums=argnums,
        at=at,
        unknown=unknown,
        gradient=gradient,
        block=block,
    )


def explained_vjp(
    caller: str,
    fun: Callable,
    rules: Any,
    *,
    argnums: int | Sequence[int] | None = 0,
    has_aux: bool | None = None,
    at: Any = (),
    unknown: Unknown = "error",
    gradient: bool = False,
    block: int | None = None,
) -> Callable:
    """`lrp_vjp` in the name of another function, for errors; with `has_aux` as in `lrp`."""
    composite = as_composite(rules)
    at = as_places(at)
    _check_argnums(argnums, at)
    if unknown not in get_args(Unknown):
        raise ValueError(f"{caller}: unknown must be 'error' or 'warn', got {unknown!r}")
    if block is not None and operator.index(block) < 1:
        raise ValueError(f"{caller}: block must be 1 or more queries, got {block}")

    def run(*args, **kwargs):
        whole = functools.partial(fun, **kwargs)
        call = traced_call(caller, whole, args, argnums, has_aux, tokens=not gradient)
        prepared = prepare_call(call, composite, at, unknown)
        prepared = prepared if block is None else by_blocks(prepared, operator.index(block))
        outs, back = forward(call, prepared, at)

        def explain(seed: Any) -> Any:
            if gradient:
                start = _finite(seed_cotangent(caller, outs[0], seed))
            else:
                start = cotangent(outs[0], seed)
            return results(call, back(start)[0], as_cotangent if gradient else as_relevance)

        return call.traced.unflatten(outs), explain

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
    run = explained_vjp(
        "modified_gradient", fun, rules, argnums=argnums, unknown=unknown, gradient=True
    )

    def explained(*args, seed: Any = None, **kwargs):
        return run(*args, **kwargs)[1](seed)

    return explained


@dataclasses.dataclass(frozen=True)
class Cotangents:
    """By leaf, tag and parameter: (value, c, relevance that a rule gave directly, or None)."""

    leaves: dict[int, tuple[Any, Any, Any]]
    places: dict[str, tuple[Any, Any, Any]]


def traced_call(
    caller: str,
    fun: Callable,
    args: tuple,
    argnums: Any,
    has_aux: bool | None = None,
    tokens: bool = True,
) -> Call:
    """Trace a call, and check what it explains and that it holds no NaN."""
    call = Call.of(caller, fun, args, argnums, has_aux, tokens)
    _check_finite(call)
    return call


def prepare_call(call: Call, composite: Any, at: Sequence, unknown: Any) -> Prepared:
    """Choose the rules for a call and make their steps."""
    explained = {*call.explained()}
    ins = [
        Fact(active=True, fresh=True) if i in explained else Fact(paths=frozenset({path}))
        for i, path in enumerate(call.paths)
    ]
    tags = [name for name in at if isinstance(name, str)]
    known = _closed_over(call.fun)
    return prepare(
        call.traced.graph,
        composite,
        ins,
        tags=lambda graph: [*find_tags(graph, tags, "lrp"), *_token_rows(call, graph)],
        names=lambda constant: known.get(id(constant)),
        weights=any(isinstance(place, Where) for place in at),
        unknown=unknown,
    )


def _token_rows(call: Call, graph: Graph) -> list[tuple[str, Value]]:
    """What the explained integers look up, with a name for each; see `tokens_of`."""
    traced = dataclasses.replace(call.traced, graph=graph)
    rows = dataclasses.replace(call, traced=traced).rows()
    return [(f"rows {n} of {i}", row) for n, (i, row) in enumerate(rows)]


def _of_tokens(call: Call, places: dict[str, tuple]) -> dict[int, tuple]:
    """Relevance of integers, by leaf: that of the rows that they look up, summed over width.

    It is taken out of the places, and is as if a rule gave it directly.
    """
    found: dict[int, Any] = {}
    for name in [name for name in places if re.fullmatch(r"rows \d+ of \d+", name)]:
        i, relevance = int(name.split()[-1]), as_relevance(*places.pop(name))
        axes = tuple(range(call.traced.args[i].ndim, relevance.ndim))
        found[i] = found.get(i, 0) + relevance.sum(axes)
    return {i: (jnp.zeros_like(r), jnp.zeros_like(r), r) for i, r in found.items()}


def results(call: Call, cotangents: Cotangents, make: Callable[..., Any]) -> Any:
    """What `make` makes of the cotangents, in the structure that was asked for."""
    result = call.gather({i: make(*leaf) for i, leaf in cotangents.leaves.items()})
    places = {name: make(*place) for name, place in cotangents.places.items()}
    if not places:
        return result
    return (result, places) if call.argnums else places


def forward(
    call: Call,
    prepared: Prepared,
    at: Sequence,
    *,
    interceptors: Mapping[Value, Interceptor] | None = None,
    carrier: Any = None,
) -> tuple[list, Callable[[Any], tuple[Cotangents, Any]]]:
    """Run forward; return the flat outputs, and what goes backward through the rules.

    The latter takes the output's cotangent. It returns the cotangents, and the cotangent of the
    carrier that `interceptors` thread through the program.
    """
    graph, args = prepared.graph, [*call.traced.args]
    explained = [i for i, value in enumerate(graph.ins[: len(args)]) if value in prepared.explained]
    # The graph's last inputs take the relevance that a rule gives directly.
    probes = {i: len(args) + n for n, i in enumerate(explained)}
    args += [jnp.zeros_like(args[i]) for i in explained]
    weights = _weights(call, [place for place in at if isinstance(place, Where)])
    tagged = prepared.tagged
    taps = tap_names(tagged)
    probed = {prepared.probes[v]: f"{n} directly" for v, n in taps.items() if v in prepared.probes}
    steps = quick_steps(graph) | prepared.steps
    edits = Edits(steps, taps | probed, interceptors or {})
    by = [*explained, *weights, *probes.values()]
    evaluated, pull = pullback(graph, args, edits, by=by, carrier=carrier)
    values = gather(tagged, evaluated.taps)

    def back(c: Any) -> tuple[Cotangents, Any]:
        pulled = pull(c)
        cs = dict(zip(by, pulled.args, strict=True))
        c_tags, direct = gather(tagged, pulled.taps), gather(tagged, _direct(pulled.taps))
        places = {name: (value, c_tags[name], direct[name]) for name, value in values.items()}
        places |= {call.paths[i]: (args[i], cs[i], None) for i in weights}
        leaves = {i: (args[i], cs[i], cs[probe]) for i, probe in probes.items()}
        leaves |= _of_tokens(call, places)
        return Cotangents(leaves, places), pulled.carrier

    return evaluated.outs, back


def _direct(taps: Mapping[str, Any]) -> dict[str, Any]:
    """By tap, the relevance that a rule gave directly: zeros where it has no probe."""
    found = {name: taps.get(f"{name} directly") for name in taps}
    return {name: jnp.zeros_like(taps[name]) if r is None else r for name, r in found.items()}


def as_relevance(value: Any, c: Any, direct: Any) -> Any:
    """Relevance of a value with cotangent c, and what a rule gave it directly."""
    dtype = jnp.promote_types(value.dtype, jnp.float32)
    relevance = value.astype(dtype) * c.astype(dtype)
    return relevance if direct is None else relevance + direct.astype(dtype)


def as_cotangent(value: Any, c: Any, direct: Any) -> Any:
    """The cotangent c itself."""
    return c


def cotangent(out: Any, seed: Any) -> Any:
    """relevance / value at the output: 1 for the output itself, 0 where the output is 0."""
    if seed is None:
        return jnp.ones_like(out)
    return quotient(_finite(as_seed("lrp", out, seed, "relevance")).astype(out.dtype), out)


def quotient(relevance: Any, value: Any) -> Any:
    """relevance / value, and 0 where the value is 0."""
    return jnp.where(value == 0, 0, relevance / jnp.where(value == 0, 1, value))


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


def _closed_over(fun: Callable) -> dict[int, str]:
    """Paths of the arrays that a function brings with it: as a module, or in its closure."""
    found: dict[int, str] = {}
    for name, owner in held(fun):
        try:
            leaves = jax.tree_util.tree_flatten_with_path(owner)[0]
        except Exception:
            # Any object may be captured, and some cannot be flattened: they name nothing.
            continue
        for key, leaf in leaves:
            if isinstance(leaf, jax.Array):
                found.setdefault(id(leaf), path_of(key) or name)
    return found


def as_places(at: Any) -> tuple[Any, ...]:
    """One place, or several, as a tuple."""
    return (at,) if isinstance(at, str | Where) else tuple(at)


def _check_argnums(argnums: Any, at: tuple) -> None:
    if argnums is None and not at:
        raise ValueError("lrp: argnums=None explains no argument; name a tag with at='...'")
    many = (argnums,) if isinstance(argnums, int) else argnums
    if many is not None and not all(isinstance(index, int) for index in many):
        raise TypeError(f"lrp: argnums must be an int, several, or None, got {argnums!r}")


def _check_finite(call: Call) -> None:
    """NaN is wrong anywhere; infinity may be a mask, but not in what is explained."""
    known = [
        (index, path, leaf)
        for index, path, leaf in zip(
            call.owner, call.paths, jax.tree.leaves(call.args), strict=True
        )
        if isinstance(leaf, jax.Array | np.ndarray)
        and not isinstance(leaf, jax.core.Tracer)
        and jnp.issubdtype(leaf.dtype, jnp.floating)
    ]
    # A value may be known although this call is being traced: it is looked at now.
    with jax.ensure_compile_time_eval():
        counts = jax.device_get(_count_bad([leaf for _, _, leaf in known]))
    for (index, path, leaf), (nans, infinities) in zip(known, counts, strict=True):
        bad = nans + (infinities if index in call.argnums else 0)
        if bad:
            raise ValueError(
                f"{call.caller}: argument {index} ({path}) holds NaN or infinity in {bad} of "
                f"{leaf.size} places"
            )


@jax.jit
def _count_bad(leaves: list) -> list:
    return [(jnp.sum(jnp.isnan(leaf)), jnp.sum(jnp.isinf(leaf))) for leaf in leaves]
