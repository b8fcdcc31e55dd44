"""Convolutional image encoders: VGG (Simonyan and Zisserman 2015) and ResNet (He et al. 2016).

They end where a captioner reads them, with a grid of features and no classifier: VGG at the
ReLU of its last convolution, before the last pooling, and ResNet at its last stage.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
from flax import nnx
from jax import numpy as jnp
from jaxtyping import Array, Float
from PIL import Image

from jaxrel.models.checkpoint import (
    CONFIG,
    PICKLES,
    Parameter,
    _read_pickle,
    _read_safetensors,
    _some,
    find_folder,
    read_any_config,
    read_parameters,
    read_tensors,
)
from jaxrel.models.processor import _image_processor

# Of the images that the published encoders were trained on, for each channel in 0..1.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

# Added to the variance in batch normalisation.
EPSILON = 1e-5


@dataclass(frozen=True)
class VGGConfig:
    """Sizes of a VGG encoder; the defaults are those of VGG16.

    Args:
      stages: for each resolution the channels of its convolutions, which are 3 x 3 with padding
        1; a 2 x 2 max pooling is between two stages, and none after the last.

    Raises:
      ValueError: the stages are not such tuples.
    """

    model_type: ClassVar[str] = "vgg"

    stages: tuple[tuple[int, ...], ...] = (
        (64, 64),
        (128, 128),
        (256, 256, 256),
        (512, 512, 512),
        (512, 512, 512),
    )

    def __post_init__(self) -> None:
        stages = self.stages
        if not isinstance(stages, tuple) or not stages or not all(map(_is_sizes, stages)):
            raise ValueError(
                "vgg: stages must hold a tuple of positive integers, the channels of its "
                f"convolutions, for each stage, such as ((16, 16), (32, 32)); got {stages!r}"
            )

    @property
    def channels(self) -> int:
        """Channels of the features."""
        return self.stages[-1][-1]

    def grid(self, image_size: int | tuple[int, int]) -> tuple[int, int]:
        """Return (rows, columns) of the features.

        Args:
          image_size: pixels of a side of a square image, or (height, width).

        Raises:
          ValueError: a side is no positive integer, or too small for the poolings.
        """
        height, width = _sides("vgg", image_size)
        factor = 2 ** (len(self.stages) - 1)
        if min(height, width) < factor:
            raise ValueError(
                f"vgg: an image of {height} x {width} pixels is too small: {len(self.stages) - 1} "
                f"poolings halve it, so each side needs at least {factor} pixels"
            )
        return height // factor, width // factor

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "VGGConfig":
        """Read what `to_dict` writes.

        Raises:
          ValueError: a key is missing or unknown, or a value is out of range.
        """
        return cls(**_fields(cls, config))

    def to_dict(self) -> dict[str, Any]:
        """Write the sizes for a config.json."""
        return {"model_type": self.model_type, "stages": [list(stage) for stage in self.stages]}


@dataclass(frozen=True)
class ResNetConfig:
    """Sizes of a ResNet encoder; the defaults are those of ResNet-50.

    A convolution 7 x 7 and a max pooling 3 x 3, each with stride 2, come first. Each stage but
    the first begins with stride 2, in the 3 x 3 convolution of a bottleneck ("version 1.5").

    Args:
      block: "basic", two convolutions 3 x 3, or "bottleneck", 1 x 1, 3 x 3 and 1 x 1.
      stages: for each resolution the number of blocks.
      widths: for each stage the channels of its 3 x 3 convolutions; a bottleneck's output has
        four times as many.
      stem: channels of the first convolution.

    Raises:
      ValueError: a size or a name is out of range.
    """

    model_type: ClassVar[str] = "resnet"

    block: str = "bottleneck"
    stages: tuple[int, ...] = (3, 4, 6, 3)
    widths: tuple[int, ...] = (64, 128, 256, 512)
    stem: int = 64

    def __post_init__(self) -> None:
        if self.block not in ("basic", "bottleneck"):
            raise ValueError(f"resnet: block must be 'basic' or 'bottleneck', got {self.block!r}")
        for name in ("stages", "widths"):
            value = getattr(self, name)
            if not _is_sizes(value):
                raise ValueError(
                    f"resnet: {name} must be a tuple of positive integers, got {value!r}"
                )
        if len(self.stages) != len(self.widths):
            raise ValueError(
                f"resnet: {len(self.stages)} stages and {len(self.widths)} widths; give each stage "
                "one width"
            )
        if not _is_size(self.stem):
            raise ValueError(f"resnet: stem must be a positive integer, got {self.stem!r}")

    @property
    def convolutions(self) -> int:
        """Convolutions of a block, without its shortcut's."""
        return 3 if self.block == "bottleneck" else 2

    @property
    def outputs(self) -> tuple[int, ...]:
        """Channels of each stage's output."""
        factor = 4 if self.block == "bottleneck" else 1
        return tuple(factor * width for width in self.widths)

    @property
    def channels(self) -> int:
        """Channels of the features."""
        return self.outputs[-1]

    def grid(self, image_size: int | tuple[int, int]) -> tuple[int, int]:
        """Return (rows, columns) of the features.

        Args:
          image_size: pixels of a side of a square image, or (height, width).

        Raises:
          ValueError: a side is no positive integer.
        """
        height, width = _sides("resnet", image_size)
        factor = 2 ** (1 + len(self.stages))
        return math.ceil(height / factor), math.ceil(width / factor)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "ResNetConfig":
        """Read what `to_dict` writes.

        Raises:
          ValueError: a key is missing or unknown, or a value is out of range.
        """
        return cls(**_fields(cls, config))

    def to_dict(self) -> dict[str, Any]:
        """Write the sizes for a config.json."""
        return {
            "model_type": self.model_type,
            "block": self.block,
            "stages": list(self.stages),
            "widths": list(self.widths),
            "stem": self.stem,
        }


