"""The mapper: layers in which two streams attend to themselves and to each other."""

from typing import Any

from flax import nnx
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrel import tag
from jaxrel.models.transformer import Attention, Block, Mask, Memory, layer_norm, scan_layers

Maps = dict[str, Float[Array, "layers batch heads query key"]]
# What a layer's attentions have read, by name.
Memories = dict[str, Memory]


class Sublayer(nnx.Module):
    """Attention alone, added to the residual stream: x + attention(norm(x), norm(source))."""

    def __init__(self, config: Any, out_std: float, *, dtype: Any, rngs: nnx.Rngs) -> None:
        width, eps = config.width, config.layer_norm_eps
        self.norm = layer_norm(width, eps=eps, dtype=dtype, rngs=rngs)
        self.source_norm = layer_norm(width, eps=eps, dtype=dtype, rngs=rngs)
        self.attention = Attention(config, out_std, dtype=dtype, rngs=rngs)

    def read(self, source: Float[Array, "batch keys width"]) -> Memory:
        """Return the keys and values of tokens."""
        return self.attention.read(self.source_norm(source))

    def __call__(
        self,
        x: Float[Array, "batch tokens width"],
        memory: Memory,
        mask: Mask | None,
        name: str,
    ) -> tuple[Float[Array, "batch tokens width"], Float[Array, "batch heads tokens keys"]]:
        """Attend to what was read; tags: `name` maps, `name/before`, `name/after` what is added."""
        x = tag(x, f"{name}/before")
        attended, maps = self.attention(self.norm(x), memory, mask, name)
        return x + tag(attended, f"{name}/after"), maps

    def step(
        self,
        x: Float[Array, "batch 1 width"],
        memory: Memory,
        position: Int[Array, ""],
        name: str,
    ) -> tuple[Float[Array, "batch 1 width"], Memory]:
        """Apply it to one token, which sees itself and those before it."""
        memory = memory.write(self.read(x), position)
        return self(x, memory, memory.until(position), name)[0], memory


class MapperLayer(nnx.Module):
    """Each stream attends to itself, the streams to each other, and again each to itself.

    Args:
      config: the sizes, as of `Mapper`.
      image_stream: what becomes of the image's stream after its own attention: "reads" the text,
        stays "apart" from it (a caption must not reach its own words through the image), or
        "ends" (in the last layer, where nothing reads it any more).
      dtype: dtype of the computation.
      rngs: keys for the initial parameters.
    """

    def __init__(self, config: Any, image_stream: str, *, dtype: Any, rngs: nnx.Rngs) -> None:
        # Three attentions and an MLP are added to each stream in each layer.
        additions = 4 * config.layers
        std = config.width**-0.5 * additions**-0.5

        def sublayer() -> Sublayer:
            return Sublayer(config, std, dtype=dtype, rngs=rngs)

        def block() -> Block:
            return Block(config, additions, dtype=dtype, rngs=rngs)

        self.image_single = sublayer()
        self.text_single = sublayer()
        self.text_to_image = sublayer()
        self.text_self = block()
        if image_stream == "reads":
            self.image_to_text = sublayer()
        if image_stream != "ends":
            self.image_self = block()
        self.image_stream = image_stream

    def __call__(
        self,
        image: Float[Array, "batch patches width"],
        text: Float[Array, "batch tokens width"],
        image_mask: Mask | None,
        text_mask: Mask | None,
    ) -> tuple[tuple[Array, Array], dict[str, Array]]:
        """Apply the layer; the attention maps come out by name."""
        maps = {}
        image, maps["image_single"] = self.image_single(
            image, self.image_single.read(image), image_mask, "image_single"
        )
        text, maps["text_single"] = self.text_single(
            text, self.text_single.read(text), text_mask, "text_single"
        )
        read = text
        text, maps["text_to_image"] = self.text_to_image(
            text, self.text_to_image.read(image), image_mask, "text_to_image"
        )
        if self.image_stream == "reads":
            image, maps["image_to_text"] = self.image_to_text(
                image, self.image_to_text.read(read), text_mask, "image_to_text"
            )
        if self.image_stream != "ends":
            image, maps["image_self"] = self.image_self(image, image_mask, "image_self")
        text, maps["text_self"] = self.text_self(text, text_mask, "text_self")
        return (image, text), maps

    def begin(
        self, image: Float[Array, "batch patches width"], image_mask: Mask | None, tokens: int
    ) -> tuple[Float[Array, "batch patches width"], Memories]:
        """Apply the image's side, which does not read the text; see `Mapper.begin`."""
        image, _ = self.image_single(
            image, self.image_single.read(image), image_mask, "image_single"
        )
        memories = {
            "text_single": self.text_single.attention.empty(len(image), tokens),
            "text_to_image": self.text_to_image.read(image),
            "text_self": self.text_self.attention.empty(len(image), tokens),
        }
        if self.image_stream != "ends":
            image, _ = self.image_self(image, image_mask, "image_self")
        return image, memories

    def step(
        self,
        text: Float[Array, "batch 1 width"],
        memories: Memories,
        position: Int[Array, ""],
        image_mask: Mask | None,
    ) -> tuple[Float[Array, "batch 1 width"], Memories]:
        """Apply the text's side to one token; see `Mapper.step`."""
        after = dict(memories)
        text, after["text_single"] = self.text_single.step(
            text, memories["text_single"], position, "text_single"
        )
        text, _ = self.text_to_image(text, memories["text_to_image"], image_mask, "text_to_image")
        text, after["text_self"] = self.text_self.step(
            text, memories["text_self"], position, "text_self"
        )
        return text, after


