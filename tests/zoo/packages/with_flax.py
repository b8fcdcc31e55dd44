"""Models of flaxmodels, mamba2-jax and nanodl."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax import numpy as jnp

from jaxrel import op, rules
from tests.zoo.packages.exhibit import (
    BATCH,
    CLASSES,
    Exhibit,
    Model,
    Slopes,
    normal,
    random_like,
    tokens,
)

KEY = jax.random.PRNGKey(0)
WIDTH, TOKENS, WORDS = 8, 5, 11


def linen(module: Any, x: Any, out: Callable, table: str | None = None, *more: Any) -> Model:
    """A Linen module without its dropout; `out` makes logits of what it returns."""
    rngs = {"params": KEY, "dropout": KEY}
    params = random_like(jax.jit(module.init)(rngs, x, *more))
    return Model(lambda params, x: out(module.apply(params, x, *more)), params, x, table)


def of_nnx(module: Any, x: Any, out: Callable, table: str | None = None) -> Model:
    """An NNX module as a function of its state; `out` calls it."""
    module.eval()
    graph, state = nnx.split(module)
    # A copy at the caller's trace level, which a scan over layers may change.
    copied = lambda state: nnx.merge(graph, jax.tree.map(lambda leaf: leaf, state))
    return Model(lambda state, x: out(copied(state), x), random_like(state), x, table)


def resnet18() -> Model:
    import flaxmodels

    module = flaxmodels.ResNet18(
        output="logits", pretrained=None, normalize=False, num_classes=CLASSES, dtype="float64"
    )
    x = normal(BATCH, 32, 32, 3)
    params = random_like(jax.jit(lambda: module.init(KEY, x))())
    return Model(lambda params, x: module.apply(params, x, train=False), params, x)


def diffusion() -> Model:
    """The U-Net that predicts noise, at one time; three of its pixels."""
    import nanodl

    unet = nanodl.UNet((8, 8), [4, 6, 8], 1, 4, 1.0, 1000.0)
    x = normal(BATCH, 8, 8, 3)
    call = lambda params, x: unet.apply(params, x, jnp.full((len(x), 1, 1, 1), 0.3))
    params = random_like(jax.jit(lambda: unet.init(KEY, x, jnp.full((BATCH, 1, 1, 1), 0.3)))())
    return Model(lambda params, x: call(params, x)[:, 4, 4], params, x)


def mixer() -> Model:
    import nanodl

    module = nanodl.Mixer((4, 4), 2, WIDTH, 2, 12, 0.0, CLASSES)
    return linen(module, normal(BATCH, 8, 8, 3), lambda found: found[0])


STEP = "max+sub+add+abs+neg+exp+log1p+add+select_n+max+min"


def mamba2() -> Model:
    import mamba2_jax

    config = mamba2_jax.Mamba2Config(
        vocab_size=WORDS,
        hidden_size=WIDTH,
        state_size=4,
        head_dim=4,
        chunk_size=4,
        num_hidden_layers=2,
        tie_word_embeddings=False,
    )
    module = mamba2_jax.Mamba2ForCausalLM(config, rngs=nnx.Rngs(0))
    out = lambda module, x: module(x)["logits"][:, -1, :CLASSES]
    return of_nnx(module, tokens(WORDS, TOKENS), out, "backbone/embedder/embedding/value")


LINEN = Slopes().of("flax.linen")
EXHIBITS = [
    Exhibit("ResNet-18", "flaxmodels", resnet18, "epsilon_plus_flat", slopes=LINEN),
    Exhibit("Diffusion U-Net", "nanodl", diffusion, slopes=LINEN),
    Exhibit("MLP-Mixer", "nanodl", mixer, slopes=LINEN),
    # The decay of a state is exp of the data, and its step a clipped softplus, which no rule passes
    # on: their derivatives, said so.
    Exhibit(
        "Mamba 2",
        "mamba2-jax",
        mamba2,
        entries=((op("exp"), rules.Gradient()), (op(STEP), rules.Gradient())),
        slopes=None,
        dtype="float32",
    ),
]
