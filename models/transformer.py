"""Pre-LN transformer layers, stacked and run by one scan."""

from collections.abc import Callable
from functools import partial

import jax
from flax import nnx
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrel import tag

# [..., query, key], True where a query sees a key; what is left out in front broadcasts.
Mask = Bool[Array, "..."]


def quick_gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """x * sigmoid(1.702 x), the approximation of GELU (Hendrycks and Gimpel 2016) CLIP uses."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable] = {
    "quick_gelu": quick_gelu,
    "gelu": partial(jax.nn.gelu, approximate=False),
}


def layer_norm(width: int, *, eps: float, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """A layer norm that takes the mean away before it squares.

    CLIP's residual stream has a few features far from zero, where E[x^2] - E[x]^2 cancels.
    """
    return nnx.LayerNorm(width, epsilon=eps, dtype=dtype, use_fast_variance=False, rngs=rngs)


def _linear(inputs: int, outputs: int, std: float, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(
        inputs, outputs, kernel_init=nnx.initializers.normal(std), dtype=dtype, rngs=rngs
    )


class Attention(nnx.Module):
    """Multi-head attention that returns its maps (Vaswani et al. 2017, section 3.2)."""

    def __init__(
        self, width: int, heads: int, *, out_std: float, dtype: jnp.dtype, rngs: nnx.Rngs
    ) -> None:
        self.heads = heads
        self.query = _linear(width, width, width**-0.5, dtype, rngs)
        self.key = _linear(width, width, width**-0.5, dtype, rngs)
        self.value = _linear(width, width, width**-0.5, dtype, rngs)
        self.out = _linear(width, width, out_std, dtype, rngs)

    def __call__(
        self,
        x: Float[Array, "batch tokens width"],
        source: Float[Array, "batch keys width"],
        mask: Mask | None,
        name: str,
    ) -> tuple[Float[Array, "batch tokens width"], Float[Array, "batch heads tokens keys"]]:
        """Attend from x to source; maps are float32, tagged before they multiply the values."""
        query, key, value = (
            projection(y).reshape(*y.shape[:-1], self.heads, -1)
            for projection, y in ((self.query, x), (self.key, source), (self.value, source))
        )
        logits = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
        logits = logits * query.shape[-1] ** -0.5
        if mask is not None:
            logits = jnp.where(mask, logits, jnp.finfo(logits.dtype).min)
        maps = tag(jax.nn.softmax(logits, axis=-1), name)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", maps.astype(value.dtype), value)
        return self.out(mixed.reshape(x.shape)), maps


class Block(nnx.Module):
    """A pre-LN layer: x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_width: int,
        *,
        depth: int,
        activation: str,
        eps: float,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        # Each of the 2 x depth residual additions starts small, so that their sum does not
        # grow with the depth (Radford et al. 2019, section 2.3).
        residual_std = width**-0.5 * (2 * depth) ** -0.5
        self.activation = activation
        self.norm1 = layer_norm(width, eps=eps, dtype=dtype, rngs=rngs)
        self.attention = Attention(width, heads, out_std=residual_std, dtype=dtype, rngs=rngs)
        self.norm2 = layer_norm(width, eps=eps, dtype=dtype, rngs=rngs)
        self.expand = _linear(width, mlp_width, (2 * width) ** -0.5, dtype, rngs)
        self.contract = _linear(mlp_width, width, residual_std, dtype, rngs)

    def __call__(
        self,
        x: Float[Array, "batch tokens width"],
        mask: Mask | None,
        name: str,
    ) -> tuple[Float[Array, "batch tokens width"], Float[Array, "batch heads tokens tokens"]]:
        """Apply the layer; tags: `name` maps, `name/before` and `name/after` what is added."""
        x = tag(x, f"{name}/before")
        normed = self.norm1(x)
        attended, maps = self.attention(normed, normed, mask, name)
        x = x + tag(attended, f"{name}/after")
        hidden = ACTIVATIONS[self.activation](self.expand(self.norm2(x)))
        return x + self.contract(hidden), maps


class Transformer(nnx.Module):
    """A stack of `Block`s whose parameters have a leading layer axis.

    One scan runs them, so that depth grows neither the trace nor the compile time.

    Args:
      width: features per token.
      layers: number of layers.
      heads: attention heads; divides `width`.
      mlp_width: hidden features of the MLP.
      activation: a key of `ACTIVATIONS`.
      eps: added to the variance in layer norms.
      dtype: of the computation; parameters are float32.
      name: the tag of the attention maps.
      rngs: for the initial parameters.
    """

    def __init__(
        self,
        width: int,
        layers: int,
        heads: int,
        mlp_width: int,
        *,
        activation: str,
        eps: float,
        dtype: jnp.dtype,
        name: str,
        rngs: nnx.Rngs,
    ) -> None:
        @nnx.split_rngs(splits=layers)
        @nnx.vmap
        def stack(rngs: nnx.Rngs) -> Block:
            return Block(
                width,
                heads,
                mlp_width,
                depth=layers,
                activation=activation,
                eps=eps,
                dtype=dtype,
                rngs=rngs,
            )

        self.name = name
        self.blocks = stack(rngs)

    def __call__(
        self,
        x: Float[Array, "batch tokens width"],
        mask: Mask | None = None,
        *,
        remat: bool = False,
        return_attention: bool = False,
    ) -> tuple[
        Float[Array, "batch tokens width"], Float[Array, "layers batch heads tokens tokens"] | None
    ]:
        """Run all layers.

        Args:
          x: the residual stream.
          mask: True where a query (row) sees a key (column); None: everywhere. One for all
            examples and heads, or with leading axes that broadcast to [batch, heads].
          remat: recompute each layer in the backward pass instead of storing it.
          return_attention: also return the attention maps.

        Returns:
          The residual stream after the last layer, and the maps of all layers (or None).
        """
        graph, parameters = nnx.split(self.blocks)

        def layer(x, parameters):
            x, maps = nnx.merge(graph, parameters)(x, mask, self.name)
            return x, maps if return_attention else None

        if remat:
            # Inside a scan nothing can merge the recomputation with the first computation.
            layer = jax.checkpoint(layer, prevent_cse=False)
        return jax.lax.scan(layer, x, parameters)


def key_mask(keep: Bool[Array, "batch keys"]) -> Mask:
    """A mask that hides the keys that are not kept from every query."""
    return keep[:, None, None]


def causal_mask(tokens: int) -> Bool[Array, "tokens tokens"]:
    """True where the key is not after the query."""
    return jnp.tril(jnp.ones((tokens, tokens), bool))
