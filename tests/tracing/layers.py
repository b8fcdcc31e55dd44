"""One small network, written in many ways that compute the same."""

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

import jaxrel

LAYERS, BATCH, WIDTH = 3, 2, 4


WEIGHTS = np.random.default_rng(0).normal(size=(LAYERS, WIDTH, WIDTH)).astype(np.float32)


X = np.random.default_rng(1).normal(size=(BATCH, WIDTH)).astype(np.float32)


def layer(x, w):
    hidden = jaxrel.tag(jax.nn.softmax(x @ w), "hidden")
    return x + hidden @ w.T


def scanned(x):
    return lax.scan(lambda x, w: (layer(x, w), None), x, WEIGHTS)[0].sum(-1)


def unrolled(x):
    for w in WEIGHTS:
        x = layer(x, w)
    return x.sum(-1)


def remat(x):
    return lax.scan(jax.checkpoint(lambda x, w: (layer(x, w), None)), x, WEIGHTS)[0].sum(-1)


def unrolled_remat(x):
    for w in WEIGHTS:
        x = jax.checkpoint(layer)(x, w)
    return x.sum(-1)


def fori(x):
    ws = jnp.asarray(WEIGHTS)
    return lax.fori_loop(0, LAYERS, lambda i, x: layer(x, ws[i]), x).sum(-1)


def in_jit(x):
    return jax.jit(lambda x: jax.jit(scanned)(x))(x)


SAME = {
    "unrolled": unrolled,
    "remat": remat,
    "unrolled_remat": unrolled_remat,
    "fori": fori,
    "jit": in_jit,
}
