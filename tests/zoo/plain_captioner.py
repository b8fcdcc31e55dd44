"""LRP of captioners in plain Python loops, rule by rule as Sun et al. 2022 write it.

`jaxrel.explanations.words` is compared with it, in values and in time. Of `jaxrel` it takes a
model's weights and nothing else. Each operation runs by itself; loops go over the words, back over
the decoder's steps and back over the encoder's layers. There is one image and no batch. The values
of the forward pass are computed once, and all else is computed word by word.

Gates, attention maps and the sentinel's weight are constants, and relevance passes ReLU and tanh
unchanged. In the names, z is a linear map's result (before a ReLU) or a sum, and `of_x` is the
relevance of x.
"""

from typing import Any, NamedTuple

from flax import nnx
from jax import lax
from jax import numpy as jnp
from jax.nn import one_hot, relu, sigmoid, softmax
from jax.numpy import tanh


def plain_word_relevance(model, image, text, positions):
    """Relevance of words of one caption: in pixels, [words, height, width], and [words, tokens].

    `model` is a `Captioner` with a VGG, of the kind "gridtd" with the paper's form of attention or
    "aoa"; `image` is a normalised image, [height, width, 3], that each pooling halves without a
    rest, and `text` its token ids.
    """
    weights = nnx.to_pure_dict(nnx.state(model))
    features, layers = encode(weights["encoder"]["stages"], image)
    by_position = features.reshape(-1, features.shape[-1])
    if model.config.kind == "gridtd":
        decoder = GridTD(weights, by_position, text)
    else:
        decoder = AoA(weights, by_position, text, model.config.heads)
    pixels, words = [], []
    for position in positions:
        of_features, of_words = decoder.explain(position)
        pixels.append(encode_back(of_features.reshape(features.shape), layers).sum(-1))
        words.append(of_words)
    return jnp.stack(pixels), jnp.stack(words)


# ---- linear maps, sums and the LSTM: the epsilon rule


def linear(layer, x):
    return x @ layer["kernel"] + layer["bias"]


def over(relevance, z, epsilon=0.01):
    return relevance / (z + jnp.where(z < 0, -epsilon, epsilon))


def share(relevance, part, z):
    """What one summand of z takes."""
    return part * over(relevance, z)


def linear_back(relevance, layer, x, z):
    """What the inputs of a linear map take. The bias is a part of z, and keeps its share."""
    return x * jnp.einsum("...k,jk->...j", over(relevance, z), layer["kernel"])


class Cell(NamedTuple):
    """An LSTM after a step: c = kept + new."""

    c: Any
    h: Any
    kept: Any = None
    new: Any = None
    g: Any = None
    x: Any = None


def lstm(layer, x, before):
    x = jnp.concatenate([x, before.h])
    i, f, g, o = jnp.split(linear(layer["gates"], x), 4)
    kept, new = sigmoid(f) * before.c, sigmoid(i) * tanh(g)
    return Cell(kept + new, sigmoid(o) * tanh(kept + new), kept, new, g, x)


def lstm_back(of_c, layer, cell):
    """What the c before takes, and what [x; h before] takes by way of g."""
    size = len(cell.c)
    to_g = {"kernel": layer["gates"]["kernel"][:, 2 * size : 3 * size]}
    of_x = linear_back(share(of_c, cell.new, cell.c), to_g, cell.x, cell.g)
    return share(of_c, cell.kept, cell.c), of_x


def logit_back(head, attended, hidden, token):
    """What the two values that a word is predicted from take of its logit."""
    z = attended + hidden
    logits = linear(head, z)
    of_z = linear_back(one_hot(token, len(logits)) * logits, head, z, logits)
    return share(of_z, attended, z), share(of_z, hidden, z)


# ---- the decoders: `explain` gives the relevance of the features and of each token


class Step(NamedTuple):
    """A step of "gridtd": context is what attention found, and attended has the sentinel in it."""

    first: Cell
    second: Cell
    alpha: Any
    beta: Any
    sentinel: Any
    context: Any
    attended: Any


