"""Recurrent networks: LSTM and GRU, in a plain scan and in `nnx.RNN`."""

from functools import partial

import jax
from flax import nnx
from jax import numpy as jnp

from tests.zoo.case import BATCH, CLASSES, Case, call_merged, filled, generator, normal

FEATURES = 5
WIDTH = 8
TOKENS = 4


def zeros(x):
    return jnp.zeros((x.shape[0], WIDTH), x.dtype)


class ScannedLSTM(nnx.Module):
    """`OptimizedLSTMCell` in `jax.lax.scan`; relevance goes through carries alone."""

    def __init__(self, *, use_bias, rngs):
        self.cell = nnx.OptimizedLSTMCell(FEATURES, WIDTH, rngs=rngs)
        self.head = nnx.Linear(WIDTH, CLASSES, use_bias=use_bias, rngs=rngs)

    def __call__(self, x):
        tokens = jnp.swapaxes(x, 0, 1)
        (_, state), _ = jax.lax.scan(self.cell, (zeros(x), zeros(x)), tokens)
        return self.head(state)


class WrappedLSTM(nnx.Module):
    def __init__(self, *, use_bias, rngs):
        self.rnn = nnx.RNN(nnx.LSTMCell(FEATURES, WIDTH, rngs=rngs), rngs=rngs)
        self.head = nnx.Linear(WIDTH, CLASSES, use_bias=use_bias, rngs=rngs)

    def __call__(self, x):
        states = self.rnn(x, initial_carry=(zeros(x), zeros(x)))
        return self.head(states[:, -1])


class WrappedGRU(nnx.Module):
    def __init__(self, *, use_bias, rngs):
        self.rnn = nnx.RNN(nnx.GRUCell(FEATURES, WIDTH, rngs=rngs), rngs=rngs)
        self.head = nnx.Linear(WIDTH, CLASSES, use_bias=use_bias, rngs=rngs)

    def __call__(self, x):
        return self.head(self.rnn(x, initial_carry=zeros(x))[:, -1])


def recurrent(model, key, dtype, *, biased=True):
    weights, inputs = jax.random.split(key)
    build = lambda: model(use_bias=biased, rngs=nnx.Rngs(0))
    params = filled(build, weights, dtype, biased=biased)
    x = normal(generator(inputs), (BATCH, TOKENS, FEATURES), dtype)
    return Case(call_merged, params, x, "recurrent", conserves=not biased)


ZOO = {
    "lstm": partial(recurrent, ScannedLSTM),
    "lstm_rnn": partial(recurrent, WrappedLSTM),
    "gru_rnn": partial(recurrent, WrappedGRU),
}
BIAS_FREE = {f"{name}_bias_free": partial(make, biased=False) for name, make in ZOO.items()}