EncoderConfig = VGGConfig | ResNetConfig


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_sizes(value: Any) -> bool:
    return isinstance(value, tuple) and bool(value) and all(map(_is_size, value))


def _sides(name: str, image_size: Any) -> tuple[int, int]:
    sides = image_size if isinstance(image_size, tuple) else (image_size, image_size)
    if len(sides) != 2 or not all(map(_is_size, sides)):
        raise ValueError(
            f"{name}: image_size must be a positive number of pixels, or (height, width), got "
            f"{image_size!r}"
        )
    return sides


def _fields(cls: Any, config: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a config.json, with tuples where JSON has lists."""
    known = {"model_type"} | {field.name for field in dataclasses.fields(cls)}
    if set(config) != known:
        raise ValueError(
            f"{CONFIG}: the sizes of a {cls.model_type} encoder must hold "
            f"{', '.join(sorted(known))}; missing or unknown: "
            f"{', '.join(sorted(set(config) ^ known))}"
        )
    if config["model_type"] != cls.model_type:
        raise ValueError(
            f"{CONFIG}: these are the sizes of an encoder of type {config['model_type']!r}, and "
            f"{cls.__name__} reads {cls.model_type!r}; use encoder_config, which reads both"
        )
    return {key: _tuples(value) for key, value in config.items() if key != "model_type"}


def _tuples(value: Any) -> Any:
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _vgg(*convolutions: int) -> VGGConfig:
    widths = (64, 128, 256, 512, 512)
    return VGGConfig(tuple((w,) * n for w, n in zip(widths, convolutions, strict=True)))


PRESETS: dict[str, EncoderConfig] = {
    "vgg11": _vgg(1, 1, 2, 2, 2),
    "vgg13": _vgg(2, 2, 2, 2, 2),
    "vgg16": _vgg(2, 2, 3, 3, 3),
    "vgg19": _vgg(2, 2, 4, 4, 4),
    "resnet18": ResNetConfig("basic", (2, 2, 2, 2)),
    "resnet34": ResNetConfig("basic", (3, 4, 6, 3)),
    "resnet50": ResNetConfig("bottleneck", (3, 4, 6, 3)),
    "resnet101": ResNetConfig("bottleneck", (3, 4, 23, 3)),
}


def encoder_config(config: str | Mapping[str, Any] | EncoderConfig) -> EncoderConfig:
    """Return the sizes of an encoder, however they are given.

    Args:
      config: the name of a preset, "vgg11", "vgg13", "vgg16", "vgg19", "resnet18", "resnet34",
        "resnet50" or "resnet101"; what `to_dict` writes; or the sizes themselves.

    Raises:
      ValueError: there is no such preset or type of encoder, or a value is out of range.
    """
    if isinstance(config, EncoderConfig):
        return config
    if isinstance(config, str):
        if config not in PRESETS:
            raise ValueError(
                f"no encoder is named {config!r}; known are {', '.join(PRESETS)}, and others are "
                "made with VGGConfig or ResNetConfig"
            )
        return PRESETS[config]
    for kind in (VGGConfig, ResNetConfig):
        if config.get("model_type") == kind.model_type:
            return kind.from_dict(config)
    raise ValueError(
        f"{CONFIG}: unknown type of encoder {config.get('model_type')!r}, known are "
        f"{VGGConfig.model_type}, {ResNetConfig.model_type}"
    )


class VGG(nnx.Module):
    """A VGG without its last pooling and its classifier (Simonyan and Zisserman 2015).

    Args:
      config: the sizes.
      dtype: of the computation; parameters are float32.
      rngs: for the initial parameters (stream "params").
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

    Where f changes the shape, x goes through a 1 x 1 convolution.
    """

    def __init__(
        self, kind: str, inputs: int, width: int, stride: int, *, dtype: Any, rngs: nnx.Rngs
    ) -> None:
        conv = partial(ConvNorm, dtype=dtype, rngs=rngs)
        if kind == "basic":
            outputs = width
            convs = [conv(inputs, width, 3, stride), conv(width, width, 3, 1)]
        else:
            outputs = 4 * width
            first, last = conv(inputs, width, 1, 1), conv(width, outputs, 1, 1)
            convs = [first, conv(width, width, 3, stride), last]
        self.convs = nnx.List(convs)
        same = stride == 1 and inputs == outputs
        self.shortcut = None if same else conv(inputs, outputs, 1, stride)

    def __call__(
        self, x: Float[Array, "batch height width inputs"]
    ) -> Float[Array, "batch rows columns outputs"]:
        """Apply the block."""
        y = x
        for conv in self.convs[:-1]:
            y = jax.nn.relu(conv(y))
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
        graph, parameters = nnx.split(self.rest)

        def block(x, parameters):
            return nnx.merge(graph, parameters)(x), None

        return jax.lax.scan(block, x, parameters)[0]


class ResNet(nnx.Module):
    """A ResNet without its average pooling and its classifier (He et al. 2016).

    Args:
      config: the sizes.
      dtype: of the computation; parameters and statistics are float32.
      rngs: for the initial parameters (stream "params").
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


def imagenet_processing(image_size: int = 224) -> Any:
    """Image preprocessing of encoders trained on ImageNet, as captioners use it.

    The whole image is resized to a square, without keeping the aspect, and normalised (Sun et
    al. 2022); `image_processing` crops instead.

    Args:
      image_size: pixels of a side of the square the model sees.

    Returns:
      A `transformers` image processor for PIL images, for `Processor`.
    """
    return _image_processor(
        size={"height": image_size, "width": image_size},
        resample=Image.Resampling.BILINEAR,
        do_center_crop=False,
        image_mean=list(IMAGENET_MEAN),
        image_std=list(IMAGENET_STD),
    )


@dataclass(frozen=True)
class _Layout:
    """A naming of tensors.

    Args:
      name: of the layout, in words.
      kind: of encoder that it names.
      first: the name of the first convolution's kernel, by which the layout is known.
      table: where each parameter is; it may have parameters that these sizes do not.
      ignored: how the names of a classifier's tensors begin.
    """

    name: str
    kind: type[EncoderConfig]
    first: str
    table: Callable[[Any], list[Parameter]]
    ignored: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Later(Parameter):
    """A parameter of the blocks after the first of a stage: "{layer}" begins at 1."""

    def names(self, shape: Sequence[int]) -> list[str]:
        return [self.name.format(layer=1 + index) for index in range(shape[0])]


def _kernel(kind: type[Parameter], path: tuple[str, ...], name: str) -> Parameter:
    # Kernels are OIHW in the files, and HWIO here.
    return kind((*path, "kernel"), f"{name}.weight", (2, 3, 1, 0))


def _vgg_table(config: VGGConfig, *, prefix: str) -> list[Parameter]:
    """The modules are numbered, and ReLUs and poolings count."""
    table, module = [], 0
    for stage, widths in enumerate(config.stages):
        for index in range(len(widths)):
            path, name = ("stages", str(stage), str(index)), f"{prefix}{module}"
            table.append(_kernel(Parameter, path, name))
            table.append(Parameter((*path, "bias"), f"{name}.bias"))
            module += 2
        module += 1
    return table


def _resnet_table(
    config: ResNetConfig,
    *,
    stem: tuple[str, ...],
    block: str,
    conv: tuple[str, ...],
    shortcut: tuple[str, ...],
) -> list[Parameter]:
    """Names are of pairs, a convolution and its normalisation; {index} is from 0, {number} from 1.

    Every stage gets a shortcut and later blocks, whether or not it has them.
    """
    table = _conv_norm(Parameter, ("stem",), "", stem)
    for stage in range(len(config.stages)):
        for kind, part, layer in ((Parameter, "first", "0"), (_Later, "rest", "{layer}")):
            path = ("stages", str(stage), part)
            prefix = block.format(index=stage, number=stage + 1, layer=layer) + "."
            for i in range(config.convolutions):
                names = tuple(name.format(index=i, number=i + 1) for name in conv)
                table += _conv_norm(kind, (*path, "convs", str(i)), prefix, names)
            table += _conv_norm(kind, (*path, "shortcut"), prefix, shortcut)
    return table


def _conv_norm(
    kind: type[Parameter], path: tuple[str, ...], prefix: str, names: tuple[str, ...]
) -> list[Parameter]:
    conv, norm = (prefix + name for name in names)
    ours = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    return [
        _kernel(kind, (*path, "conv"), conv),
        *(kind((*path, "norm", key), f"{norm}.{name}") for key, name in ours.items()),
    ]


def _hugging_face(prefix: str) -> _Layout:
    names = ("convolution", "normalization")
    table = partial(
        _resnet_table,
        stem=tuple(f"{prefix}embedder.embedder.{name}" for name in names),
        block=f"{prefix}encoder.stages.{{index}}.layers.{{layer}}",
        conv=tuple(f"layer.{{index}}.{name}" for name in names),
        shortcut=tuple(f"shortcut.{name}" for name in names),
    )
    first = f"{prefix}embedder.embedder.convolution.weight"
    return _Layout("a ResNet of transformers", ResNetConfig, first, table, ("classifier.",))


_LAYOUTS = (
    _Layout(
        "a VGG of torchvision or timm",
        VGGConfig,
        "features.0.weight",
        partial(_vgg_table, prefix="features."),
        ("classifier.", "pre_logits.", "head."),
    ),
    _Layout("the features of a VGG", VGGConfig, "0.weight", partial(_vgg_table, prefix="")),
    _Layout(
        "a ResNet of torchvision or timm",
        ResNetConfig,
        "conv1.weight",
        partial(
            _resnet_table,
            stem=("conv1", "bn1"),
            block="layer{number}.{layer}",
            conv=("conv{number}", "bn{number}"),
            shortcut=("downsample.0", "downsample.1"),
        ),
        ("fc.",),
    ),
    _hugging_face("resnet."),
    _hugging_face(""),
)

# The number of batches that a normalisation has seen, which is no value of the model.
_COUNTER = "num_batches_tracked"

# What the tensors of a Hugging Face ResNet do not show.
_HUGGING_FACE_VARIANTS = {
    "hidden_act": "relu",
    "downsample_in_first_stage": False,
    "downsample_in_bottleneck": False,
}


def load_encoder(
    config: str | Mapping[str, Any] | EncoderConfig,
    source: str | os.PathLike,
    *,
    prefix: str = "",
    dtype: Any = jnp.float32,
    allow_pickle: bool = False,
) -> Encoder:
    """Load an encoder from weights in one of the common layouts.

    The layout is seen from the names of the tensors: torchvision's and timm's of VGG and ResNet,
    that of ResNet in transformers, and that of torchvision's `vgg.features` alone. A classifier
    in the file is ignored.

    Args:
      config: a preset's name or the sizes; see `encoder_config`.
      source: a file of weights, or a folder or hub name, such as "timm/vgg16.tv_in1k".
      prefix: of the encoder's tensors in the file of a larger model, such as
        "img_encoder.encoder." in the reference implementation of Sun et al. 2022; all others are
        ignored then.
      dtype: of the computation; parameters are float32.
      allow_pickle: read a pickled checkpoint where there is nothing else; needs torch.

    Returns:
      A `VGG` or a `ResNet`.

    Raises:
      FileNotFoundError: no such file, folder or model.
      OSError: the hub did not answer, or a file is truncated.
      ImportError: pickled weights were allowed, and torch is not installed.
      ValueError: the weights have an unknown layout, are not those of an encoder of these sizes,
        are pickled, or hold values that are not finite.
    """
    config = encoder_config(config)
    path = Path(source).expanduser()
    if path.is_dir() or not any(map(path.match, ("*.safetensors", *PICKLES))):
        path = find_folder(source)
        _check_variant(path)
        tensors = read_tensors(path, allow_pickle=allow_pickle)
    else:
        tensors = _read_file(path, allow_pickle)
    try:
        return encoder_from_tensors(config, tensors, prefix=prefix, dtype=dtype)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _read_file(path: Path, allow_pickle: bool) -> dict[str, np.ndarray]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}; check the path of the weights")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if allow_pickle:
        return _read_pickle([path])
    raise ValueError(
        f"{path} is a pickled checkpoint, and unpickling can run any code. Convert it once where "
        f"torch is installed: safetensors.torch.save_file(torch.load({path.name!r}, "
        f"weights_only=True), '{path.stem}.safetensors'), and pass the new file; or, if you trust "
        "it and torch is installed, pass allow_pickle=True"
    )