class GridTD:
    """Adaptive attention between two LSTMs ("Ada-LSTM")."""

    def __init__(self, weights, features, text):
        self.weights, self.features, self.text = weights, features, text
        cell, attention = weights["cell"], weights["cell"]["attention"]
        self.values_z, self.mean = linear(weights["project"], features), features.mean(0)
        self.values, self.image_z = relu(self.values_z), linear(cell["image"], self.mean)
        keys, w = linear(attention["image"], self.values), attention["score"]["kernel"][:, 0]
        zero = jnp.zeros(self.values.shape[1])
        first = second = Cell(zero, zero)
        self.steps = []
        for token in text:
            word = weights["embedding"]["embedding"][token]
            x = jnp.concatenate([second.h, relu(self.image_z), word])
            first = lstm(cell["lstm"]["lstm"], x, first)
            sentinel = sigmoid(linear(cell["lstm"]["gate"], first.x)) * tanh(first.c)
            u = first.h @ attention["hidden"]["kernel"]
            scores = tanh(keys + u) @ w
            sentinel_score = tanh(linear(attention["sentinel"], sentinel) + u) @ w
            alpha, beta = softmax(scores), softmax(jnp.append(scores, sentinel_score))[-1]
            context = alpha @ self.values
            attended = beta * sentinel + (1 - beta) * context
            second = lstm(cell["language"], jnp.concatenate([attended, first.h]), second)
            self.steps.append(Step(first, second, alpha, beta, sentinel, context, attended))

    def explain(self, position):
        weights, cell = self.weights, self.weights["cell"]
        hidden, embed, last = self.values.shape[1], len(self.image_z), self.steps[position - 1]
        token = self.text[position]
        of_attended, of_h2 = logit_back(weights["head"], last.attended, last.second.h, token)
        of_c1 = of_c2 = of_h1 = jnp.zeros(hidden)
        of_values, of_image = jnp.zeros_like(self.values), jnp.zeros(embed)
        of_words = jnp.zeros(len(self.text))
        for i in reversed(range(position)):
            step = self.steps[i]
            of_c2, of_x = lstm_back(of_c2 + of_h2, cell["language"], step.second)
            from_x, to_h1, of_h2 = jnp.split(of_x, 3)
            of_attended, of_h1 = of_attended + from_x, of_h1 + to_h1
            of_sentinel = share(of_attended, step.beta * step.sentinel, step.attended)
            of_context = share(of_attended, (1 - step.beta) * step.context, step.attended)
            of_values += share(of_context, step.alpha[:, None] * self.values, step.context)
            # The sentinel and h1 are gates times tanh(c1), which takes all that they have.
            of_c1, of_x = lstm_back(of_c1 + of_h1 + of_sentinel, cell["lstm"]["lstm"], step.first)
            ends = [hidden, hidden + embed, hidden + 2 * embed]
            to_h2, to_image, of_word, of_h1 = jnp.split(of_x, ends)
            of_h2, of_image = of_h2 + to_h2, of_image + to_image
            of_words = of_words.at[i].set(of_word.sum())
            # Only the last step's word is predicted from what attention found.
            of_attended = jnp.zeros(hidden)
        of_mean = linear_back(of_image, cell["image"], self.mean, self.image_z)
        of_features = share(of_mean, self.features / len(self.features), self.mean)
        of_features += linear_back(of_values, weights["project"], self.features, self.values_z)
        return of_features, of_words


