"""CLIP's two towers: from an image and from a text to tokens."""

from typing import Any

import jax
from flax import nnx
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrel import tag
from jaxrel.models.clip.config import VisionConfig
from jaxrel.models.transformer import (
    Mask,
    Memory,
    Transformer,
    causal_mask,
    key_mask,
    layer_norm,
    linear,
    look_up,
    read_at,
)

# Which tokens are seen: whether each is, or the indices of those that are.
Kept = Bool[Array, "batch tokens"] | Int[Array, "batch kept"]


def kept_mask(keep: Kept | None) -> Mask | None:
    """Return the mask that hides tokens; None where all are seen, or the others are left out."""
    return None if keep is None or keep.dtype != bool else key_mask(keep)


class VisionTower(nnx.Module):
    """An image to a class token and patch tokens (Dosovitskiy et al. 2021).

    With a `projection` it also embeds them; None leaves those parameters out.
    """

    def __init__(
        self, config: VisionConfig, projection: int | None, dtype: jnp.dtype, *, rngs: nnx.Rngs
    ) -> None:
        width, normal = config.width, jax.random.normal
        self.patch_embedding = nnx.Conv(
            3,
            width,
            (config.patch_size, config.patch_size),
            strides=config.patch_size,
            padding="VALID",
            use_bias=False,
            dtype=dtype,
            rngs=rngs,
        )
        self.class_embedding = nnx.Param(width**-0.5 * normal(rngs.params(), (width,)))
        self.position_embedding = nnx.Param(
            width**-0.5 * normal(rngs.params(), (config.tokens, width))
        )
        self.pre_norm = layer_norm(width, eps=config.layer_norm_eps, dtype=dtype, rngs=rngs)
        self.transformer = Transformer(config, "vision", dtype=dtype, rngs=rngs)
        if projection is not None:
            self.post_norm = layer_norm(width, eps=config.layer_norm_eps, dtype=dtype, rngs=rngs)
            self.projection = _projection(width, projection, dtype, rngs)

    def __call__(
        self,
        image: Float[Array, "batch height width 3"],
        *,
        keep: Kept | None = None,
        remat: bool = False,
        return_attention: bool = False,
    ) -> tuple[
        Float[Array, "batch seen features"],
        Float[Array, "layers batch heads seen seen"] | None,
    ]:
        """Return all tokens before the last norm, and the attention maps (or None).

        Tokens that are not kept are hidden from all others in every layer, where `keep` says
        which are; indices leave the other tokens out, which gives the same tokens sooner.
        """
        x = self._begin(image)
        mask = kept_mask(keep)
        if keep is not None and mask is None:
            x = jnp.take_along_axis(x, keep[..., None], axis=1)
        return self.transformer(
            self.pre_norm(x), mask, remat=remat, return_attention=return_attention
        )

    def each_layer(
        self, image: Float[Array, "batch height width 3"], *, remat: bool = False
    ) -> tuple[Float[Array, "batch embed"], Float[Array, "layers batch embed"]]:
        """Return the embedding, and that of the mean token after each layer, by that layer alone.

        A gradient of the latter goes through its own layer and no further.
        """
        x = self.pre_norm(self._begin(image))
        tokens, layers = self.transformer.each_layer(
            x, None, lambda x: self._project(x.mean(axis=1)), remat=remat
        )
        return self.embed(tokens), layers

    def embed(self, tokens: Float[Array, "batch tokens features"]) -> Float[Array, "batch embed"]:
        """Return the normalised embedding read from the class token."""
        return self._project(tokens[:, 0])

    def _project(self, token: Float[Array, "batch features"]) -> Float[Array, "batch embed"]:
        return normalise(self.projection(self.post_norm(token)))

    def _begin(self, image: Array) -> Float[Array, "batch tokens features"]:
        """The class token and the patches, with their positions."""
        patches = self.patch_embedding(image)
        patches = patches.reshape(patches.shape[0], -1, patches.shape[-1])
        patches = tag(patches, "vision/tokens")
        # As zeros of the patches' own, the class token is sharded over a mesh as they are.
        first = self.class_embedding[...].astype(patches.dtype) + jnp.zeros_like(patches[:, :1])
        x = jnp.concatenate([first, patches], axis=1)
        return x + self.position_embedding[...].astype(x.dtype)