def _check_variant(folder: Path) -> None:
    """Refuse a ResNet of transformers with strides or activations that are not this model's."""
    config = read_any_config(folder) if (folder / CONFIG).is_file() else {}
    if config.get("model_type") != ResNetConfig.model_type:
        return
    for key, value in _HUGGING_FACE_VARIANTS.items():
        if config.get(key, value) != value:
            raise ValueError(
                f"{folder / CONFIG}: {key} is {config[key]!r}, and this ResNet has {value!r}; "
                "use another checkpoint"
            )


def encoder_from_tensors(
    config: EncoderConfig,
    tensors: Mapping[str, np.ndarray],
    *,
    prefix: str = "",
    dtype: Any = jnp.float32,
) -> Encoder:
    """Make an encoder of tensors that have been read already; see `load_encoder`.

    Args:
      config: the sizes.
      tensors: by name.
      prefix: of the encoder's names; tensors without it are ignored.
      dtype: of the computation; parameters are float32.

    Returns:
      A `VGG` or a `ResNet`.

    Raises:
      ValueError: an unknown layout, or tensors that are not those of an encoder of these sizes or
        are not finite.
    """
    found = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix) and not name.endswith(_COUNTER)
    }
    layout = _find_layout(config, found, prefix)
    found = {name: x for name, x in found.items() if not name.startswith(layout.ignored)}
    model = nnx.eval_shape(lambda: make_encoder(config, dtype=dtype, rngs=nnx.Rngs(0)))
    variables = {
        tuple(map(str, path)): variable for path, variable in nnx.to_flat_state(nnx.state(model))
    }
    shapes = {path: variable.shape for path, variable in variables.items()}
    table = [parameter for parameter in layout.table(config) if parameter.path in shapes]
    _check_tensors(found, table, shapes, f"{layout.name} with the sizes of {_name(config)}")
    parameters = read_parameters(found, table, shapes)
    for path, variable in variables.items():
        variable.set_value(jnp.asarray(parameters[path]))
    return model


