"""`capture` and `capture_with_grad`: tagged values, and the gradients by them, as outputs."""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax import numpy as jnp

from jaxrel.tracing.evaluate import Edits, Step, evaluate
from jaxrel.tracing.graph import Graph, Node, Traced, Value, tag_name, trace
from jaxrel.tracing.pullback import check_output, pullback


def capture(fun: Callable, names: str | Sequence[str] | None = None) -> Callable:
    """Make a function return its tagged values too.

    A value tagged inside a `scan` (of the layers, say) comes out stacked: `[layers, ...]`.
    A name used several times outside a scan (layers in a Python loop) is stacked in order of
    execution, so both ways of writing a model give the same array. Where several values of one
    scan's body share a name, all of the first come before all of the second. A value tagged
    inside a `cond` is zero when its branch was not taken.

    Args:
      fun: any JAX function that calls `jaxrel.tag` or `jax.ad_checkpoint.checkpoint_name`.
      names: the tags wanted; all of them, by default.

    Returns:
      A function `(*args, **kwargs) -> (out, {name: value})`, to be wrapped in `jit` by the caller.

    Raises:
      ValueError: (when called) a name that the function does not tag, or one whose values
        have different shapes and cannot be stacked.
      NotImplementedError: (when called) a tag inside a `while_loop`, a function with a
        derivative of its own, or a kernel.
    """

    @functools.wraps(fun)
    def captured(*args, **kwargs):
        traced = trace(fun, *args, **kwargs)
        tagged = find_tags(traced.graph, names, "capture")
        result = evaluate(traced.graph, traced.args, Edits(taps=tap_names(tagged)))
        return traced.unflatten(result.outs), gather(tagged, result.taps)

    return captured


def capture_with_grad(fun: Callable, names: str | Sequence[str]) -> Callable:
    """Make a function return tagged values and the gradients of its output by them.

    One forward and one backward pass, whatever the number of names. The gradient is that of
    `sum(out)`: for a batch of independent examples whose scalars `out` holds, it is each
    example's own.

    Args:
      fun: a JAX function that returns one real array of any shape.
      names: the tags wanted; see `capture` for how values are stacked.

    Returns:
      A function `(*args, **kwargs) -> (out, values, grads)`, both dicts by name with arrays of
      the same shapes and dtypes.

    Raises:
      TypeError: (when called) `out` is not one real array, or a tagged value is not real.
      ValueError, NotImplementedError: as for `capture`.
    """

    @functools.wraps(fun)
    def captured(*args, **kwargs):
        traced = trace(fun, *args, **kwargs)
        tagged = find_tags(traced.graph, names, "capture_with_grad")
        for name, value in tagged:
            if not jnp.issubdtype(value.aval.dtype, jnp.floating):
                raise TypeError(
                    f"capture_with_grad: the value tagged {name!r} has dtype {value.aval.dtype}, "
                    "and a gradient needs a real floating-point one"
                )
        out, values, grads = taps_with_grad(traced, tap_names(tagged), "capture_with_grad")
        return out, gather(tagged, values), gather(tagged, grads)

    return captured


def taps_with_grad(
    traced: Traced,
    taps: Mapping[Value, str],
    caller: str,
    steps: Mapping[Node, Step] | None = None,
) -> tuple[Any, dict, dict]:
    """Output, tapped values and gradients of `sum(out)` by them, each stacked over scans.

    With `steps`, the nodes that they name are computed, and differentiated, as they say.
    """
    check_output(caller, traced)
    result, back = pullback(traced.graph, traced.args, Edits(steps=steps or {}, taps=taps))
    (out,) = result.outs
    return traced.unflatten([out]), result.taps, back(jnp.ones_like(out)).taps


def find_tags(
    graph: Graph, names: str | Sequence[str] | None, caller: str
) -> list[tuple[str, Value]]:
    """The tagged values, in order of execution, restricted to `names` if given."""
    found = [(name, node.outs[0]) for node in graph.walk() if (name := tag_name(node))]
    if names is None:
        return found
    names = (names,) if isinstance(names, str) else tuple(names)
    known = sorted({name for name, _ in found})
    for name in names:
        if name not in known:
            have = ", ".join(map(repr, known)) or "none (mark values with jaxrel.tag(x, name))"
            raise ValueError(
                f"{caller}: the function tags nothing named {name!r}; its tags: {have}"
            )
    return [(name, value) for name, value in found if name in names]


def tap_names(tagged: Sequence[tuple[str, Value]]) -> dict[Value, str]:
    """A name for each tagged value's tap: tags may be used many times, a tap's name once."""
    return {value: f"{index}:{name}" for index, (name, value) in enumerate(tagged)}


def gather(tagged: Sequence[tuple[str, Value]], taps: Mapping[str, Any]) -> dict[str, Any]:
    """By tag, what `tap_names` handed out, stacked as `capture` says."""
    values: dict[str, list] = {}
    for value, key in tap_names(tagged).items():
        scanned = taps[key].ndim > len(value.shape)
        values.setdefault(key.split(":", 1)[1], []).append((taps[key], scanned))
    return {name: _stack(name, found) for name, found in values.items()}


def _stack(name: str, found: list[tuple[Any, bool]]) -> Any:
    if len(found) == 1:
        return found[0][0]
    layers = [value if scanned else value[None] for value, scanned in found]
    shapes = [value.shape[1:] for value in layers]
    if len(set(shapes)) > 1:
        raise ValueError(
            f"values of different shapes are tagged {name!r} and cannot be stacked: "
            f"{', '.join(map(str, shapes))}; give them names of their own"
        )
    return jnp.concatenate(layers)