class TextTower(nnx.Module):
    """Token ids to text tokens, each of which sees those before it if `causal`, else all.

    With a `projection` it also embeds them, with a bias if `use_bias`; None leaves those
    parameters out. `config` has the fields of `TextConfig` but eos_token_id.
    """

    def __init__(
        self,
        config: Any,
        projection: int | None,
        dtype: jnp.dtype,
        *,
        causal: bool = True,
        use_bias: bool = False,
        rngs: nnx.Rngs,
    ) -> None:
        width = config.width
        self.causal = causal
        self.token_embedding = nnx.Embed(
            config.vocab_size,
            width,
            embedding_init=nnx.initializers.normal(0.02),
            dtype=dtype,
            rngs=rngs,
        )
        self.position_embedding = nnx.Param(
            0.01 * jax.random.normal(rngs.params(), (config.context, width))
        )
        self.transformer = Transformer(config, "text", dtype=dtype, rngs=rngs)
        if projection is not None:
            self.final_norm = layer_norm(width, eps=config.layer_norm_eps, dtype=dtype, rngs=rngs)
            self.projection = _projection(width, projection, dtype, rngs, use_bias=use_bias)

    def __call__(
        self,
        text: Int[Array, "batch tokens"],
        *,
        keep: Bool[Array, "batch tokens"] | None = None,
        remat: bool = False,
        return_attention: bool = False,
    ) -> tuple[
        Float[Array, "batch tokens features"],
        Float[Array, "layers batch heads tokens tokens"] | None,
    ]:
        """Return all tokens before the last norm, and the attention maps (or None).

        Tokens that are not kept are hidden from all others in every layer.
        """
        mask = self._mask(text.shape[-1])
        if keep is not None:
            mask = key_mask(keep) if mask is None else mask & key_mask(keep)
        x = self._begin(text)
        return self.transformer(x, mask, remat=remat, return_attention=return_attention)

    def each_layer(
        self,
        text: Int[Array, "batch tokens"],
        end: Int[Array, " batch"],
        *,
        remat: bool = False,
    ) -> tuple[Float[Array, "batch embed"], Float[Array, "layers batch embed"]]:
        """As `VisionTower.each_layer`; the mean is over the tokens up to `end`."""
        whole = (jnp.arange(text.shape[-1]) <= end[:, None]).astype(jnp.float32)
        weights = whole / whole.sum(axis=-1, keepdims=True)

        def read(x):
            return self._project(jnp.einsum("bt,btw->bw", weights.astype(x.dtype), x))

        x, mask = self._begin(text), self._mask(text.shape[-1])
        tokens, layers = self.transformer.each_layer(x, mask, read, remat=remat)
        return self.embed(tokens, end), layers

    def _mask(self, tokens: int) -> Mask | None:
        return causal_mask(tokens) if self.causal else None

    def _begin(self, text: Array) -> Float[Array, "batch tokens features"]:
        """The embedded tokens, with their positions."""
        x = tag(look_up(self.token_embedding, text), "text/tokens")
        return x + self.position_embedding[: text.shape[-1]].astype(x.dtype)

    def _project(self, token: Float[Array, "batch features"]) -> Float[Array, "batch embed"]:
        return normalise(self.projection(self.final_norm(token)))

    def step(
        self, token: Int[Array, " batch"], memory: Memory, position: Int[Array, ""]
    ) -> tuple[Float[Array, "batch 1 features"], Memory]:
        """Return one token before the last norm, and the memory with it; see `Transformer.step`."""
        x = look_up(self.token_embedding, token)[:, None]
        x = x + self.position_embedding[position].astype(x.dtype)
        return self.transformer.step(x, memory, position)

    def embed(
        self, tokens: Float[Array, "batch tokens features"], end: Int[Array, " batch"]
    ) -> Float[Array, "batch embed"]:
        """Return the normalised embedding read from the token at `end`."""
        return self._project(read_at(tokens, end))


def _projection(
    width: int, features: int, dtype: jnp.dtype, rngs: nnx.Rngs, *, use_bias: bool = False
) -> nnx.Linear:
    return linear(width, features, width**-0.5, dtype, rngs, use_bias=use_bias)


def normalise(x: Float[Array, "batch embed"]) -> Float[Array, "batch embed"]:
    """Return embeddings of length 1, float32."""
    x = x.astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)
