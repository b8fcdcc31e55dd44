"""Bimodal models written as others write them, small: DETR, Whisper, Perceiver, LXMERT.

Each is a function of its data and of how its attention maps are marked: as it stands, or by tags
for `SCHEDULES`, which say in which order the streams attend.
"""

import jax
import numpy as np
from jax import lax
from jax import numpy as jnp

import jaxrel

WIDTH, HEADS, BATCH = 6, 2, 2
RNG = np.random.default_rng(0)
W = RNG.normal(size=(40, WIDTH, WIDTH)) * 0.6
BIAS = RNG.normal(size=(40, WIDTH)) * 0.2
IMAGE = RNG.normal(size=(BATCH, 4, 4, WIDTH))
QUERIES = RNG.normal(size=(4, WIDTH))
POSITIONS = RNG.normal(size=(16, WIDTH)) * 0.3
SOUND = RNG.normal(size=(BATCH, 10, WIDTH))
KERNEL = RNG.normal(size=(3, WIDTH, WIDTH)) * 0.4
TABLE = RNG.normal(size=(9, WIDTH))
TOKENS = RNG.integers(0, 9, size=(BATCH, 5))
LATENTS = RNG.normal(size=(3, WIDTH))
WORDS = RNG.normal(size=(BATCH, 4, WIDTH))


def norm(x):
    x = x - x.mean(-1, keepdims=True)
    return x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-5)


def attend(q, k, v, i, mask=None):
    """Multi-head attention with weights from `i` on: its maps, and what they give."""

    def apart(x, j):
        x = x @ W[i + j] + BIAS[i + j]
        return jnp.moveaxis(x.reshape(*x.shape[:-1], HEADS, -1), -2, -3)

    scores = apart(q, 0) @ apart(k, 1).swapaxes(-1, -2) / 2
    scores = scores if mask is None else jnp.where(mask, scores, -1e30)
    values = apart(v, 2)

    def out(attn):
        joined = jnp.moveaxis(attn @ values, -3, -2)
        return joined.reshape(*joined.shape[:-2], WIDTH) @ W[i + 3] + BIAS[i + 3]

    return jax.nn.softmax(scores), out


def add(x, attention, name, *, tagged):
    """The residual sum around an attention: unmarked, or with tags of all or of the maps alone."""
    attn, out = attention
    if not tagged:
        return x + out(attn)
    if tagged == "maps":
        return x + out(jaxrel.tag(attn, name))
    after = jaxrel.tag(out(jaxrel.tag(attn, name)), f"{name}/after")
    return jaxrel.tag(x, f"{name}/before") + after


def mlp(x, i):
    return x + jnp.tanh(x @ W[i]) @ W[i + 1]


def detr(image, *, tagged=False):
    """Object queries read an image's encoder; positions are added at queries and keys."""
    x = image.reshape(len(image), 16, WIDTH)
    place = x + POSITIONS
    x = norm(mlp(norm(add(x, attend(place, place, x, 0), "encoder", tagged=tagged)), 8))
    q = jnp.zeros((len(image), *QUERIES.shape), x.dtype)
    for i in (10, 20):
        place = q + QUERIES
        q = norm(add(q, attend(place, place, q, i), "decoder", tagged=tagged))
        q = norm(add(q, attend(q + QUERIES, x + POSITIONS, x, i + 4), "cross", tagged=tagged))
        q = norm(mlp(q, i + 8))
    return q[:, 1] @ W[0, 0]


def whisper(sound, tokens, *, tagged=False):
    """A causal decoder of tokens over an encoder of a sound, which a convolution halves."""
    numbers = ("NHC", "HIO", "NHC")
    x = lax.conv_general_dilated(sound, KERNEL, (2,), "SAME", dimension_numbers=numbers)
    x = jnp.tanh(x) + POSITIONS[: x.shape[1]]
    h = norm(x)
    x = norm(mlp(add(x, attend(h, h, h, 0), "encoder", tagged=tagged), 8))
    t = jnp.take(TABLE, tokens, axis=0) + POSITIONS[: tokens.shape[1]]
    causal = np.tril(np.ones((tokens.shape[1], tokens.shape[1]), bool))

    def layer(t, i):
        h = norm(t)
        t = add(t, attend(h, h, h, i, causal), "decoder", tagged=tagged)
        return mlp(add(t, attend(norm(t), x, x, i + 4), "cross", tagged=tagged), i + 8)

    for i in (10, 20):
        t = layer(t, i)
    return norm(t)[:, -1] @ TABLE[3]


def perceiver(data, *, tagged=False):
    """Latents read the data twice, and attend to themselves in between."""
    z = jnp.broadcast_to(LATENTS, (len(data), *LATENTS.shape))
    for i in (0, 20):
        z = mlp(add(z, attend(norm(z), data, data, i), "cross", tagged=tagged), i + 12)
        h = norm(z)
        z = mlp(add(z, attend(h, h, h, i + 4), "latents", tagged=tagged), i + 14)
    return z[:, 1] @ W[0, 0]


def lxmert(words, image, *, tagged=False):
    """Two streams that attend to each other, then to themselves, in a scan over layers."""
    s, q = words, image.reshape(len(image), 16, WIDTH)
    q = add(q, attend(q, q, q, 4), "image", tagged=tagged)

    def layer(streams, scale):
        s, q = streams
        to_image, to_words = attend(s * scale, q, q, 8), attend(q, s, s, 12)
        s, q = (
            norm(add(s, to_image, "sq", tagged=tagged)),
            norm(add(q, to_words, "qs", tagged=tagged)),
        )
        s = norm(add(s, attend(s, s, s, 16), "ss", tagged=tagged))
        q = norm(add(q, attend(q, q, q, 20), "qq", tagged=tagged))
        return (s, q), None

    (s, _), _ = lax.scan(layer, (s, q), jnp.array([1.0, 0.5, 0.8], words.dtype))
    return s[:, 0] @ W[0, 0]


def encoder_decoder(encoder, decoder, cross):
    return (((("qq", encoder),),), ((("ss", decoder),), (("sq", cross),)))


# By model: its data, the order in which its streams attend, and the target token.
MODELS = {
    detr: ((IMAGE,), encoder_decoder("encoder", "decoder", "cross"), 1),
    whisper: ((SOUND, TOKENS), encoder_decoder("encoder", "decoder", "cross"), -1),
    perceiver: (
        (IMAGE.reshape(BATCH, 16, WIDTH),),
        (((("sq", "cross"),), (("ss", "latents"),)),),
        1,
    ),
    lxmert: (
        (WORDS, IMAGE),
        (
            ((("qq", "image"),),),
            ((("sq", "sq"), ("qs", "qs")), (("ss", "ss"), ("qq", "qq"))),
        ),
        0,
    ),
}
