"""Streaming, stacked and blockwise relevance on a ViT, where the number of tokens matters."""

from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax import numpy as jnp

from jaxrel import attention
from tests.benchmarks.table import Table, targets
from tests.benchmarks.timing import MIB, Measured, compiled, measure

WIDTH, HEADS, LAYERS, CLASSES, BLOCK = 256, 8, 12, 10, 64
METHODS = ("equal", "weighted")

NOTE = f"""\
A pre-norm transformer of {LAYERS} layers, width {WIDTH} and {HEADS} heads, each layer
rematerialised in one scan, on {{batch}} x {{tokens}} tokens; one class is explained by the row of
token 0. `jax.grad` is of the same model by its input. Blockwise has {BLOCK} queries to a block.
Memory is XLA's temporary memory.

Targets: streaming takes at most 1.1 times the time and the memory of `jax.grad`."""


def run(*, tokens: int, batch: int, quick: bool, repeats: int) -> Table:
    """All forms at one number of tokens.

    Args:
      tokens: the class token and the patches.
      batch: examples.
      quick: a sixteenth of the tokens, only to see that it works.
      repeats: rounds of measurements.
    """
    tokens = tokens // 16 if quick else tokens
    weights = random_weights(jax.random.key(0))
    x = jax.random.normal(jax.random.key(1), (batch, tokens, WIDTH))
    candidates = [compiled("jax.grad", grad, weights, x)]
    for form in ("streaming", "stacked", "blockwise"):
        candidates += [compiled(f"{form} {m}", explain(m, form), weights, x) for m in METHODS]
    what = f"Forms, {tokens} tokens, batch {batch}"
    measured = measure(candidates, repeats=repeats, what=what)
    note = NOTE.format(batch=batch, tokens=tokens)
    return Table(what, note, [row(name, measured) for name in measured])


def random_weights(key: jax.Array, layers: int = LAYERS) -> dict[str, jax.Array]:
    """Weights with a leading layer axis, and a class head."""
    shapes = {
        "query": (layers, WIDTH, WIDTH),
        "key": (layers, WIDTH, WIDTH),
        "value": (layers, WIDTH, WIDTH),
        "out": (layers, WIDTH, WIDTH),
        "expand": (layers, WIDTH, 4 * WIDTH),
        "contract": (layers, 4 * WIDTH, WIDTH),
        "head": (WIDTH, CLASSES),
    }
    keys = jax.random.split(key, len(shapes))
    return {
        name: shape[-2] ** -0.5 * jax.random.normal(key, shape)
        for key, (name, shape) in zip(keys, shapes.items(), strict=True)
    }


def attend(query: jax.Array, key: jax.Array, value: jax.Array) -> jax.Array:
    """Softmax attention of `[batch, heads, tokens, width]`."""
    logits = jnp.einsum("bhqd,bhkd->bhqk", query, key) * query.shape[-1] ** -0.5
    return jnp.einsum("bhqk,bhkd->bhqd", jax.nn.softmax(logits), value)


def attention_branch(weights: Mapping, x: jax.Array) -> jax.Array:
    """What attention adds to the stream."""
    split = lambda x: x.reshape(*x.shape[:2], HEADS, -1).swapaxes(1, 2)
    heads = attend(*(split(norm(x) @ weights[name]) for name in ("query", "key", "value")))
    return heads.swapaxes(1, 2).reshape(x.shape) @ weights["out"]


def mlp_branch(weights: Mapping, x: jax.Array) -> jax.Array:
    """What the MLP adds to the stream."""
    return jax.nn.gelu(norm(x) @ weights["expand"]) @ weights["contract"]


def norm(x: jax.Array) -> jax.Array:
    """Layer norm without parameters."""
    return jax.nn.standardize(x)


def score(weights: Mapping, x: jax.Array) -> jax.Array:
    """Class 0 of each example."""

    def layer(x, weights):
        x = x + attention_branch(weights, x)
        return x + mlp_branch(weights, x), None

    x, _ = scan_layers(layer, x, weights)
    return class_score(weights, x)


def scan_layers(layer: Callable, start: Any, weights: Mapping) -> tuple[Any, None]:
    """Run the layers, each computed again in the backward pass."""
    layers = {name: w for name, w in weights.items() if name != "head"}
    return jax.lax.scan(jax.checkpoint(layer, prevent_cse=False), start, layers)


def class_score(weights: Mapping, x: jax.Array) -> jax.Array:
    """The explained scalar of each example, read from token 0."""
    return (norm(x[:, 0]) @ weights["head"])[:, 0]


def grad(weights: Mapping, x: jax.Array) -> jax.Array:
    """The baseline."""
    return jax.grad(lambda x: score(weights, x).sum())(x)


def explain(method: str, form: Any, block: int = BLOCK) -> Callable:
    """Relevance of the model as it stands."""
    return attention.relevance(score, method=method, form=form, block=block, argnums=1)


def row(name: str, measured: Mapping[str, Measured]) -> dict[str, Any]:
    """One line of the table."""
    this, base = measured[name], measured["jax.grad"]
    met = {"time": this.slower(base) <= 1.1, "memory": this.larger(base) <= 1.1}
    return {
        "method": name,
        "ms": this.milliseconds,
        "x jax.grad": this.slower(base),
        "temp MiB": this.temp / MIB,
        "x jax.grad temp": this.larger(base),
        "targets": targets(**met) if name.startswith("streaming") else "",
    }
