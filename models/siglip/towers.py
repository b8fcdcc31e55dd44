"""SigLIP's image tower: a ViT without a class token, and an attention that pools its patches."""

from typing import Any

import jax
from flax import nnx
from jax import numpy as jnp
from jaxtyping import Array, Float

from jaxrel import tag
from jaxrel.models.siglip.config import SigLIPVisionConfig
from jaxrel.models.transformer import ACTIVATIONS, Attention, Transformer, layer_norm, linear


class AttentionPooling(nnx.Module):
    """An attention of one query, which is a parameter, and an MLP (Zhai et al. 2022, "MAP head").

    "Scaling Vision Transformers", appendix; the probe attends to all tokens.
    """

    def __init__(self, config: Any, dtype: jnp.dtype, *, rngs: nnx.Rngs) -> None:
        width, std = config.width, config.width**-0.5
        self.probe = nnx.Param(std * jax.random.normal(rngs.params(), (1, 1, width)))
        self.attention = Attention(config, std, dtype=dtype, rngs=rngs)
        self.norm = layer_norm(width, eps=config.layer_norm_eps, dtype=dtype, rngs=rngs)
        self.expand = linear(width, config.mlp_width, std, dtype, rngs)
        self.contract = linear(config.mlp_width, width, config.mlp_width**-0.5, dtype, rngs)
        self.activation = config.activation

    def __call__(
        self, tokens: Float[Array, "batch tokens width"], name: str
    ) -> tuple[Float[Array, "batch width"], Float[Array, "batch heads 1 tokens"]]:
        """Return what is pooled, and the attention map, which is tagged `name`."""
        # As zeros of the tokens' own, the probe is sharded over a mesh as they are.
        probe = self.probe[...].astype(tokens.dtype) + jnp.zeros_like(tokens[:, :1])
        pooled, maps = self.attention(probe, self.attention.read(tokens), None, name)
        hidden = ACTIVATIONS[self.activation](self.expand(self.norm(pooled)))
        return (pooled + self.contract(hidden))[:, 0], maps


class SigLIPVisionTower(nnx.Module):
    """An image to patch tokens, and to what is pooled of them.

    The tags are those of CLIP's towers, and "vision/pooling", the map of the pooling.
    """

    def __init__(self, config: SigLIPVisionConfig, dtype: jnp.dtype, *, rngs: nnx.Rngs) -> None:
        width, size = config.width, (config.patch_size, config.patch_size)
        self.patch_embedding = nnx.Conv(
            3, width, size, strides=size, padding="VALID", dtype=dtype, rngs=rngs
        )
        positions = jax.random.normal(rngs.params(), (config.patches, width))
        self.position_embedding = nnx.Param(width**-0.5 * positions)
        self.transformer = Transformer(config, "vision", dtype=dtype, rngs=rngs)
        self.post_norm = layer_norm(width, eps=config.layer_norm_eps, dtype=dtype, rngs=rngs)
        self.pooling = AttentionPooling(config, dtype, rngs=rngs)

    def __call__(
        self,
        image: Float[Array, "batch height width 3"],
        *,
        remat: bool = False,
        return_attention: bool = False,
    ) -> tuple[Float[Array, "batch features"], dict[str, Array | None]]:
        """Return what is pooled, and the attention maps of the layers and of the pooling."""
        patches = self.patch_embedding(image)
        patches = patches.reshape(patches.shape[0], -1, patches.shape[-1])
        patches = tag(patches, "vision/tokens")
        x = patches + self.position_embedding[...].astype(patches.dtype)
        x, maps = self.transformer(x, remat=remat, return_attention=return_attention)
        pooled, pooling = self.pooling(self.post_norm(x), "vision/pooling")
        return pooled, {"vision": maps, "vision/pooling": pooling}
