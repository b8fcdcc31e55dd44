"""Models of eqx-zoo, equimo and jaxonmodels: Equinox modules, of one example each."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax

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

SWIGLU = Slopes().plus("jax.nn.silu")
KEY = jax.random.PRNGKey(0)
# Looked up when it is called, so that it can be replaced.
GELU = lambda x: jax.nn.gelu(x)
WIDTH, TOKENS, WORDS = 8, 5, 11


def of_one(module: Any, x: Any, call: Callable, table: str | None = None) -> Model:
    """A module, and how it is called for one example."""
    params, rest = eqx.partition(module, eqx.is_inexact_array)

    def fun(params, x):
        return jax.vmap(lambda x: call(eqx.combine(params, rest), x))(x)

    return Model(fun, random_like(params), x, table)


def image_model(build: Callable, side: int = 16, **options: Any) -> Model:
    """A classifier of equimo for images [channels, height, width]."""
    module = build(**{"in_channels": 3, "num_classes": CLASSES, "key": KEY} | options)
    call = lambda module, x: module(x, key=KEY, inference=True)
    return of_one(module, normal(BATCH, 3, side, side), call)


def decoder(**changes: Any) -> Model:
    """A language model of eqx-zoo, with the logits of three words at the last position."""
    from eqx_zoo.models.causal_lm.config import Config
    from eqx_zoo.models.causal_lm.model import CausalLM

    settings = {
        "architecture": "LlamaForCausalLM",
        "vocab_size": WORDS,
        "hidden_size": WIDTH,
        "intermediate_size": 12,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 4,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "qk_norm": False,
        "rope_scaling": None,
    }
    module = CausalLM(Config(**settings | changes), key=KEY)
    call = lambda module, ids: module(ids)[0][-1, :CLASSES]
    return of_one(module, tokens(WORDS, TOKENS), call, "model/embed_tokens/weight")


def qwen3() -> Model:
    return decoder(architecture="Qwen3ForCausalLM", qk_norm=True, tie_word_embeddings=False)


def bert() -> Model:
    from eqx_zoo.models.encoder.config import EncoderConfig
    from eqx_zoo.models.encoder.model import Encoder

    config = EncoderConfig(
        architecture="BertModel",
        vocab_size=WORDS,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=12,
        max_position_embeddings=16,
        type_vocab_size=2,
        layer_norm_eps=1e-12,
    )
    module = Encoder(config, key=KEY)
    call = lambda module, ids: module(ids)[0, :CLASSES]
    return of_one(module, tokens(WORDS, TOKENS), call, "embeddings/word_embeddings/weight")


def vit(**options: Any) -> Model:
    from equimo.vision.models.vit import VisionTransformer

    settings = {
        "img_size": 16,
        "patch_size": 8,
        "act_layer": GELU,
        "dim": WIDTH,
        "num_heads": 2,
        "depths": [2],
    }
    return image_model(VisionTransformer, **settings | {"reg_tokens": 0} | options)


def dinov3() -> Model:
    return vit(
        reg_tokens=2,
        use_global_pos_embed=False,
        use_local_pos_embed=True,
        init_values=1.0,
        ffn_layer="swiglu",
        global_pool="token",
    )


def spectrogram() -> Model:
    from equimo.audio.models.ast import AudioSpectrogramTransformer

    module = AudioSpectrogramTransformer(
        input_fdim=16,
        input_tdim=24,
        dim=WIDTH,
        patch_size=8,
        fstride=8,
        tstride=8,
        num_heads=2,
        depths=[2],
        act_layer=GELU,
        num_classes=CLASSES,
        key=KEY,
    )
    call = lambda module, x: module(x, key=KEY, inference=True)
    return of_one(module, normal(BATCH, 24, 16), call)


def convnext() -> Model:
    from equimo.vision.models.convnext import ConvNeXt

    return image_model(
        ConvNeXt, 32, act_layer=GELU, depths=[1, 1, 1, 1], dims=[4, 6, 8, 8], use_grn=True
    )


F32 = "float32"
EXHIBITS = [
    Exhibit(
        "Llama", "eqx-zoo", decoder, attention=Attention(2, dtype=F32), slopes=SWIGLU, dtype=F32
    ),
    Exhibit(
        "Qwen 3", "eqx-zoo", qwen3, attention=Attention(2, dtype=F32), slopes=SWIGLU, dtype=F32
    ),
    Exhibit("BERT", "eqx-zoo", bert, attention=Attention(2, dtype=F32), dtype=F32),
    Exhibit("ViT", "equimo", vit, attention=Attention(2, dtype=F32)),
    Exhibit("DINOv3", "equimo", dinov3, attention=Attention(2, dtype=F32), slopes=SWIGLU),
    Exhibit(
        "Audio spectrogram transformer", "equimo", spectrogram, attention=Attention(2, dtype=F32)
    ),
    Exhibit("ConvNeXt v2", "equimo", convnext, dtype=F32),
]
