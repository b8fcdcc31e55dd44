"""Transformers: a ViT, the library's own CLIP, a Llama-like decoder, and two small ones."""

from functools import partial

import jax
import numpy as np
from flax import nnx
from jax import numpy as jnp

from jaxrel.models import CLIP, CLIPConfig, TextConfig, VisionConfig
from jaxrel.models.transformer import causal_mask
from tests.zoo.case import BATCH, CLASSES, Case, call, filled, generator, normal

WIDTH = 16
HEADS = 4
KEY_HEADS = 2
HEAD = WIDTH // HEADS
HIDDEN = 24
TOKENS = 5
LAYERS = 3


def exact_attention(query, key, value, **_):
    """Attention in the inputs' dtype: the one of JAX has a softmax in float32, even of float64."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
    return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, axis=-1), value)


class Encoder(nnx.Module):
    """A pre-LN layer with a GELU."""

    def __init__(self, *, use_bias, rngs):
        self.norm1 = nnx.LayerNorm(WIDTH, use_bias=use_bias, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(
            HEADS,
            WIDTH,
            use_bias=use_bias,
            attention_fn=exact_attention,
            decode=False,
            rngs=rngs,
        )
        self.norm2 = nnx.LayerNorm(WIDTH, use_bias=use_bias, rngs=rngs)
        self.expand = nnx.Linear(WIDTH, HIDDEN, use_bias=use_bias, rngs=rngs)
        self.contract = nnx.Linear(HIDDEN, WIDTH, use_bias=use_bias, rngs=rngs)

    def __call__(self, x):
        x = x + self.attention(self.norm1(x))
        return x + self.contract(nnx.gelu(self.expand(self.norm2(x))))


class ViT(nnx.Module):
    """With a class token and learned positions, or, if nothing may be added, their mean."""

    def __init__(self, *, use_bias, rngs):
        self.patches = nnx.Conv(3, WIDTH, (8, 8), strides=8, use_bias=use_bias, rngs=rngs)
        self.class_token = nnx.Param(jnp.zeros((1, WIDTH))) if use_bias else None
        self.positions = nnx.Param(jnp.zeros((5, WIDTH))) if use_bias else None
        self.layers = nnx.List(Encoder(use_bias=use_bias, rngs=rngs) for _ in range(2))
        self.norm = nnx.LayerNorm(WIDTH, use_bias=use_bias, rngs=rngs)
        self.head = nnx.Linear(WIDTH, CLASSES, use_bias=use_bias, rngs=rngs)

    def __call__(self, x):
        x = self.patches(x).reshape(x.shape[0], -1, WIDTH)
        if self.class_token is not None:
            first = jnp.broadcast_to(self.class_token[...], (x.shape[0], 1, WIDTH))
            x = jnp.concatenate([first, x], axis=1) + self.positions[...]
        for layer in self.layers:
            x = layer(x)
        x = x[:, 0] if self.class_token is not None else jnp.mean(x, axis=1)
        return self.head(self.norm(x))


def vit(key, dtype, *, biased=True):
    weights, inputs = jax.random.split(key)
    build = lambda: ViT(use_bias=biased, rngs=nnx.Rngs(0))
    params = filled(build, weights, dtype, biased=biased)
    x = normal(generator(inputs), (BATCH, 16, 16, 3), dtype)
    return Case(call, params, x, "attention", conserves=not biased)


def small_clip(key, dtype):
    # CLIP computes in bfloat16 or in float32, whatever its parameters are.
    computes = "bfloat16" if dtype == jnp.bfloat16 else "float32"
    config = CLIPConfig(
        vision=VisionConfig(
            width=WIDTH, layers=2, heads=2, mlp_width=HIDDEN, image_size=16, patch_size=8
        ),
        text=TextConfig(
            width=12, layers=3, heads=3, mlp_width=HIDDEN, vocab_size=12, context=TOKENS
        ),
        projection=10,
        dtype=computes,
    )
    return filled(lambda: CLIP(config, rngs=nnx.Rngs(0)), key, jnp.float32), computes


def clip_image(key, dtype):
    """An image, compared with fixed texts."""
    weights, inputs, texts = jax.random.split(key, 3)
    model, computes = small_clip(weights, dtype)
    others = normal(generator(texts), (CLASSES, 10), jnp.float32)

    def fun(params, x):
        return jnp.exp(params["model"].logit_scale[...]) * (
            params["model"].encode_image(x) @ params["texts"].T
        )

    x = normal(generator(inputs), (BATCH, 16, 16, 3), jnp.float32)
    params = {"model": model, "texts": others}
    return Case(fun, params, x, "attention", computes=computes)


def clip_text(key, dtype):
    """A text's embeddings, compared with fixed images."""
    weights, inputs, images = jax.random.split(key, 3)
    model, computes = small_clip(weights, dtype)
    others = normal(generator(images), (CLASSES, 10), jnp.float32)

    def fun(params, x):
        text = params["model"].text
        tokens, _ = text.transformer(x + text.position_embedding[...], causal_mask(TOKENS))
        end = jnp.array([TOKENS - 1] * x.shape[0])
        return text.embed(tokens, end) @ params["images"].T

    x = normal(generator(inputs), (BATCH, TOKENS, 12), jnp.float32)
    params = {"model": model, "images": others}
    return Case(fun, params, x, "attention", computes=computes)