class Mapper(nnx.Module):
    """Stage 2 of CLIPmapper: all layers but the last are stacked and run by one scan.

    Of the last layer only what reaches the text exists: after its own attention the image's
    stream is read, and then ends.

    Args:
      config: the sizes, as of `Transformer`, the same for both streams.
      co_attention: whether the image also attends to the text.
      dtype: dtype of the computation; parameters are float32.
      rngs: keys for the initial parameters.
    """

    def __init__(self, config: Any, *, co_attention: bool, dtype: Any, rngs: nnx.Rngs) -> None:
        self.layers = config.layers
        image_stream = "reads" if co_attention else "apart"
        stack = nnx.vmap(lambda rngs: MapperLayer(config, image_stream, dtype=dtype, rngs=rngs))
        if self.layers > 1:
            self.blocks = nnx.split_rngs(splits=self.layers - 1)(stack)(rngs)
        self.last = MapperLayer(config, "ends", dtype=dtype, rngs=rngs)

    def __call__(
        self,
        image: Float[Array, "batch patches width"],
        text: Float[Array, "batch tokens width"],
        image_mask: Mask | None,
        text_mask: Mask | None,
        *,
        remat: bool = False,
        return_attention: bool = False,
    ) -> tuple[
        tuple[Float[Array, "batch patches width"], Float[Array, "batch tokens width"]], Maps | None
    ]:
        """Run all layers.

        Args:
          image: the image's tokens.
          text: the text's tokens.
          image_mask: which patches are seen, broadcasting to [batch, heads, query, patches].
          text_mask: which tokens of the text are seen.
          remat: recompute each layer in the backward pass instead of storing it.
          return_attention: also return the attention maps.

        Returns:
          The streams, the image's as the text reads it in the last layer, the text's after it;
          and the maps of all layers by name (or None).
        """
        stacked: dict[str, Array] = {}
        if self.layers > 1:

            def layer(block, streams, _):
                streams, maps = block(*streams, image_mask, text_mask)
                return streams, maps if return_attention else {}

            (image, text), stacked = scan_layers(layer, self.blocks, (image, text), remat=remat)
        (image, text), last = self.last(image, text, image_mask, text_mask)
        if not return_attention:
            return (image, text), None
        joined = {name: value[None] for name, value in last.items()}
        for name, value in stacked.items():
            joined[name] = jnp.concatenate([value, joined[name]]) if name in joined else value
        return (image, text), joined

    def begin(
        self, image: Float[Array, "batch patches width"], image_mask: Mask | None, tokens: int
    ) -> dict[str, Memories]:
        """Read an image before its text is written, where it does not attend to the text.

        Args:
          image: the image's tokens.
          image_mask: as in a call.
          tokens: number of the text's tokens that the memory has places for.

        Returns:
          The memories of each layer's attentions, with the image in them and places for the text.
        """
        memories = {}
        if self.layers > 1:
            image, memories["blocks"] = scan_layers(
                lambda block, image, _: block.begin(image, image_mask, tokens), self.blocks, image
            )
        _, memories["last"] = self.last.begin(image, image_mask, tokens)
        return memories

    def step(
        self,
        text: Float[Array, "batch 1 width"],
        memories: dict[str, Memories],
        position: Int[Array, ""],
        image_mask: Mask | None,
    ) -> tuple[Float[Array, "batch 1 width"], dict[str, Memories]]:
        """Run all layers on one token of the text, which sees those before it.

        Args:
          text: the token.
          memories: what `begin` or the last call returned.
          position: position of the token.
          image_mask: as in `begin`.

        Returns:
          The token after the last layer, and the memories with it.
        """
        after = {}
        if self.layers > 1:
            text, after["blocks"] = scan_layers(
                lambda block, text, memory: block.step(text, memory, position, image_mask),
                self.blocks,
                text,
                memories["blocks"],
            )
        text, after["last"] = self.last.step(text, memories["last"], position, image_mask)
        return text, after
