"""Sizes of image encoders, and the presets."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxrel.models.checkpoint import CONFIG
from jaxrel.models.sizes import (
    check_keys,
    check_sizes,
    check_types,
    field_names,
    from_json,
    is_size,
    to_json,
)


class _Sizes:
    """How the sizes of encoders are stored."""

    model_type: ClassVar[str]

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> Any:
        """Read what `to_dict` writes.

        Raises:
          ValueError: a key is missing or unknown, or a value is out of range.
        """
        known = ("model_type", *field_names(cls))
        check_keys(f"the sizes of a {cls.model_type} encoder", config, known)
        if config["model_type"] != cls.model_type:
            raise ValueError(
                f"{CONFIG}: these are the sizes of an encoder of type {config['model_type']!r}, "
                f"and {cls.__name__} reads {cls.model_type!r}; use encoder_config, which reads both"
            )
        check_types("encoder_config", cls, config)
        return cls(**{key: x for key, x in from_json(config).items() if key != "model_type"})

    def to_dict(self) -> dict[str, Any]:
        """Write the sizes for a config.json."""
        return {"model_type": self.model_type, **to_json(self)}


@dataclass(frozen=True)
class VGGConfig(_Sizes):
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


@dataclass(frozen=True)
class ResNetConfig(_Sizes):
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
        check_sizes("resnet", self, ["stem"])

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


EncoderConfig = VGGConfig | ResNetConfig


def _is_sizes(value: Any) -> bool:
    return isinstance(value, tuple) and bool(value) and all(map(is_size, value))


def _sides(name: str, image_size: Any) -> tuple[int, int]:
    sides = image_size if isinstance(image_size, tuple) else (image_size, image_size)
    if len(sides) != 2 or not all(map(is_size, sides)):
        raise ValueError(
            f"{name}: image_size must be a positive number of pixels, or (height, width), got "
            f"{image_size!r}"
        )
    return sides


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