def rms_norm(x, scale):
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-5) * scale


def rotated(x):
    """Rotary positions (Su et al. 2021) of [batch, tokens, heads, head]."""
    half = x.shape[-1] // 2
    angles = np.outer(np.arange(x.shape[1]), 100.0 ** (-np.arange(half) / half))[:, None]
    cos, sin = jnp.asarray(np.cos(angles), x.dtype), jnp.asarray(np.sin(angles), x.dtype)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def grouped_attention(layer, x):
    """Causal attention with fewer keys and values than queries."""
    split = lambda name, heads: (x @ layer[name]).reshape(*x.shape[:2], heads, HEAD)
    query, key = rotated(split("query", HEADS)), rotated(split("key", KEY_HEADS))
    value = split("value", KEY_HEADS)
    query = query.reshape(*x.shape[:2], KEY_HEADS, HEADS // KEY_HEADS, HEAD)
    scores = jnp.einsum("bqkgd,bskd->bkgqs", query, key) * HEAD**-0.5
    scores = jnp.where(causal_mask(x.shape[1]), scores, jnp.finfo(x.dtype).min)
    mixed = jnp.einsum("bkgqs,bskd->bqkgd", jax.nn.softmax(scores, axis=-1), value)
    return mixed.reshape(x.shape) @ layer["out"]


def llama_layer(x, layer):
    x = x + grouped_attention(layer, rms_norm(x, layer["norm1"]))
    y = rms_norm(x, layer["norm2"])
    return x + (jax.nn.silu(y @ layer["gate"]) * (y @ layer["up"])) @ layer["down"]


def read_out(params, x):
    return rms_norm(x[:, -1], params["norm"]) @ params["head"]


def llama_scan(params, x):
    x, _ = jax.lax.scan(lambda x, layer: (llama_layer(x, layer), None), x, params["layers"])
    return read_out(params, x)


def llama_remat(params, x):
    layer = jax.checkpoint(llama_layer, prevent_cse=False)
    x, _ = jax.lax.scan(lambda x, values: (layer(x, values), None), x, params["layers"])
    return read_out(params, x)


def llama_unrolled(params, x):
    for layer in params["layers"]:
        x = llama_layer(x, layer)
    return read_out(params, x)


def unstacked(params, depth):
    """Parameters of a scan as those of a loop: a list of layers for the leading axis."""
    layers = [jax.tree.map(lambda p, i=i: p[i], params["layers"]) for i in range(depth)]
    return params | {"layers": layers}


def llama(key, dtype):
    """Embeddings in, the last token's logits out. It has no biases."""
    rng = generator(key)
    shapes = {
        "query": (WIDTH, WIDTH),
        "key": (WIDTH, KEY_HEADS * HEAD),
        "value": (WIDTH, KEY_HEADS * HEAD),
        "out": (WIDTH, WIDTH),
        "gate": (WIDTH, HIDDEN),
        "up": (WIDTH, HIDDEN),
        "down": (HIDDEN, WIDTH),
    }
    kernel = lambda *shape: normal(rng, shape, dtype) * shape[-2] ** -0.5
    layers = {name: kernel(LAYERS, *shape) for name, shape in shapes.items()}
    scale = lambda *shape: 1 + 0.1 * normal(rng, shape, dtype)
    layers |= {"norm1": scale(LAYERS, WIDTH), "norm2": scale(LAYERS, WIDTH)}
    params = {"layers": layers, "norm": scale(WIDTH), "head": kernel(WIDTH, CLASSES)}
    forms = {
        "remat": (llama_remat, params),
        "unrolled": (llama_unrolled, unstacked(params, LAYERS)),
    }
    x = normal(rng, (BATCH, TOKENS, WIDTH), dtype)
    return Case(llama_scan, params, x, "attention", conserves=True, forms=forms)


class FusedAttention(nnx.Module):
    """`jax.nn.dot_product_attention`, causal, with fewer keys and values than queries."""

    def __init__(self, *, rngs):
        self.query = nnx.LinearGeneral(WIDTH, (HEADS, HEAD), rngs=rngs)
        self.key = nnx.LinearGeneral(WIDTH, (KEY_HEADS, HEAD), rngs=rngs)
        self.value = nnx.LinearGeneral(WIDTH, (KEY_HEADS, HEAD), rngs=rngs)
        self.out = nnx.LinearGeneral((HEADS, HEAD), WIDTH, axis=(-2, -1), rngs=rngs)
        self.head = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

    def __call__(self, x):
        mixed = jax.nn.dot_product_attention(
            self.query(x), self.key(x), self.value(x), is_causal=True
        )
        return self.head((x + self.out(mixed))[:, -1])


def dot_product_attention(key, dtype):
    weights, inputs = jax.random.split(key)
    params = filled(lambda: FusedAttention(rngs=nnx.Rngs(0)), weights, dtype)
    x = normal(generator(inputs), (BATCH, TOKENS, WIDTH), dtype)
    # See `exact_attention`.
    computes = jnp.float32 if dtype == jnp.float64 else dtype
    return Case(call, params, x, "attention", computes=computes)


class Tied(nnx.Module):
    """Shares of the vocabulary in, logits of the vocabulary out, through one embedding."""

    def __init__(self, dtype, *, rngs):
        self.embed = nnx.Embed(CLASSES, WIDTH, dtype=dtype, rngs=rngs)
        self.expand = nnx.Linear(WIDTH, HIDDEN, use_bias=False, rngs=rngs)
        self.contract = nnx.Linear(HIDDEN, WIDTH, use_bias=False, rngs=rngs)

    def __call__(self, x):
        x = x @ self.embed.embedding[...]
        x = x + self.contract(nnx.gelu(self.expand(x)))
        return self.embed.attend(jnp.mean(x, axis=1))


def tied(key, dtype):
    weights, inputs = jax.random.split(key)
    params = filled(lambda: Tied(dtype, rngs=nnx.Rngs(0)), weights, dtype)
    x = jax.nn.softmax(normal(generator(inputs), (BATCH, TOKENS, CLASSES), dtype))
    return Case(call, params, x, "attention", conserves=True)


ZOO = {
    "vit": vit,
    "clip_image": clip_image,
    "clip_text": clip_text,
    "llama": llama,
    "dot_product_attention": dot_product_attention,
    "tied": tied,
}
BIAS_FREE = {"vit_bias_free": partial(vit, biased=False), "llama": llama, "tied": tied}
