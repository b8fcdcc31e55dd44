"""Small networks that several files explain, and their relevance by hand."""

import functools

import jax
import numpy as np
from flax import nnx
from jax import lax
from jax import numpy as jnp

import jaxrel
from jaxrel.propagation.rules import (
    Flat,
    WSquare,
)

RNGS = nnx.Rngs(0)


W42 = np.ones((4, 2), np.float32)


F64 = {"rngs": RNGS, "param_dtype": jnp.float64}


BARE = F64 | {"use_bias": False}


def normal(*shape):
    return drawn(shape, jnp.float64 if jax.config.jax_enable_x64 else jnp.float32)


@functools.cache
def drawn(shape, dtype):
    # Once, and by no program of a network that asks for it: the draws would take most of it.
    with jax.ensure_compile_time_eval():
        return jax.random.normal(jax.random.key(sum(shape) + len(shape)), shape, dtype)


def last(cell, x):
    """The last output of a recurrent cell that starts at zero."""
    state = jnp.zeros((len(x), cell.hidden_features))
    state = state if isinstance(cell, nnx.GRUCell) else (state, state)
    return lax.scan(lambda state, x: cell(state, x), state, x.swapaxes(0, 1))[1][-1]


def conv1(x, w):
    return lax.conv_general_dilated(
        x[None], w, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )[0]


# Seeds, arguments, places.


def dense(params, x):
    hidden = jaxrel.tag(jax.nn.relu(x @ params["w1"] + params["b1"]), "hidden")
    return hidden @ params["w2"]


def dense_params():
    return {"w1": normal(4, 6), "b1": normal(6), "w2": normal(6, 3)}


def stack_params():
    return {"w": normal(4, 5, 5) / 2, "b": normal(4, 5) / 4}


def scanned(p, x):
    def step(x, layer):
        return x + jax.nn.relu(x @ layer["w"] + layer["b"]), None

    return lax.scan(step, x, p)[0]


def unrolled(layers, x):
    for layer in layers:
        x = x + jax.nn.relu(x @ layer["w"] + layer["b"])
    return x


def shared_by_hand(rule, w, b, h, r):
    """The relevance of a layer's inputs, in NumPy: that of its outputs in shares of a total."""
    if isinstance(rule, Flat):
        parts, total = np.ones((1, *w.shape)), len(w) + 1e-6
    elif isinstance(rule, WSquare):
        parts, total = w[None] ** 2, (w**2).sum(0) + b**2 + 1e-6
    else:
        z = h @ w + b
        parts, total = h[..., None] * w, z + np.where(z >= 0, rule.epsilon, -rule.epsilon)
    return (parts @ (r / total)[..., None])[..., 0]


def relevance_by_hand(rules, layers, x):
    """The relevance of x in `unrolled`, by a loop in NumPy."""
    states = [x]
    for w, b in layers:
        states.append(states[-1] + np.maximum(states[-1] @ w + b, 0))
    r = states[-1]
    for n, (w, b) in reversed([*enumerate(layers)]):
        h, y = states[n], states[n + 1] - states[n]
        c = r / np.where(h + y == 0, 1, h + y)
        share = shared_by_hand(rules[n], w, b, h, c * y)
        # Behind the first layer relevance is a factor of the value: zeros take none.
        r = c * h + (share if n == 0 else np.where(h == 0, 0, share))
    return r
