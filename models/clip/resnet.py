"""CLIP with a ResNet: RN50, RN101, RN50x4, x16 and x64 (Radford et al. 2021, section 2.4)."""

from dataclasses import dataclass, field

import jax
from flax import nnx
from jax import numpy as jnp
from jaxtyping import Array, Float

from jaxrel import tag
from jaxrel.models.clip.config import TextConfig
from jaxrel.models.patches import ImageSize, Patched
from jaxrel.models.sizes import check_choice, check_heads, check_sizes, is_size
from jaxrel.models.transformer import Attention, linear
from jaxrel.models.vision.encoders import ConvNorm, Stage

FEATURES = "vision/features"


@dataclass(frozen=True)
class ResNetTowerConfig(Patched):
    """Sizes of the image tower; the defaults are those of RN50.

    Args:
      stages: for each of four resolutions the number of blocks.
      stem: channels after the stem, and of the first stage's 3 x 3 convolutions; each stage has
        twice as many as the one before.
      heads: attention heads of the pooling; divides `width`.
      image_size: pixels of a side of the square input, or (height, width).

    Raises:
      ValueError: a size is out of range.
    """

    stages: tuple[int, ...] = (3, 4, 6, 3)
    stem: int = 64
    heads: int = 32
    image_size: ImageSize = 224
    patch_size: int = field(default=32, init=False)  # what a feature stands for

    def __post_init__(self) -> None:
        if len(self.stages) != 4 or not all(map(is_size, self.stages)):
            raise ValueError(
                f"vision: stages must be four positive integers, got {list(self.stages)!r}"
            )
        check_sizes("vision", self, ["stem", "heads"])
        check_heads("vision", "width", self.width, self.heads)
        self.check_patches("vision")

    @property
    def width(self) -> int:
        """Channels of the last stage."""
        return 32 * self.stem


@dataclass(frozen=True)
class CLIPResNetConfig:
    """Sizes of a CLIP with a ResNet; the defaults are those of RN50.

    Args:
      vision: sizes of the image tower.
      text: sizes of the text tower.
      projection: features of the common embedding space.
      remat: recompute each layer of the text tower in the backward pass.
      dtype: dtype of the computation, "float32" or "bfloat16"; see `CLIPConfig`.

    Raises:
      ValueError: a size or a name is out of range.
    """

    vision: ResNetTowerConfig = field(default_factory=ResNetTowerConfig)
    text: TextConfig = field(default_factory=TextConfig)
    projection: int = 1024
    remat: bool = False
    dtype: str = "float32"

    def __post_init__(self) -> None:
        check_choice("clip", "dtype", self.dtype, ("float32", "bfloat16"))
        check_sizes("clip", self, ["projection"])


class ResNetTower(nnx.Module):
    """A ResNet whose features an attention pools.

    It differs from He et al. 2016 as Radford et al. 2021 say: three convolutions and an average
    pool begin it; strides are average pools before convolutions; and one query, the mean of the
    last features, attends to them. The tags are "vision/tokens", the pixels [batch, height x
    width, 3]; "vision/features", the last features [batch, rows, columns, width]; and
    "vision/pooling", the map [batch, heads, 1, 1 + rows x columns], whose first key is the mean.
    """

    def __init__(
        self, config: ResNetTowerConfig, projection: int, dtype: jnp.dtype, *, rngs: nnx.Rngs
    ) -> None:
        stem, width = config.stem, config.width
        sizes = ((3, stem // 2, 3, 2), (stem // 2, stem // 2, 3, 1), (stem // 2, stem, 3, 1))
        self.stem = nnx.List(ConvNorm(*size, dtype=dtype, rngs=rngs) for size in sizes)
        stages, inputs = [], stem
        for index, depth in enumerate(config.stages):
            channels = stem * 2**index
            size = (depth, inputs, channels, 4 * channels, 2 if index else 1)
            stages.append(Stage("antialiased", *size, dtype=dtype, rngs=rngs))
            inputs = 4 * channels
        self.stages = nnx.List(stages)
        positions = jax.random.normal(rngs.params(), (1 + config.patches, width))
        self.position_embedding = nnx.Param(width**-0.5 * positions)
        self.pooling = Attention(config, width**-0.5, dtype=dtype, rngs=rngs)
        self.pooling.out = linear(width, projection, width**-0.5, dtype, rngs)

    def __call__(
        self, image: Float[Array, "batch height width 3"]
    ) -> tuple[Float[Array, "batch embed"], Float[Array, "batch heads 1 keys"]]:
        """Return the embeddings of images, before they are normalised, and the pooling map."""
        pixels = tag(image.reshape(len(image), -1, 3), "vision/tokens")
        x = pixels.reshape(image.shape)
        for conv in self.stem:
            x = jax.nn.relu(conv(x))
        x = nnx.avg_pool(x, (2, 2), strides=(2, 2))
        for stage in self.stages:
            x = stage(x)
        x = tag(x, FEATURES)
        x = x.reshape(len(x), -1, x.shape[-1])
        x = jnp.concatenate([x.mean(1, keepdims=True), x], axis=1)
        x = x + self.position_embedding[...].astype(x.dtype)
        pooled, maps = self.pooling(x[:, :1], self.pooling.read(x), None, "vision/pooling")
        return pooled[:, 0], maps
