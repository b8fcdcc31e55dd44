"""The encoders: VGG and ResNet without their classifiers."""

from functools import partial
from typing import Any

import jax
from flax import nnx
from jax import numpy as jnp
from jaxtyping import Array, Float

from jaxrel.models.transformer import scan_layers
from jaxrel.models.vision.config import EncoderConfig, ResNetConfig, VGGConfig

# Added to the variance in batch normalisation.
EPSILON = 1e-5


class VGG(nnx.Module):
    """A VGG without its last pooling and its classifier (Simonyan and Zisserman 2015).

    Args:
      config: the sizes.
      dtype: dtype of the computation; parameters are float32.
      rngs: keys for the initial parameters (stream "params").
    """

    def __init__(self, config: VGGConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs) -> None:
        self.config = config
        stages, inputs = [], 3
        for widths in config.stages:
            stage = []
            for width in widths:
                stage.append(_conv(inputs, width, 3, 1, use_bias=True, dtype=dtype, rngs=rngs))
                inputs = width
            stages.append(nnx.List(stage))
        self.stages = nnx.List(stages)

    def __call__(
        self, images: Float[Array, "batch height width 3"]
    ) -> Float[Array, "batch rows columns channels"]:
        """Return the features of normalised images, which are not negative.

        Raises:
          ValueError, TypeError: see `check_images`.
        """
        check_images(self.config, images)
        x = images
        for index, stage in enumerate(self.stages):
            if index:
                x = nnx.max_pool(x, (2, 2), strides=(2, 2))
            for conv in stage:
                x = jax.nn.relu(conv(x))
        return x


class BatchNorm(nnx.Module):
    """Batch normalisation by the stored mean and variance, x * factor + offset.

    The statistics are `nnx.BatchStat`s: `nnx.Param` does not select them for training.
    """

    def __init__(self, features: int) -> None:
        self.scale = nnx.Param(jnp.ones(features, jnp.float32))
        self.bias = nnx.Param(jnp.zeros(features, jnp.float32))
        self.mean = nnx.BatchStat(jnp.zeros(features, jnp.float32))
        self.var = nnx.BatchStat(jnp.ones(features, jnp.float32))

    def __call__(
        self, x: Float[Array, "batch rows columns channels"]
    ) -> Float[Array, "batch rows columns channels"]:
        """Normalise each channel."""
        factor = self.scale[...] * jax.lax.rsqrt(self.var[...] + EPSILON)
        offset = self.bias[...] - self.mean[...] * factor
        return x * factor.astype(x.dtype) + offset.astype(x.dtype)


class ConvNorm(nnx.Module):
    """A convolution without bias, and its batch normalisation."""

    def __init__(
        self, inputs: int, outputs: int, side: int, stride: int, *, dtype: Any, rngs: nnx.Rngs
    ) -> None:
        self.conv = _conv(inputs, outputs, side, stride, use_bias=False, dtype=dtype, rngs=rngs)
        self.norm = BatchNorm(outputs)

    def __call__(
        self, x: Float[Array, "batch height width inputs"]
    ) -> Float[Array, "batch rows columns outputs"]:
        """Apply both."""
        return self.norm(self.conv(x))


class Block(nnx.Module):
    """A residual block (He et al. 2016, figure 5): relu(f(x) + x).

    Where f changes the shape, x goes through a 1 x 1 convolution. The kind "antialiased" is a
    bottleneck whose stride is an average pool, before its last convolution and before that of x
    (Radford et al. 2021, section 2.4).
    """

    def __init__(
        self, kind: str, inputs: int, width: int, stride: int, *, dtype: Any, rngs: nnx.Rngs
    ) -> None:
        conv = partial(ConvNorm, dtype=dtype, rngs=rngs)
        same = stride == 1
        self.pool = stride if kind == "antialiased" else 1
        stride = stride // self.pool
        if kind == "basic":
            outputs = width
            convs = [conv(inputs, width, 3, stride), conv(width, width, 3, 1)]
        else:
            outputs = 4 * width
            first, last = conv(inputs, width, 1, 1), conv(width, outputs, 1, 1)
            convs = [first, conv(width, width, 3, stride), last]
        self.convs = nnx.List(convs)
        same = same and inputs == outputs
        self.shortcut = None if same else conv(inputs, outputs, 1, stride)

    def __call__(
        self, x: Float[Array, "batch height width inputs"]
    ) -> Float[Array, "batch rows columns outputs"]:
        """Apply the block."""
        y = x
        for conv in self.convs[:-1]:
            y = jax.nn.relu(conv(y))
        if self.pool > 1:
            x, y = (nnx.avg_pool(z, (self.pool,) * 2, strides=(self.pool,) * 2) for z in (x, y))
        y = self.convs[-1](y)
        return jax.nn.relu(y + (x if self.shortcut is None else self.shortcut(x)))