def _find_layout(config: EncoderConfig, tensors: Mapping[str, np.ndarray], prefix: str) -> _Layout:
    layout = next((layout for layout in _LAYOUTS if layout.first in tensors), None)
    if layout is None:
        under = f" under the prefix {prefix!r}" if prefix else ""
        raise ValueError(
            f"no layout of weights that is known here{under}: expected one of the tensors "
            f"{', '.join(layout.first for layout in _LAYOUTS)}, got "
            f"{_some(sorted(tensors)) or 'no tensor'}. Convert the weights, or name the tensors' "
            "prefix with prefix="
        )
    if not isinstance(config, layout.kind):
        raise ValueError(
            f"these are the tensors of {layout.name}, and the sizes those of {_name(config)}; "
            "give the sizes of the encoder in the file"
        )
    statistics = [name for name in tensors if name.endswith("running_mean")]
    if layout.kind is VGGConfig and statistics:
        raise ValueError(
            f"this VGG has batch normalisation ({_some(sorted(statistics))}), which is not "
            "supported; use the weights of a VGG without it"
        )
    return layout


def _check_tensors(
    tensors: Mapping[str, np.ndarray],
    table: Sequence[Parameter],
    shapes: Mapping[tuple[str, ...], tuple[int, ...]],
    what: str,
) -> None:
    """Compare names and shapes; here no config.json is at fault, but the sizes that were given."""
    expected = {
        name: parameter.tensor_shape(shapes[parameter.path])
        for parameter in table
        for name in parameter.names(shapes[parameter.path])
    }
    missing, unexpected = sorted(set(expected) - set(tensors)), sorted(set(tensors) - set(expected))
    if missing or unexpected:
        parts = [f"missing are {_some(missing)}"] if missing else []
        parts += [f"unexpected are {_some(unexpected)}"] if unexpected else []
        raise ValueError(f"the tensors are not those of {what}: {'; '.join(parts)}")
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            raise ValueError(
                f"the tensor {name} has shape {list(tensors[name].shape)}, and {what} has "
                f"{list(shape)}; give the sizes of the encoder in the file"
            )


def _name(config: EncoderConfig) -> str:
    return next((name for name, preset in PRESETS.items() if preset == config), repr(config))
