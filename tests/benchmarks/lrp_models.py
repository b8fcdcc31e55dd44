"""The networks whose relevance is timed: plain JAX functions with random weights.

`build(name, batch=, quick=)` gives the published sizes, or tiny ones. Weights are nested dicts,
which `side_by_side.twins` reads too. Tags mark what Grad-CAM explains.
"""

import dataclasses
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jax.nn import relu

from jaxrel import tag

LOW, HIGH = -3.0, 3.0  # no pixel is outside
ROPE_BASE = 10_000.0

Params = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Network:
    """A function (params, x) -> logits [batch, classes], and its arguments.

    `remat` is the same function with less memory, where there is one; `scanned` says that its
    layers are one scan. `options` are what it knows besides its weights.
    """

    fun: Callable
    params: Params
    x: np.ndarray
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    remat: Callable | None = None
    scanned: bool = False


def build(name: str, *, batch: int, quick: bool) -> Network:
    """One of `NETWORKS`, its arguments on JAX's device."""
    network = NETWORKS[name](np.random.default_rng(0), batch, quick)
    params, x = jax.device_put((network.params, network.x))
    return dataclasses.replace(network, params=params, x=x)


def vgg16(rng: np.random.Generator, batch: int, quick: bool) -> Network:
    """VGG16 (Simonyan and Zisserman 2015)."""
    width, side, hidden, classes = (4, 64, 16, 10) if quick else (64, 224, 4096, 1000)
    stages, inputs = [], 3
    for factor, depth in ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3)):
        stage = []
        for _ in range(depth):
            stage.append(affine(rng, 3, 3, inputs, factor * width))
            inputs = factor * width
        stages.append(stage)
    flat = (side // 32) ** 2 * inputs
    sizes = (flat, hidden, hidden, classes)
    dense = [affine(rng, *pair) for pair in pairwise(sizes)]
    return Network(apply_vgg, {"stages": stages, "dense": dense}, images(rng, batch, side))


def apply_vgg(params: Params, x: Any) -> Any:
    """The function of `vgg16`."""
    for index, stage in enumerate(params["stages"]):
        for layer in stage:
            x = relu(conv(x, layer, padding=1))
        x = max_pool(tag(x, f"stages/{index}"), 2, padding=0)
    x = x.reshape(len(x), -1)
    *hidden, head = params["dense"]
    for layer in hidden:
        x = relu(linear(x, layer))
    return linear(x, head)


def resnet50(rng: np.random.Generator, batch: int, quick: bool) -> Network:
    """ResNet-50 (He et al. 2016), its batch normalisations by running statistics."""
    width, side, classes = (4, 64, 10) if quick else (64, 224, 1000)
    blocks, inputs = [], width
    for stage, depth in enumerate((3, 4, 6, 3)):
        inner = width * 2**stage
        for index in range(depth):
            block = {
                "conv1": normalised(rng, 1, 1, inputs, inner),
                "conv2": normalised(rng, 3, 3, inner, inner),
                "conv3": normalised(rng, 1, 1, inner, 4 * inner),
            }
            if index == 0:
                block["shortcut"] = normalised(rng, 1, 1, inputs, 4 * inner)
            blocks.append(block)
            inputs = 4 * inner
    params = {
        "stem": normalised(rng, 7, 7, 3, width),
        "blocks": blocks,
        "head": affine(rng, inputs, classes),
    }
    return Network(apply_resnet, params, images(rng, batch, side))


def apply_resnet(params: Params, x: Any) -> Any:
    """The function of `resnet50`."""
    x = relu(conv_norm(x, params["stem"], stride=2, padding=3))
    x = max_pool(x, 3, padding=1)
    for block, stride in zip(params["blocks"], strides(params["blocks"]), strict=True):
        x = bottleneck(x, block, stride)
    x = tag(x, "blocks")
    return linear(jnp.mean(x, axis=(1, 2)), params["head"])


def bottleneck(x: Any, block: Params, stride: int) -> Any:
    """A block: three convolutions beside a shortcut."""
    y = relu(conv_norm(x, block["conv1"]))
    y = relu(conv_norm(y, block["conv2"], stride=stride, padding=1))
    y = conv_norm(y, block["conv3"])
    if "shortcut" in block:
        x = conv_norm(x, block["shortcut"], stride=stride)
    return relu(y + x)


def strides(blocks: list[Params]) -> list[int]:
    """Every stage but the first begins by halving the sides."""
    return [2 if i and "shortcut" in block else 1 for i, block in enumerate(blocks)]


def vit(rng: np.random.Generator, batch: int, quick: bool) -> Network:
    """ViT-B/16 (Dosovitskiy et al. 2021), its layers one after the other in the program."""
    if quick:
        width, depth, heads, hidden, side, patch, classes = 16, 2, 4, 32, 32, 8, 10
    else:
        width, depth, heads, hidden, side, patch, classes = 768, 12, 12, 3072, 224, 16, 1000
    tokens = (side // patch) ** 2 + 1
    layers = [
        {
            "norm1": norm(rng, width),
            "attention": {
                name: affine(rng, width, width) for name in ("query", "key", "value", "out")
            },
            "norm2": norm(rng, width),
            "mlp": {"expand": affine(rng, width, hidden), "contract": affine(rng, hidden, width)},
        }
        for _ in range(depth)
    ]
    params = {
        "patches": affine(rng, patch, patch, 3, width),
        "class_token": noise(rng, 1, width),
        "positions": noise(rng, tokens, width),
        "layers": layers,
        "norm": norm(rng, width),
        "head": affine(rng, width, classes),
    }
    options = {"heads": heads}
    return Network(partial(apply_vit, **options), params, images(rng, batch, side), options)


def apply_vit(params: Params, x: Any, *, heads: int) -> Any:
    """The function of `vit`."""
    size = params["patches"]["kernel"].shape[0]
    x = conv(x, params["patches"], stride=size)
    x = x.reshape(len(x), -1, x.shape[-1])
    first = jnp.broadcast_to(params["class_token"], (len(x), 1, x.shape[-1]))
    x = jnp.concatenate([first, x], axis=1) + params["positions"]
    for index, layer in enumerate(params["layers"]):
        attention = layer["attention"]
        y = tag(layer_norm(x, layer["norm1"]), f"norm1/{index}")
        query, key, value = (
            split_heads(linear(y, attention[name]), heads) for name in ("query", "key", "value")
        )
        logits = jnp.einsum("bqhd,bkhd->bhqk", query, key) * query.shape[-1] ** -0.5
        y = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(logits), value)
        x = x + linear(y.reshape(x.shape), attention["out"])
        y = linear(layer_norm(x, layer["norm2"]), layer["mlp"]["expand"])
        x = x + linear(jax.nn.gelu(y, approximate=False), layer["mlp"]["contract"])
    return linear(layer_norm(x[:, 0], params["norm"]), params["head"])


def decoder(rng: np.random.Generator, batch: int, quick: bool) -> Network:
    """A Llama-like decoder of embeddings (Touvron et al. 2023), its layers one scan."""
    if quick:
        width, depth, heads, shared, hidden, tokens, words = 16, 3, 4, 2, 24, 6, 20
    else:
        width, depth, heads, shared, hidden, tokens, words = 512, 12, 8, 2, 1408, 128, 32_000
    keys = width // heads * shared
    layers = {
        "norm1": norm(rng, width, depth=depth, bias=False),
        "attention": {
            "query": affine(rng, width, width, depth=depth, bias=False),
            "key": affine(rng, width, keys, depth=depth, bias=False),
            "value": affine(rng, width, keys, depth=depth, bias=False),
            "out": affine(rng, width, width, depth=depth, bias=False),
        },
        "norm2": norm(rng, width, depth=depth, bias=False),
        "mlp": {
            "gate": affine(rng, width, hidden, depth=depth, bias=False),
            "up": affine(rng, width, hidden, depth=depth, bias=False),
            "down": affine(rng, hidden, width, depth=depth, bias=False),
        },
    }
    params = {
        "layers": layers,
        "norm": norm(rng, width, bias=False),
        "head": affine(rng, width, words, bias=False),
    }
    options = {"heads": heads, "shared": shared}
    return Network(
        partial(apply_decoder, **options, remat=False),
        params,
        noise(rng, batch, tokens, width),
        options,
        remat=partial(apply_decoder, **options, remat=True),
        scanned=True,
    )


def apply_decoder(params: Params, x: Any, *, heads: int, shared: int, remat: bool) -> Any:
    """The function of `decoder`: logits of the word after the last."""

    def block(x, layer):
        x = x + grouped_attention(rms_norm(x, layer["norm1"]), layer["attention"], heads, shared)
        y, mlp = rms_norm(x, layer["norm2"]), layer["mlp"]
        gated = jax.nn.silu(linear(y, mlp["gate"])) * linear(y, mlp["up"])
        return x + linear(gated, mlp["down"]), None

    block = jax.checkpoint(block, prevent_cse=False) if remat else block
    x, _ = jax.lax.scan(block, x, params["layers"])
    return linear(rms_norm(x[:, -1], params["norm"]), params["head"])


def grouped_attention(x: Any, params: Params, heads: int, shared: int) -> Any:
    """Causal attention in which several queries share a key and a value."""
    query = rotated(split_heads(linear(x, params["query"]), heads))
    key = rotated(split_heads(linear(x, params["key"]), shared))
    value = split_heads(linear(x, params["value"]), shared)
    query = query.reshape(*query.shape[:2], shared, heads // shared, query.shape[-1])
    logits = jnp.einsum("bqkgd,bskd->bkgqs", query, key) * query.shape[-1] ** -0.5
    causal = np.tri(x.shape[1], dtype=bool)
    attn = jax.nn.softmax(jnp.where(causal, logits, jnp.finfo(x.dtype).min))
    mixed = jnp.einsum("bkgqs,bskd->bqkgd", attn, value)
    return linear(mixed.reshape(x.shape), params["out"])


def rotated(x: Any) -> Any:
    """Rotary positions (Su et al. 2021) of [batch, tokens, heads, head]."""
    cos, sin = (table[:, None] for table in rotary(x.shape[1], x.shape[-1]))
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def rotary(tokens: int, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Cosines and sines [tokens, size / 2]."""
    half = size // 2
    angles = np.outer(np.arange(tokens), ROPE_BASE ** (-np.arange(half) / half))
    return np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)


def split_heads(x: Any, heads: int) -> Any:
    """[batch, tokens, features] to [batch, tokens, heads, head]."""
    return x.reshape(*x.shape[:2], heads, -1)


def conv(x: Any, layer: Params, *, stride: int = 1, padding: int = 0) -> Any:
    """A convolution of [batch, height, width, channels]."""
    z = jax.lax.conv_general_dilated(
        x,
        layer["kernel"],
        window_strides=(stride, stride),
        padding=((padding, padding), (padding, padding)),
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    return z + layer["bias"] if "bias" in layer else z


def conv_norm(x: Any, layer: Params, *, stride: int = 1, padding: int = 0) -> Any:
    """A convolution and its batch normalisation."""
    z = conv(x, layer, stride=stride, padding=padding)
    stats = layer["norm"]
    z = (z - stats["mean"]) * (jax.lax.rsqrt(stats["var"] + 1e-5) * stats["scale"])
    return z + stats["bias"]


def linear(x: Any, layer: Params) -> Any:
    """A dense layer."""
    z = x @ layer["kernel"]
    return z + layer["bias"] if "bias" in layer else z


def max_pool(x: Any, size: int, *, padding: int) -> Any:
    """The greatest value of each window, with stride 2."""
    window, steps = (1, size, size, 1), (1, 2, 2, 1)
    pads = ((0, 0), (padding, padding), (padding, padding), (0, 0))
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, window, steps, pads)


def layer_norm(x: Any, layer: Params) -> Any:
    """Layer normalisation of the last axis."""
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6)
    return x * layer["scale"] + layer["bias"]


def rms_norm(x: Any, layer: Params) -> Any:
    """Root mean square normalisation of the last axis."""
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * layer["scale"]


def affine(
    rng: np.random.Generator, *shape: int, depth: int | None = None, bias: bool = True
) -> Params:
    """Weights of a linear map that keeps the size of what a ReLU made."""
    stack = () if depth is None else (depth,)
    kernel = noise(rng, *stack, *shape) * np.float32(np.sqrt(2 / np.prod(shape[:-1])))
    return {"kernel": kernel} | ({"bias": 0.1 * noise(rng, *stack, shape[-1])} if bias else {})


def normalised(rng: np.random.Generator, *shape: int) -> Params:
    """Weights of a convolution without bias, and the statistics of its normalisation."""
    size = shape[-1]
    stats = {"mean": 0.1 * noise(rng, size), "var": np.exp(0.5 * noise(rng, size))}
    return affine(rng, *shape, bias=False) | {"norm": norm(rng, size) | stats}


def norm(
    rng: np.random.Generator, size: int, *, depth: int | None = None, bias: bool = True
) -> Params:
    """Scale, near 1, and bias of a normalisation."""
    shape = (size,) if depth is None else (depth, size)
    scale = {"scale": 1 + 0.1 * noise(rng, *shape)}
    return scale | ({"bias": 0.1 * noise(rng, *shape)} if bias else {})


def images(rng: np.random.Generator, batch: int, side: int) -> np.ndarray:
    """Noise between LOW and HIGH."""
    return noise(rng, batch, side, side, 3).clip(LOW, HIGH)


def noise(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Standard normal float32."""
    return rng.standard_normal(shape, dtype=np.float32)


NETWORKS = {"VGG16": vgg16, "ResNet-50": resnet50, "ViT-B/16": vit, "12-layer decoder": decoder}
