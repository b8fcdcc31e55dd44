"""Pre-LN transformer layers, stacked and run by one scan."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from jaxrel import tag
from jaxrel.models.sizes import check_heads, check_numbers, check_sizes

# [..., query, key], True where a query sees a key; what is left out in front broadcasts.
Mask = Bool[Array, "..."]
# Turns queries and keys, [batch, tokens, heads, features], by the places of their tokens.
Rotate = Callable[[Array], Array]


def quick_gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """x * sigmoid(1.702 x), the approximation of GELU (Hendrycks and Gimpel 2016) CLIP uses."""
    return x * jax.nn.sigmoid(1.702 * x)


ACTIVATIONS: dict[str, Callable] = {
    "quick_gelu": quick_gelu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_pytorch_tanh": partial(jax.nn.gelu, approximate=True),
    "silu": jax.nn.silu,
}


@dataclass(frozen=True)
class Variant:
    """How the layers of some models differ from those of CLIP.

    Args:
      layer_scale: whether a factor per feature multiplies what is added to the residual stream
        (Touvron et al. 2021, "Going deeper with image transformers", eq. 3).
      gated: whether the MLP is contract(activation(gate(x)) * expand(x)) (Shazeer 2020).
      biases: whether queries, keys and values have a bias.
    """

    layer_scale: bool = False
    gated: bool = False
    biases: tuple[bool, bool, bool] = (True, True, True)


CLIP_LAYERS = Variant()


def check_transformer(config: Any, part: str, *more: str) -> None:
    """Raise ValueError if the sizes of a transformer do not make one.

    Args:
      config: has width, layers, heads, mlp_width and activation.
      part: the part of the model that it is of, for the message.
      *more: names of further sizes that it has.
    """
    check_sizes(part, config, ("width", "layers", "heads", "mlp_width", *more))
    check_heads(part, "width", config.width, config.heads)
    check_numbers(part, config, ["layer_norm_eps"])
    if config.layer_norm_eps < 0:
        raise ValueError(f"{part}: layer_norm_eps must be 0 or more, got {config.layer_norm_eps}")
    if config.activation not in tuple(ACTIVATIONS):
        raise ValueError(
            f"{part}: unknown activation {config.activation!r:.80}, known are "
            f"{', '.join(ACTIVATIONS)}"
        )


def layer_norm(width: int, *, eps: float, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.LayerNorm:
    """A layer norm that takes the mean away before it squares.

    CLIP's residual stream has a few features far from zero, where E[x^2] - E[x]^2 cancels.
    """
    return nnx.LayerNorm(width, epsilon=eps, dtype=dtype, use_fast_variance=False, rngs=rngs)


def linear(
    inputs: int,
    outputs: int,
    std: float,
    dtype: jnp.dtype,
    rngs: nnx.Rngs,
    *,
    use_bias: bool = True,
) -> nnx.Linear:
    """A linear map whose initial kernel has this standard deviation."""
    init = nnx.initializers.normal(std)
    return nnx.Linear(inputs, outputs, use_bias=use_bias, kernel_init=init, dtype=dtype, rngs=rngs)


class Memory(NamedTuple):
    """The keys and values of tokens that an attention has read; of stacked layers stacked.

    A text that is written word by word keeps them, so that each word costs one token.
    """

    key: Float[Array, "*layers batch keys heads features"]
    value: Float[Array, "*layers batch keys heads features"]

    def write(self, token: "Memory", position: Int[Array, ""]) -> "Memory":
        """Put what was read of one token in its place."""
        write = jax.lax.dynamic_update_slice_in_dim
        return Memory(*(write(old, new, position, 1) for old, new in zip(self, token, strict=True)))

    def until(self, position: Int[Array, ""]) -> Mask:
        """Return a mask that hides the places after a position, which are not written yet."""
        return jnp.arange(self.key.shape[1]) <= position


class Attention(nnx.Module):
    """Multi-head attention that returns its maps (Vaswani et al. 2017, section 3.2).

    It attends to a memory, of all tokens at once or of one after the other.
    """

    def __init__(
        self,
        config: Any,
        out_std: float,
        *,
        biases: tuple[bool, bool, bool] = (True, True, True),
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        self.heads, width = config.heads, config.width
        self.query, self.key, self.value = (
            linear(width, width, width**-0.5, dtype, rngs, use_bias=use_bias) for use_bias in biases
        )
        self.out = linear(width, width, out_std, dtype, rngs)

    def read(self, source: Float[Array, "batch keys width"]) -> Memory:
        """Return the keys and values of tokens."""
        return Memory(self._by_head(self.key(source)), self._by_head(self.value(source)))

    def empty(self, batch: int, tokens: int) -> Memory:
        """Return a memory with places for so many tokens; of stacked layers all memories."""
        *layers, _, width = self.key.kernel.shape
        shape = (*layers, batch, tokens, self.heads, width // self.heads)
        zeros = jnp.zeros(shape, self.key.dtype)
        return Memory(zeros, zeros)

    def __call__(
        self,
        x: Float[Array, "batch tokens width"],
        memory: Memory,
        mask: Mask | None,
        name: str,
        rotate: Rotate | None = None,
    ) -> tuple[Float[Array, "batch tokens features"], Float[Array, "batch heads tokens keys"]]:
        """Attend from x to a memory; maps are float32, tagged before they multiply values.

        The tags `name/query`, `/key`, `/value` and `/mixed` are [batch, tokens, heads, features].
        """
        query, (key, value) = self._by_head(self.query(x)), memory
        if rotate is not None:
            query, key = rotate(query), rotate(key)
        query, key = tag(query, f"{name}/query"), tag(key, f"{name}/key")
        value = tag(value, f"{name}/value")
        logits = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
        logits = logits * query.shape[-1] ** -0.5
        if mask is not None:
            logits = jnp.where(mask, logits, jnp.finfo(logits.dtype).min)
        maps = tag(jax.nn.softmax(logits, axis=-1), name)
        mixed = jnp.einsum("bhqk,bkhd->bqhd", maps.astype(value.dtype), value)
        mixed = tag(mixed, f"{name}/mixed")
        return self.out(mixed.reshape(x.shape)), maps

    def _by_head(self, x: Float[Array, "batch tokens width"]) -> Array:
        return x.reshape(*x.shape[:-1], self.heads, -1)


class Block(nnx.Module):
    """A pre-LN layer: x + attention(norm(x)), then x + mlp(norm(x)).

    Args:
      config: the sizes, as of `Transformer`.
      additions: to the residual stream in all layers.
      variant: how it differs from a layer of CLIP.
      dtype: dtype of the computation.
      rngs: keys for the initial parameters.
    """

    def __init__(
        self,
        config: Any,
        additions: int,
        *,
        variant: Variant = CLIP_LAYERS,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        width, eps = config.width, config.layer_norm_eps
        # Each addition to the residual stream starts small, so that their sum does not grow with
        # the depth (Radford et al. 2019, section 2.3).
        residual_std = width**-0.5 * additions**-0.5
        self.activation = config.activation
        self.norm1 = layer_norm(width, eps=eps, dtype=dtype, rngs=rngs)
        self.attention = Attention(
            config, residual_std, biases=variant.biases, dtype=dtype, rngs=rngs
        )
        self.norm2 = layer_norm(width, eps=eps, dtype=dtype, rngs=rngs)
        self.expand = linear(width, config.mlp_width, (2 * width) ** -0.5, dtype, rngs)
        self.contract = linear(config.mlp_width, width, residual_std, dtype, rngs)
        if variant.gated:
            self.gate = linear(width, config.mlp_width, (2 * width) ** -0.5, dtype, rngs)
        if variant.layer_scale:
            self.scale1, self.scale2 = (nnx.Param(jnp.ones(width)) for _ in range(2))
        self.variant = variant

    def __call__(
        self,
        x: Float[Array, "batch tokens width"],
        mask: Mask | None,
        name: str,
        rotate: Rotate | None = None,
    ) -> tuple[Float[Array, "batch tokens width"], Float[Array, "batch heads tokens tokens"]]:
        """Apply the layer; tags: `name` maps, `name/before` and `name/after` what is added."""
        x = tag(x, f"{name}/before")
        normed = self.norm1(x)
        return self._attend(x, normed, self.attention.read(normed), mask, name, rotate)

    def step(
        self,
        x: Float[Array, "batch 1 width"],
        memory: Memory,
        position: Int[Array, ""],
        name: str,
    ) -> tuple[Float[Array, "batch 1 width"], Memory]:
        """Apply the layer to one token, which sees itself and those before it."""
        normed = self.norm1(x)
        memory = memory.write(self.attention.read(normed), position)
        return self._attend(x, normed, memory, memory.until(position), name)[0], memory

    def _attend(
        self,
        x: Array,
        normed: Array,
        memory: Memory,
        mask: Mask | None,
        name: str,
        rotate: Rotate | None = None,
    ) -> tuple[Array, Array]:
        attended, maps = self.attention(normed, memory, mask, name, rotate)
        if self.variant.layer_scale:
            attended = attended * self.scale1[...].astype(x.dtype)
        x = x + tag(attended, f"{name}/after")
        added = self._mlp(self.norm2(x))
        if self.variant.layer_scale:
            added = added * self.scale2[...].astype(x.dtype)
        return x + added, maps

    def _mlp(self, x: Array) -> Array:
        activation = ACTIVATIONS[self.activation]
        if self.variant.gated:
            return self.contract(activation(self.gate(x)) * self.expand(x))
        return self.contract(activation(self.expand(x)))


class Transformer(nnx.Module):
    """A stack of `Block`s whose parameters have a leading layer axis.

    One scan runs them, so that depth grows neither the trace nor the compile time.

    Args:
      config: the sizes: width (features per token), layers, heads, mlp_width (hidden features of
        the MLP), activation (a key of `ACTIVATIONS`) and layer_norm_eps.
      name: the tag of the attention maps.
      variant: how the layers differ from those of CLIP.
      dtype: dtype of the computation; parameters are float32.
      rngs: keys for the initial parameters.
    """

    def __init__(
        self,
        config: Any,
        name: str,
        *,
        variant: Variant = CLIP_LAYERS,
        dtype: jnp.dtype,
        rngs: nnx.Rngs,
    ) -> None:
        stack = nnx.vmap(
            lambda rngs: Block(config, 2 * config.layers, variant=variant, dtype=dtype, rngs=rngs)
        )
        self.name = name
        self.blocks = nnx.split_rngs(splits=config.layers)(stack)(rngs)

    def __call__(
        self,
        x: Float[Array, "batch tokens width"],
        mask: Mask | None = None,
        *,
        rotate: Rotate | None = None,
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
          rotate: turns queries and keys by their tokens' places; None: they stay.
          remat: recompute each layer in the backward pass instead of storing it.
          return_attention: also return the attention maps.

        Returns:
          The residual stream after the last layer, and the maps of all layers (or None).
        """

        def layer(block, x, _):
            x, maps = block(x, mask, self.name, rotate)
            return x, maps if return_attention else None

        return scan_layers(layer, self.blocks, x, remat=remat)

    def each_layer(
        self,
        x: Float[Array, "batch tokens width"],
        mask: Mask | None,
        read: Callable,
        *,
        remat: bool = False,
    ) -> tuple[Float[Array, "batch tokens width"], Float[Array, "layers batch features"]]:
        """Run all layers, and read the tokens after each; a gradient goes through one layer alone.

        Args:
          x: the residual stream.
          mask: as in `__call__`.
          read: from tokens [batch, tokens, width] to [batch, features].
          remat: as in `__call__`.

        Returns:
          The residual stream after the last layer, and what was read after each.
        """

        def layer(block, x, _):
            x, _ = block(jax.lax.stop_gradient(x), mask, self.name)
            return x, read(x)

        return scan_layers(layer, self.blocks, x, remat=remat)

    def empty(self, batch: int, tokens: int) -> Memory:
        """Return the empty memory of all layers, with places for so many tokens."""
        return self.blocks.attention.empty(batch, tokens)

    def step(
        self, x: Float[Array, "batch 1 width"], memory: Memory, position: Int[Array, ""]
    ) -> tuple[Float[Array, "batch 1 width"], Memory]:
        """Run all layers on one token, as a causal mask has it.

        Args:
          x: the residual stream of the token.
          memory: memory of the preceding tokens, from `empty` or the last call.
          position: position of the token.

        Returns:
          The residual stream after the last layer, and the memory with this token.
        """

        def layer(block, x, memory):
            return block.step(x, memory, position, self.name)

        return scan_layers(layer, self.blocks, x, memory)


