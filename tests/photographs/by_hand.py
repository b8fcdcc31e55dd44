"""Relevance of EfficientNet-Lite0 written out: block by block, without a graph or a composite.

Cotangents c = relevance / value go backward, as in the library. Batch normalisations are part of
their convolutions, but for `captioning`, which shares by them on their own.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
from jax import lax
from jax import numpy as jnp

EPS = 1e-6


def stabilised(z, amount=EPS):
    return jnp.where(z >= 0, z + amount, z - amount)


def divided(a, b):
    return jnp.where(b == 0, 0, a / jnp.where(b == 0, 1, b))


def shared(relevance, total):
    return jnp.where(total == 0, 0, relevance / stabilised(total))


def pos(x):
    return jnp.where(x > 0, x, 0)


def neg(x):
    return jnp.where(x < 0, x, 0)


@dataclasses.dataclass(frozen=True)
class Map:
    """z = op(x, w) + b."""

    op: Callable
    x: Any
    w: Any
    b: Any

    @property
    def z(self):
        return self.op(self.x, self.w) + self.b

    def back(self, x, w, s):
        """x_i sum_j w_ij s_j."""
        return x * jax.vjp(lambda x: self.op(x, w), self.x)[1](s)[0]

    def signs(self):
        """The four products of a sign of the input and one of the weight."""
        x, w = (pos(self.x), neg(self.x)), (pos(self.w), neg(self.w))
        return ((x[0], w[0]), (x[1], w[1])), ((x[0], w[1]), (x[1], w[0]))

    def total(self, pairs):
        return sum(self.op(x, w) for x, w in pairs)

    def through(self, pairs, s):
        return sum(self.back(x, w, s) for x, w in pairs)


# Rules: relevance of x, given that of z.


def epsilon(m, r, amount=EPS):
    return m.back(m.x, m.w, r / stabilised(m.z, amount))


def plus(m, r):
    up, _ = m.signs()
    return m.through(up, shared(r, m.total(up) + pos(m.b)))


def plus_without_bias(m, r):
    up, _ = m.signs()
    total = m.total(up)
    return m.through(up, r / jnp.where(total == 0, 1e-7, total))


def alpha_beta(m, r):
    up, down = m.signs()
    raised = m.through(up, shared(r, m.total(up) + pos(m.b)))
    lowered = m.through(down, shared(r, m.total(down) + neg(m.b)))
    return 2 * raised - lowered


def gamma(m, r, amount=0.25):
    up, down = m.signs()
    p, n = m.total(up), m.total(down)
    z = p + n + m.b
    s = jnp.where(z > 0, shared(r, z + amount * (p + pos(m.b))), 0)
    found = m.back(m.x, m.w, s) + amount * m.through(up, s)
    s = jnp.where(z < 0, shared(r, z + amount * (n + neg(m.b))), 0)
    return found + m.back(m.x, m.w, s) + amount * m.through(down, s)


def flat(m, r):
    ones, full = jnp.ones_like(m.x), jnp.ones_like(m.w)
    return m.back(ones, full, shared(r, jnp.broadcast_to(m.op(ones, full), r.shape)))


def box(low, high):
    def rule(m, r):
        lows, highs = (jnp.broadcast_to(jnp.asarray(v), m.x.shape) for v in (low, high))
        parts = ((m.x, m.w, 1), (lows, pos(m.w), -1), (highs, neg(m.w), -1))
        s = shared(r, sum(sign * m.op(x, w) for x, w, sign in parts))
        return sum(sign * m.back(x, w, s) for x, w, sign in parts)

    return rule


# Activations: c of x, given that of y = relu6(x).


def relu6(x):
    return jnp.clip(x, 0, 6)


def slope(x):
    return jnp.where((x > 0) & (x < 6), 1.0, 0.0)


ACTIVATIONS = {
    "pass": lambda x, c: c * divided(relu6(x), x),
    "slope": lambda x, c: c * slope(x),
    "guided": lambda x, c: pos(c) * slope(x),
    "deconvnet": lambda x, c: pos(c),
    "smooth": lambda x, c: c * jax.nn.sigmoid(10 * x),
}


@dataclasses.dataclass(frozen=True)
class Preset:
    """What a composite says: None for the derivative."""

    conv: Callable | None = None
    dense: Callable | None = None
    first: Callable | None = None
    activation: str = "pass"
    sums: float | None = EPS
    norms_apart: bool = False

    def sum(self, z, c):
        return c if self.sums is None else c * z / stabilised(z, self.sums)


def linear(m, c, rule):
    if rule is None:
        return m.back(jnp.ones_like(m.x), m.w, c)
    return divided(rule(m, m.z * c), m.x)


def presets(low, high):
    plain = {"conv": None, "dense": None, "sums": None}
    return {
        "epsilon_plus": Preset(plus, epsilon),
        "epsilon_plus_flat": Preset(plus, epsilon, flat),
        "epsilon_alpha2_beta1": Preset(alpha_beta, epsilon),
        "epsilon_alpha2_beta1_flat": Preset(alpha_beta, epsilon, flat),
        "epsilon_gamma_box": Preset(gamma, epsilon, box(low, high)),
        "excitation_backprop": Preset(plus, plus, activation="slope"),
        # It names no sums: they keep their derivative.
        "attn_lrp": Preset(epsilon, epsilon, sums=None),
        "captioning": Preset(
            plus_without_bias, lambda m, r: epsilon(m, r, 0.01), sums=0.01, norms_apart=True
        ),
        "guided_backprop": Preset(**plain, activation="guided"),
        "deconvnet": Preset(**plain, activation="deconvnet"),
        "beta_smooth": Preset(**plain, activation="smooth"),
    }


class Layer:
    """A convolution with its batch normalisation, run forward; `back` goes backward."""

    def __init__(self, weights, conv, norm, x, stride, rectified):
        kernel = weights[f"{conv}.weight"]
        groups = x.shape[-1] // kernel.shape[2]
        self.scale = weights[f"{norm}.weight"] / jnp.sqrt(weights[f"{norm}.running_var"] + 1e-3)
        self.shift = weights[f"{norm}.bias"] - weights[f"{norm}.running_mean"] * self.scale

        def op(x, w):
            numbers = ("NHWC", "HWIO", "NHWC")
            return lax.conv_general_dilated(
                x,
                w,
                (stride, stride),
                "SAME",
                dimension_numbers=numbers,
                feature_group_count=groups,
            )

        self.folded = Map(op, x, kernel * self.scale, self.shift)
        self.bare = Map(op, x, kernel, jnp.zeros(()))
        self.rectified = rectified
        self.z = self.folded.z
        self.y = relu6(self.z) if rectified else self.z

    def back(self, c, preset):
        if self.rectified:
            c = ACTIVATIONS[preset.activation](self.z, c)
        if not preset.norms_apart:
            return linear(self.folded, c, preset.conv)
        z = self.bare.z
        size = jnp.abs(z * self.scale)
        c = divided(divided(self.z * c * size, size + jnp.abs(self.shift)), z)
        return linear(self.bare, c, preset.conv)

    def first(self, c, preset):
        """Relevance of the pixels."""
        if preset.first is None:
            return self.folded.x * self.back(c, preset)
        c = ACTIVATIONS[preset.activation](self.z, c)
        return preset.first(self.folded, self.z * c)


class Block:
    """A block, run forward."""

    def __init__(self, weights, name, x, stride):
        self.x, self.layers = x, []
        steps = (("_expand_conv", "_bn0", 1), ("_depthwise_conv", "_bn1", stride))
        for conv, norm, step in (*steps, ("_project_conv", "_bn2", 1)):
            if f"{name}.{conv}.weight" in weights:
                names = f"{name}.{conv}", f"{name}.{norm}"
                self.layers.append(Layer(weights, *names, x, step, conv != "_project_conv"))
                x = self.layers[-1].y
        self.adds = x.shape == self.x.shape
        self.y = x + self.x if self.adds else x

    def back(self, c, preset):
        c = beside = preset.sum(self.y, c) if self.adds else c
        for layer in reversed(self.layers):
            c = layer.back(c, preset)
        return c + beside if self.adds else c


def relevance(weights, strides, x, target, preset):
    """Relevance of the pixels for one class of each image."""
    stem = Layer(weights, "_conv_stem", "_bn0", x, 2, True)
    blocks, y = [], stem.y
    for i, stride in enumerate(strides):
        blocks.append(Block(weights, f"_blocks.{i}", y, stride))
        y = blocks[-1].y
    head = Layer(weights, "_conv_head", "_bn1", y, 1, True)
    mean = head.y.mean((1, 2))
    dense = Map(lambda x, w: x @ w, mean, weights["_fc.weight"].T, weights["_fc.bias"])
    c = preset.sum(mean, linear(dense, jax.nn.one_hot(target, dense.w.shape[1]), preset.dense))
    c = jnp.broadcast_to(c[:, None, None] / head.y[0, ..., 0].size, head.y.shape)
    for part in (head, *reversed(blocks)):
        c = part.back(c, preset)
    return stem.first(c, preset)