class AoA:
    """Multi-head attention behind a gate, after one LSTM ("MH-FC"); all heads are explained."""

    def __init__(self, weights, features, text, heads):
        self.weights, self.features, self.text, self.heads = weights, features, text, heads
        cell = weights["cell"]
        self.projected_z = linear(weights["project"], features)
        self.projected = relu(self.projected_z)
        self.image = self.projected.mean(0)
        self.values = linear(cell["value"], self.projected)
        keys = self.by_head(linear(cell["key"], self.projected))
        after = Cell(jnp.zeros(len(self.image)), jnp.zeros(len(self.image)))
        self.steps = []
        for token in text:
            word = weights["embedding"]["embedding"][token]
            after = lstm(cell["lstm"], jnp.concatenate([word, self.image]), after)
            query = self.by_head(linear(cell["query"], after.h))
            alpha = softmax((keys * query).sum(-1) / query.shape[-1] ** 0.5, axis=0)
            context = (alpha[..., None] * self.by_head(self.values)).sum(0)
            context_z = linear(cell["out"], context.reshape(-1))
            attended = sigmoid(linear(cell["gate"], after.h)) * context_z
            self.steps.append((after, alpha, context, context_z, attended))

    def by_head(self, x):
        return x.reshape(*x.shape[:-1], self.heads, -1)

    def explain(self, position):
        weights, cell = self.weights, self.weights["cell"]
        embed = weights["embedding"]["embedding"].shape[1]
        after, alpha, context, context_z, attended = self.steps[position - 1]
        of_attended, of_h = logit_back(weights["head"], attended, after.h, self.text[position])
        of_context = linear_back(of_attended, cell["out"], context.reshape(-1), context_z)
        parts = alpha[..., None] * self.by_head(self.values)
        of_values = share(self.by_head(of_context), parts, context).reshape(self.values.shape)
        of_c = of_image = jnp.zeros_like(self.image)
        of_words = jnp.zeros(len(self.text))
        for i in reversed(range(position)):
            of_c, of_x = lstm_back(of_c + of_h, cell["lstm"], self.steps[i][0])
            of_word, to_image, of_h = jnp.split(of_x, [embed, embed + len(self.image)])
            of_image += to_image
            of_words = of_words.at[i].set(of_word.sum())
        of_projected = share(of_image, self.projected / len(self.projected), self.image)
        of_projected += linear_back(of_values, cell["value"], self.projected, self.values)
        of_features = linear_back(of_projected, weights["project"], self.features, self.projected_z)
        return of_features, of_words


# ---- the encoder: alpha 1, beta 0 without bias


def encode(stages, image):
    """The features, and the input and kernel of each layer, whose kernel is None if it pools."""
    x, layers = image, []
    for index, stage in stages.items():
        if index:
            layers.append((x, None))
            x = windows(x).max(-1)
        for layer in stage.values():
            layers.append((x, layer["kernel"]))
            x = relu(convolve(x, layer["kernel"]) + layer["bias"])
    return x, layers


def encode_back(relevance, layers):
    for x, kernel in reversed(layers):
        relevance = pool_back(relevance, x) if kernel is None else conv_back(relevance, x, kernel)
    return relevance


def convolve(x, kernel):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x[None], kernel, (1, 1), "SAME", dimension_numbers=numbers)[0]


def conv_back(relevance, x, kernel):
    """x⁺ w⁺ and x⁻ w⁻ share everything."""
    parts = [(relu(x), relu(kernel))]
    # Of all inputs only the image's values have both signs.
    if (x < 0).any():
        parts.append((-relu(-x), -relu(-kernel)))
    z = sum(convolve(a, w) for a, w in parts)
    s = relevance / jnp.where(z == 0, 1e-7, z)
    # A 3 x 3 convolution is transposed by turning its kernel around and exchanging its channels.
    return sum(a * convolve(s, w[::-1, ::-1].swapaxes(2, 3)) for a, w in parts)


def windows(x):
    """The four values of each window of 2 x 2, [height / 2, width / 2, channels, 4]."""
    height, width, channels = x.shape
    x = x.reshape(height // 2, 2, width // 2, 2, channels)
    return x.transpose(0, 2, 4, 1, 3).reshape(height // 2, width // 2, channels, 4)


def pool_back(relevance, x):
    """The largest value of a window takes all; the first of them, if they are equal."""
    taken = one_hot(windows(x).argmax(-1), 4) * relevance[..., None]
    height, width, channels = relevance.shape
    taken = taken.reshape(height, width, channels, 2, 2).transpose(0, 3, 1, 4, 2)
    return taken.reshape(x.shape)