def scan_layers(
    apply: Callable, blocks: nnx.Module, carry: Any, xs: Any = None, *, remat: bool = False
) -> tuple[Any, Any]:
    """Run stacked layers by one scan.

    Args:
      apply: `(layer, carry, x) -> (carry, y)`.
      blocks: layers whose parameters have a leading layer axis.
      carry: values that go from layer to layer, such as the residual stream.
      xs: inputs of each layer, with a leading layer axis.
      remat: recompute each layer in the backward pass instead of storing it.

    Returns:
      The carry after the last layer, and the `y` of all layers, stacked.
    """
    graph, parameters = nnx.split(blocks)

    def layer(carry, own):
        parameters, x = own
        return apply(nnx.merge(graph, parameters), carry, x)

    if remat:
        # Inside a scan nothing can merge the recomputation with the first computation.
        layer = jax.checkpoint(layer, prevent_cse=False)
    return jax.lax.scan(layer, carry, (parameters, xs))


def key_mask(keep: Bool[Array, "batch keys"]) -> Mask:
    """Return a mask that hides the keys that are not kept from every query."""
    return keep[:, None, None]


def look_up(embedding: nnx.Embed, ids: Int[Array, "*batch"]) -> Float[Array, "*batch features"]:
    """Return the embeddings of token ids, sharded over an explicit mesh as the ids are."""
    spec = jax.typeof(jnp.asarray(ids)).sharding.spec
    if all(axis is None for axis in spec):
        return embedding(ids)
    (table,) = embedding.promote_dtype(
        (embedding.embedding[...],), dtype=embedding.dtype, inexact=False
    )
    rows = jax.sharding.PartitionSpec(*spec, None)
    return table.at[ids].get(mode="fill", out_sharding=rows)


def read_at(x: Shaped[Array, "batch tokens *rest"], index: Any) -> Shaped[Array, "batch *rest"]:
    """Return one token of each example, `x[i, index[i]]`; one index may serve all."""
    index = jnp.broadcast_to(jnp.asarray(index), len(x))
    return jnp.take_along_axis(x, index.reshape(-1, *(1,) * (x.ndim - 1)), axis=1)[:, 0]


def causal_mask(tokens: int) -> Bool[Array, "tokens tokens"]:
    """Return a mask that is True where the key is not after the query."""
    return jnp.tril(jnp.ones((tokens, tokens), bool))
