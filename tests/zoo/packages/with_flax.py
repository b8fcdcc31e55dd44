"""Models of flaxmodels, nanodl, jax-image-models (jimm), mamba2-jax, attnax and lpips-nnx."""

from collections.abc import Callable
from typing import Any

import jax
from flax import nnx
from jax import numpy as jnp

from tests.zoo.packages.exhibit import (
    BATCH,
    CLASSES,
    Attention,
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
    """An NNX module, split so that its parameters can be an argument; `out` calls it."""
    module.eval()
    graph, params, rest = nnx.split(module, nnx.Param, ...)

    def fun(params, x):
        return out(nnx.merge(graph, params, rest), x)

    return Model(fun, random_like(params), x, table)


def resnet18() -> Model:
    import flaxmodels

    module = flaxmodels.ResNet18(
        output="logits", pretrained=None, normalize=False, num_classes=CLASSES, dtype="float64"
    )
    x = normal(BATCH, 32, 32, 3)
    params = random_like(jax.jit(lambda: module.init(KEY, x))())
    return Model(lambda params, x: module.apply(params, x, train=False), params, x)


def transformer_of(build: Callable, **more: Any) -> Model:
    """A decoder of nanodl, with the logits of three words at the last position."""
    settings = {
        "num_layers": 2,
        "num_heads": 2,
        "hidden_dim": WIDTH,
        "feedforward_dim": 12,
        "dropout": 0.0,
        "vocab_size": WORDS,
        "embed_dim": WIDTH,
        "max_length": TOKENS,
        "start_token": 0,
        "end_token": 1,
    }
    return build(settings | more)


def gemma() -> Model:
    import nanodl

    options = {"num_groups": 2, "num_heads": 1, "feedforward_dim": WIDTH}
    module = transformer_of(lambda defaults: nanodl.Gemma(**defaults), **options)
    out = lambda found: found[0][:, -1, :CLASSES]
    return linen(module, tokens(WORDS, TOKENS), out, "params/decoder/embedding/embedding")


def gpt4() -> Model:
    import nanodl

    module = transformer_of(lambda options: nanodl.GPT4(**options), num_experts=3, top_k=2)
    out = lambda found: found[:, -1, :CLASSES]
    return linen(module, tokens(WORDS, TOKENS), out, "params/decoder/embedding/embedding")


def whisper() -> Model:
    import nanodl

    module = transformer_of(lambda options: nanodl.Whisper(**options))
    words, x = tokens(WORDS, TOKENS)[:1], normal(BATCH, 6, WIDTH)
    spoken = lambda x: jnp.broadcast_to(words, (len(x), TOKENS))
    params = random_like(jax.jit(module.init)(KEY, x, spoken(x)))
    out = lambda params, x: module.apply(params, x, spoken(x))[:, -1, :CLASSES]
    return Model(out, params, x)


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


def vit() -> Model:
    import jimm

    module = jimm.VisionTransformer(
        num_classes=CLASSES,
        img_size=16,
        patch_size=8,
        num_layers=2,
        num_heads=2,
        mlp_dim=12,
        hidden_size=WIDTH,
        dtype=jnp.result_type(float),
    )
    return of_nnx(module, normal(BATCH, 16, 16, 3), lambda module, x: module(x))


def clip() -> Model:
    """Images against three fixed texts."""
    import jimm

    module = jimm.CLIP(16, 2, 64, 8, 6, WORDS, WIDTH, 2, 2, dtype=jnp.result_type(float))
    texts = jnp.asarray([[1, 2, 10, 0, 0, 0], [3, 10, 0, 0, 0, 0], [4, 5, 6, 10, 0, 0]])
    return of_nnx(module, normal(BATCH, 16, 16, 3), lambda module, x: module(x, texts))


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
WHISPER = Attention(layers=2, calls=(0, 1), others=4)
EXHIBITS = [
    Exhibit("ResNet-18", "flaxmodels", resnet18, "epsilon_plus_flat", slopes=LINEN),
    Exhibit("Gemma", "nanodl", gemma, attention=Attention(2), slopes=LINEN),
    Exhibit("GPT-4", "nanodl", gpt4, attention=Attention(2), slopes=LINEN),
    Exhibit("Whisper", "nanodl", whisper, attention=WHISPER, slopes=LINEN),
    Exhibit("Diffusion U-Net", "nanodl", diffusion, slopes=LINEN),
    Exhibit("MLP-Mixer", "nanodl", mixer, slopes=LINEN),
    Exhibit("ViT", "jax-image-models", vit, attention=Attention(2)),
    Exhibit("CLIP", "jax-image-models", clip, attention=Attention(2)),
    Exhibit("Mamba 2", "mamba2-jax", mamba2),
]