class Stage(nnx.Module):
    """The blocks of one resolution.

    Those after the first are alike: their parameters have a leading axis, and one scan runs
    them, so that depth grows neither the trace nor the compile time.
    """

    def __init__(
        self,
        kind: str,
        depth: int,
        inputs: int,
        width: int,
        outputs: int,
        stride: int,
        *,
        dtype: Any,
        rngs: nnx.Rngs,
    ) -> None:
        self.first = Block(kind, inputs, width, stride, dtype=dtype, rngs=rngs)
        stack = nnx.vmap(lambda rngs: Block(kind, outputs, width, 1, dtype=dtype, rngs=rngs))
        self.rest = nnx.split_rngs(splits=depth - 1)(stack)(rngs) if depth > 1 else None

    def __call__(
        self, x: Float[Array, "batch height width inputs"]
    ) -> Float[Array, "batch rows columns outputs"]:
        """Apply all blocks."""
        x = self.first(x)
        if self.rest is None:
            return x
        return scan_layers(lambda block, x, _: (block(x), None), self.rest, x)[0]


class ResNet(nnx.Module):
    """A ResNet without its average pooling and its classifier (He et al. 2016).

    Args:
      config: the sizes.
      dtype: dtype of the computation; parameters and statistics are float32.
      rngs: keys for the initial parameters (stream "params").
    """

    def __init__(self, config: ResNetConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs) -> None:
        self.config = config
        self.stem = ConvNorm(3, config.stem, 7, 2, dtype=dtype, rngs=rngs)
        inputs = (config.stem, *config.outputs[:-1])
        sizes = zip(config.stages, inputs, config.widths, config.outputs, strict=True)
        self.stages = nnx.List(
            Stage(config.block, *size, stride=2 if index else 1, dtype=dtype, rngs=rngs)
            for index, size in enumerate(sizes)
        )

    def __call__(
        self, images: Float[Array, "batch height width 3"]
    ) -> Float[Array, "batch rows columns channels"]:
        """Return the features of normalised images, which are not negative.

        Raises:
          ValueError, TypeError: see `check_images`.
        """
        check_images(self.config, images)
        x = jax.nn.relu(self.stem(images))
        x = nnx.max_pool(x, (3, 3), strides=(2, 2), padding=((1, 1), (1, 1)))
        for stage in self.stages:
            x = stage(x)
        return x


Encoder = VGG | ResNet


def make_encoder(config: EncoderConfig, *, dtype: Any = jnp.float32, rngs: nnx.Rngs) -> Encoder:
    """Make a new encoder of these sizes; see `VGG` and `ResNet`."""
    if isinstance(config, VGGConfig):
        return VGG(config, dtype=dtype, rngs=rngs)
    return ResNet(config, dtype=dtype, rngs=rngs)


def _conv(
    inputs: int,
    outputs: int,
    side: int,
    stride: int,
    *,
    use_bias: bool,
    dtype: Any,
    rngs: nnx.Rngs,
) -> nnx.Conv:
    return nnx.Conv(
        inputs,
        outputs,
        (side, side),
        strides=stride,
        # "SAME" would pad an image of even size on one side only where the stride is 2.
        padding=side // 2,
        use_bias=use_bias,
        kernel_init=nnx.initializers.he_normal(),
        dtype=dtype,
        rngs=rngs,
    )


def check_images(config: EncoderConfig, images: Any) -> None:
    """Raise the error that an encoder of these sizes would, before any work.

    Args:
      config: the sizes.
      images: what should be normalised images, float [batch, height, width, 3].

    Raises:
      ValueError: another shape, or images that are too small.
      TypeError: another dtype.
    """
    if images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(
            f"images must be normalised images [batch, height, width, 3], got {list(images.shape)}"
        )
    if not jnp.issubdtype(images.dtype, jnp.floating):
        raise TypeError(f"images must be normalised floats, got {images.dtype}")
    config.grid(images.shape[1:3])
