"""Modules as functions: what they hold, under which names, and how to call them while tracing."""

import functools
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np


def pure(fun: Callable) -> Callable:
    """The function, with an NNX module that it is (or is a method of) put together at each call.

    NNX lets a module change, by `nnx.scan` or dropout, only under the trace that made it. The
    copy is made of the module's own arrays; the module stays as it was.
    """
    if isinstance(fun, functools.partial):
        return functools.partial(pure(fun.func), *fun.args, **fun.keywords)
    nnx = sys.modules.get("flax.nnx")
    module = getattr(fun, "__self__", fun)
    if nnx is None or not isinstance(module, nnx.Module):
        return fun
    kind, state = nnx.split(module)

    def call(*args, **kwargs):
        # The map makes variables that belong to the trace.
        copy = nnx.merge(kind, jax.tree.map(lambda leaf: leaf, state))
        method = copy if module is fun else functools.partial(getattr(fun, "__func__", fun), copy)
        return method(*args, **kwargs)

    return call


def advice(error: Exception) -> str | None:
    """What to do about an NNX module that a function brings along and that changes when called."""
    if "trace level" not in str(error):
        return None
    return (
        "the function brings along an NNX module that cannot be changed while it is traced "
        "(dropout in train mode, nnx.scan, nnx.RNN). Turn dropout off, model.eval(); else give "
        "the module itself as the function, jaxrel.lrp(model, rules)(x), or as an argument, "
        "jaxrel.lrp(lambda model, x: model(x), rules, argnums=1)(model, x) or "
        "attention.relevance(lambda model, x: model(x)[:, target])(model, x)"
    )


def split(arg: Any) -> tuple[Any, Callable[[Any], Any]]:
    """An argument without the leaves that are no numbers, and what puts those back.

    Functions, strings and booleans in a tree, such as an Equinox module's activation, are None
    in the first; the second takes a tree of its structure.
    """
    leaves: list[Any]
    tree: Any
    leaves, tree = jax.tree.flatten(arg)
    data = [is_data(leaf) for leaf in leaves]
    if arg is None or (leaves and tree == jax.tree.structure(0) and not data[0]):
        return (), lambda _: arg
    if all(data):
        return arg, lambda given: given

    def merge(given: Any) -> Any:
        rest = iter(jax.tree.leaves(given))
        pairs = zip(leaves, data, strict=True)
        return jax.tree.unflatten(
            tree, [next(rest) if is_data else leaf for leaf, is_data in pairs]
        )

    stripped = [leaf if known else None for leaf, known in zip(leaves, data, strict=True)]
    return jax.tree.unflatten(tree, stripped), merge


def is_data(leaf: Any) -> bool:
    """Whether a leaf is an array or a number; booleans of Python choose what is computed."""
    if isinstance(leaf, bool | str | bytes):
        return False
    if isinstance(leaf, np.ndarray | np.generic):
        return leaf.dtype.kind not in "OSU"
    numbers = isinstance(leaf, jax.Array | int | float | complex)
    return numbers or hasattr(leaf, "dtype") or hasattr(leaf, "__jax_array__")


def held(fun: Callable) -> Iterator[tuple[str, Any]]:
    """(name, object) of what a function brings along: modules, closures, what it wraps.

    What is wrapped (by `jax.vmap`, `eqx.filter_vmap`, `functools.partial`) comes first, so that
    its parameters have the names that they have in it.
    """
    yield from _held(fun, set())


def _held(fun: Any, seen: set[int]) -> Iterator[tuple[str, Any]]:
    if id(fun) in seen:
        return
    seen.add(id(fun))
    if isinstance(fun, functools.partial):
        yield from _held(fun.func, seen)
        yield from (("", arg) for arg in (*fun.args, *fun.keywords.values()))
        return
    if (wrapped := getattr(fun, "__wrapped__", None)) is not None:
        yield from _held(wrapped, seen)
    yield "", getattr(fun, "__self__", fun)
    function = getattr(fun, "__func__", fun)
    for name, owner in _names(function):
        if isinstance(owner, functools.partial) or hasattr(owner, "__wrapped__"):
            yield from _held(owner, seen)
        yield name, owner


def _names(function: Any) -> Iterator[tuple[str, Any]]:
    """What the names mean that a function does not define."""
    code = getattr(function, "__code__", None)
    if not inspect.iscode(code):
        return
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield name, cell.cell_contents
        except ValueError:  # an empty cell
            continue
    scope = getattr(function, "__globals__", {})
    yield from ((name, scope[name]) for name in code.co_names if name in scope)
