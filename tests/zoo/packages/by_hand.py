"""Relevance by hand, with the functions replaced that a model calls by name.

Nothing here looks into a program. For attention relevance the model's softmax is replaced by one
that tags its output, and the maps with their gradients are accumulated in NumPy. For CP-LRP the
softmax, the gates and the standard deviations are held constant, and activations are multiplied
by a constant slope: relevance is then input x gradient.
"""

import contextlib
import functools
import importlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import jax
import numpy as np
from jax import numpy as jnp

import jaxrel
from tests.zoo.packages.exhibit import Attention, Model, Slopes


def plain_attention(_: Callable) -> Callable:
    """`jax.nn.dot_product_attention` without what it can do besides, by `jax.nn.softmax`."""

    def attend(query, key, value, bias=None, mask=None, *, scale=None, **_):
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        scores = scale * jnp.einsum("bqhd,bkhd->bhqk", query, key)
        scores = scores if bias is None else scores + bias
        scores = scores if mask is None else jnp.where(mask, scores, -jnp.inf)
        attn = jax.nn.softmax(scores.astype(jnp.float32)).astype(value.dtype)
        return jnp.einsum("bhqk,bkhd->bqhd", attn, value)

    return attend


@contextlib.contextmanager
def replaced(changes: dict[str, Callable[[Callable], Callable]]) -> Iterator[None]:
    """Let `module.name` be what its change makes of it, for models that are traced meanwhile."""
    # Functions that JAX has traced before would not be looked at again.
    jax.clear_caches()
    fused = {"jax.nn.dot_product_attention": plain_attention}
    with contextlib.ExitStack() as stack:
        for target, change in (changes | fused).items():
            module, name = target.rsplit(".", 1)
            before = getattr(importlib.import_module(module), name)
            stack.enter_context(mock.patch(target, change(before)))
        yield
    jax.clear_caches()


def tagging(softmax: Callable) -> Callable:
    """A softmax whose outputs are tagged, with the number of the call."""
    count = itertools.count()
    return lambda *args, **kwargs: jaxrel.tag(softmax(*args, **kwargs), f"map {next(count)}")


def constant(fun: Callable) -> Callable:
    """A function without a derivative."""
    return lambda *args, **kwargs: jax.lax.stop_gradient(fun(*args, **kwargs))


def sloped(fun: Callable) -> Callable:
    """An activation with f(x) / x, held constant, for its derivative."""

    def multiplied(x, *args, **kwargs):
        safe = jnp.where(x == 0, 1, x)
        slope = jax.lax.stop_gradient(jnp.where(x == 0, 0, fun(x, *args, **kwargs) / safe))
        return slope * x

    return multiplied


def cp_lrp(slopes: Slopes, model: Model) -> Any:
    """CP-LRP without stabilisers: input x gradient of the model with constant slopes."""
    changes = dict.fromkeys(slopes.constant, constant) | dict.fromkeys(slopes.activations, sloped)
    with replaced(changes):
        return jax.jit(functools.partial(input_x_gradient, model))(model.params, model.x)


def input_x_gradient(model: Model, params: Any, x: Any) -> Any:
    """Input x gradient; of integer tokens, that of the rows that they look up."""
    if model.table is None:
        return x * jax.grad(lambda x: jnp.sum(model.fun(params, x)))(x)
    # Each row is looked up at one place of an example: its gradient is that place's.
    total = lambda params, x: jnp.sum(model.fun(params, x[None]))
    found = jax.vmap(jax.grad(total, allow_int=True), in_axes=(None, 0))(params, x)
    rows = (_leaf(params, model.table) * _leaf(found, model.table)).sum(-1)
    return jnp.take_along_axis(rows, x, axis=1)


def _leaf(tree: Any, path: str) -> Any:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(p, simple=True, separator="/"): leaf for p, leaf in leaves}
    assert path in named, sorted(named)
    return named[path]


def maps(attention: Attention, score: Callable, *args) -> tuple[np.ndarray, np.ndarray]:
    """The maps of a model's stack and their gradients, [layers, batch, heads, query, key]."""
    names = [f"map {call}" for call in attention.calls or range(attention.layers)]
    with replaced({attention.softmax: tagging}):
        _, values, grads = jax.jit(jaxrel.capture_with_grad(score, names))(*args)
    found, gradients = (
        np.concatenate([_ordered(attention, np.asarray(x[name])) for name in names])
        for x in (values, grads)
    )
    assert len(found) == attention.layers, (len(found), attention.layers)
    np.testing.assert_allclose(found.sum(-1), 1, atol=1e-5)  # they are attention's maps
    return found, gradients


def _ordered(attention: Attention, x: Any) -> np.ndarray:
    axes = attention.axes
    x = x if x.ndim > len(axes) else x[None]
    heads = [axis for axis in axes if axis not in "bqk"]
    order = ["b", *heads, "q", "k"]
    x = x.transpose(0, *(1 + axes.index(axis) for axis in order))
    return x.reshape(*x.shape[:2], -1, *x.shape[-2:])


def equal(attention: Attention, score: Callable, *args) -> np.ndarray:
    """R = I, then R = R + A R for every layer (Chefer et al. 2021, eq. 5 and 6), [batch, q, k]."""
    attn, grad = (x.astype(np.float64) for x in maps(attention, score, *args))
    relevance = np.broadcast_to(np.eye(attn.shape[-1]), (attn.shape[1], *attn.shape[-2:])).copy()
    for layer, gradient in zip(attn, grad, strict=True):
        for example in range(len(relevance)):
            mean = np.maximum(layer[example] * gradient[example], 0).mean(0)
            relevance[example] += mean @ relevance[example]
    return relevance
