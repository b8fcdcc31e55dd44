"""Other libraries and other spellings: Linen, Equinox, scanned layers, kernels first."""

from functools import partial

import flax.linen as nn
import jax
import pytest
from jax import numpy as jnp

from tests.zoo.case import BATCH, CLASSES, Case, filled, generator, normal, with_random_values
from tests.zoo.transformers import unstacked

WIDTH = 8
DEPTH = 6


class LinenNet(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Conv(6, (3, 3), strides=2)(x)))
        x = nn.max_pool(x, (2, 2), strides=(2, 2))
        x = nn.relu(nn.Conv(WIDTH, (3, 3))(x))
        x = nn.relu(nn.BatchNorm(use_running_average=True)(nn.Dense(WIDTH)(jnp.mean(x, (1, 2)))))
        return nn.Dense(CLASSES)(x)


def linen(key, dtype):
    weights, inputs = jax.random.split(key)
    x = normal(generator(inputs), (BATCH, 16, 16, 3), dtype)
    model = LinenNet()
    params = filled(lambda: model.init(jax.random.key(0), x), weights, dtype)
    return Case(model.apply, params, x, "rectifier")


def equinox(key, dtype):
    """Channels first, one example at a time, kernels before inputs."""
    eqx = pytest.importorskip("equinox")

    class Net(eqx.Module):
        conv: eqx.nn.Conv2d
        pool: eqx.nn.MaxPool2d
        mlp: eqx.nn.MLP

        def __init__(self, key):
            first, second = jax.random.split(key)
            self.conv = eqx.nn.Conv2d(3, 4, 3, stride=2, padding=1, key=first)
            self.pool = eqx.nn.MaxPool2d(2, 2)
            self.mlp = eqx.nn.MLP(16, CLASSES, WIDTH, 2, key=second)

        def __call__(self, x):
            return self.mlp(jnp.ravel(self.pool(jax.nn.relu(self.conv(x)))))

    weights, inputs = jax.random.split(key)
    params, static = eqx.partition(Net(weights), eqx.is_array)
    params = with_random_values(params, weights, dtype)
    fun = lambda params, x: jax.vmap(eqx.combine(params, static))(x)
    x = normal(generator(inputs), (BATCH, 3, 8, 8), dtype)
    return Case(fun, params, x, "rectifier")


def layer(x, values):
    return jax.nn.relu(x @ values["kernel"] + values.get("bias", 0))


def deep_scan(params, x):
    x, _ = jax.lax.scan(lambda x, values: (layer(x, values), None), x, params["layers"])
    return x @ params["head"]


def deep_remat(params, x):
    step = jax.checkpoint(layer, prevent_cse=False)
    x, _ = jax.lax.scan(lambda x, values: (step(x, values), None), x, params["layers"])
    return x @ params["head"]


def deep_unrolled(params, x):
    for values in params["layers"]:
        x = layer(x, values)
    return x @ params["head"]


def deep_mlp(key, dtype, *, biased=True):
    """The input itself is the carry: signed at first, after one layer nowhere negative."""
    rng = generator(key)
    layers = {"kernel": normal(rng, (DEPTH, WIDTH, WIDTH), dtype) * (2 / WIDTH) ** 0.5}
    if biased:
        layers["bias"] = 0.1 * normal(rng, (DEPTH, WIDTH), dtype)
    params = {"layers": layers, "head": normal(rng, (WIDTH, CLASSES), dtype)}
    forms = {
        "remat": (deep_remat, params),
        "unrolled": (deep_unrolled, unstacked(params, DEPTH)),
    }
    x = normal(rng, (BATCH, WIDTH), dtype)
    return Case(deep_scan, params, x, "rectifier", conserves=not biased, forms=forms)


def kernel_first(key, dtype, *, biased=True):
    """Kernels on the left: W @ x for one example, and an einsum that puts the kernel first."""
    rng = generator(key)
    params = {
        "first": normal(rng, (WIDTH, 5), dtype) * 0.6,
        "middle": normal(rng, (WIDTH, WIDTH), dtype) * 0.5,
        "last": normal(rng, (CLASSES, WIDTH), dtype) * 0.5,
    }
    if biased:
        params["bias"] = 0.1 * normal(rng, (WIDTH,), dtype)

    def fun(params, x):
        bias = params.get("bias", 0)
        x = jax.vmap(lambda x: jax.nn.relu(params["first"] @ x + bias))(x)
        x = jax.nn.relu(jnp.einsum("oi,bi->ob", params["middle"], x).T + bias)
        return (params["last"] @ x.T).T

    x = normal(rng, (BATCH, 5), dtype)
    return Case(fun, params, x, "rectifier", conserves=not biased)


ZOO = {
    "linen": linen,
    "equinox": equinox,
    "deep_mlp": deep_mlp,
    "kernel_first": kernel_first,
}
BIAS_FREE = {
    f"{make.__name__}_bias_free": partial(make, biased=False) for make in (deep_mlp, kernel_first)
}
