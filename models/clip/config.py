"""Sizes of CLIP, and their Hugging Face config.json."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxrel.models.checkpoint import CONFIG
from jaxrel.models.patches import ImageSize, Patched
from jaxrel.models.sizes import check_numbers, check_sizes, is_number, is_size
from jaxrel.models.transformer import check_transformer

MODEL_TYPE = "clip"


@dataclass(frozen=True)
class VisionConfig(Patched):
    """Sizes of the image tower; the defaults are those of ViT-B/32.

    Args:
      width: features per token.
      layers: number of layers.
      heads: attention heads; divides `width`.
      mlp_width: hidden features of the MLP.
      image_size: pixels of a side of the square input, or (height, width).
      patch_size: pixels of a side of a patch.
      activation: "quick_gelu" or "gelu".
      layer_norm_eps: added to the variance in layer norms.
    """

    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    image_size: ImageSize = 224
    patch_size: int = 32
    activation: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        check_transformer(self, "vision")
        self.check_patches("vision")

    @property
    def tokens(self) -> int:
        """The class token and the patches."""
        return 1 + self.patches


@dataclass(frozen=True)
class TextConfig:
    """Sizes of the text tower; the defaults are those of ViT-B/32.

    Args:
      width: features per token.
      layers: number of layers.
      heads: attention heads; divides `width`.
      mlp_width: hidden features of the MLP.
      vocab_size: number of token ids.
      context: number of tokens the model reads at most.
      eos_token_id: the id that ends a text. The value 2 means what it means in old Hugging
        Face configurations: a text ends at its highest id.
      activation: "quick_gelu" or "gelu".
      layer_norm_eps: added to the variance in layer norms.
    """

    width: int = 512
    layers: int = 12
    heads: int = 8
    mlp_width: int = 2048
    vocab_size: int = 49408
    context: int = 77
    eos_token_id: int = 49407
    activation: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        check_transformer(self, "text", "vocab_size", "context")


# Field of our configuration: key of the Hugging Face configuration.
TOWER_KEYS = {
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
    "activation": "hidden_act",
    "layer_norm_eps": "layer_norm_eps",
}
_VISION_KEYS = TOWER_KEYS | {"image_size": "image_size", "patch_size": "patch_size"}
_TEXT_KEYS = TOWER_KEYS | {
    "vocab_size": "vocab_size",
    "context": "max_position_embeddings",
    "eos_token_id": "eos_token_id",
}
_COMMON_KEYS = {"projection": "projection_dim", "logit_scale": "logit_scale_init_value"}
_NUMBERS = ("layer_norm_eps", "logit_scale_init_value")


def check_channels(section: Mapping[str, Any]) -> None:
    """Raise ValueError unless a section of a config.json is of images with three channels."""
    if section.get("num_channels", 3) != 3:
        raise ValueError(f"{CONFIG}: num_channels must be 3, got {section['num_channels']!r:.80}")


@dataclass(frozen=True)
class CLIPConfig:
    """Sizes of a CLIP model; the defaults are those of ViT-B/32.

    Args:
      vision: sizes of the image tower.
      text: sizes of the text tower.
      projection: features of the common embedding space.
      logit_scale: the initial logarithm of the factor on the cosines.
      remat: recompute each layer in the backward pass instead of storing it.
      dtype: dtype of the computation, "float32" or "bfloat16". Parameters, attention maps,
        embeddings and scores are float32.

    Raises:
      ValueError: a size or a name is out of range.
    """

    vision: VisionConfig = field(default_factory=VisionConfig)
    text: TextConfig = field(default_factory=TextConfig)
    projection: int = 512
    logit_scale: float = 2.6592
    remat: bool = False
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype must be 'float32' or 'bfloat16', got {self.dtype!r}")
        check_sizes("clip", self, ["projection"])
        check_numbers("clip", self, ["logit_scale"])

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "CLIPConfig":
        """Read the content of a Hugging Face config.json; keys that it lacks have defaults.

        Raises:
          ValueError: a value that is out of range or that this model does not support.
        """
        vision, text = read_section(config, "vision_config"), read_section(config, "text_config")
        check_channels(vision)
        for key, read in (("image_size", read_image_size), ("patch_size", read_one)):
            vision[key] = read(vision.get(key, getattr(VisionConfig, key)), f"vision_config.{key}")
        text["eos_token_id"] = read_one(
            text.get("eos_token_id", TextConfig.eos_token_id), "text_config.eos_token_id"
        )
        return cls(
            vision=VisionConfig(**read_fields(vision, _VISION_KEYS, "vision_config.")),
            text=TextConfig(**read_fields(text, _TEXT_KEYS, "text_config.")),
            **read_fields(config, _COMMON_KEYS),
        )

    def to_dict(self) -> dict[str, Any]:
        """Write the content of a Hugging Face config.json (without `remat` and `dtype`)."""
        vision = {key: getattr(self.vision, ours) for ours, key in _VISION_KEYS.items()}
        text = {key: getattr(self.text, ours) for ours, key in _TEXT_KEYS.items()}
        common = {"projection_dim": self.projection}
        return {
            "model_type": MODEL_TYPE,
            "architectures": ["CLIPModel"],
            "projection_dim": self.projection,
            "logit_scale_init_value": self.logit_scale,
            "vision_config": {"model_type": "clip_vision_model", **vision, **common},
            "text_config": {"model_type": "clip_text_model", **text, **common},
        }


def read_section(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Read a section of a config.json; ValueError if it is no object."""
    # Configurations of 2021 have a second copy, `*_config_dict`, which wins in transformers, also
    # where it says nothing: then by its defaults, which are those of this module.
    copy = f"{name}_dict" if config.get(f"{name}_dict") is not None else name
    section = {} if config.get(copy) is None else config[copy]
    if not isinstance(section, dict):
        raise ValueError(f"{CONFIG}: {copy} must be an object, got {section!r:.80}")
    return dict(section)


def read_fields(
    section: Mapping[str, Any], keys: Mapping[str, str], name: str = ""
) -> dict[str, Any]:
    """Our fields of a section, whose values are of the types they should be.

    Args:
      section: a section of a config.json.
      keys: by field, the key that it has there.
      name: of the section, with a dot, for the message.

    Raises:
      ValueError: a value of another type.
    """
    found = {ours: section[key] for ours, key in keys.items() if key in section}
    for ours, value in found.items():
        key = keys[ours]
        if key in _NUMBERS:
            fits, wanted = is_number(value), "a number"
        elif key == "hidden_act":
            fits, wanted = isinstance(value, str), "a name"
        else:
            read = key in ("eos_token_id", "image_size")  # looked at before
            fits, wanted = is_size(value) or read, "a positive integer"
        if not fits:
            raise ValueError(f"{CONFIG}: {name}{key} must be {wanted}, got {value!r:.80}")
    return found


def read_image_size(value: Any, name: str) -> ImageSize:
    """Read an image size of a config.json: one number, or height and width, equal or not.

    Raises:
      ValueError: another value.
    """
    if isinstance(value, list | tuple) and len(value) == 2 and all(map(is_size, value)):
        return value[0] if value[0] == value[1] else (value[0], value[1])
    return read_one(value, name)


def read_one(value: Any, name: str) -> int:
    """Read one integer, which a config.json may repeat; ValueError if it is another value."""
    values = value if isinstance(value, (list, tuple)) else [value]
    if not values or any(type(one) is not int or one != values[0] for one in values):
        raise ValueError(f"{CONFIG}: {name} must be one integer, got {value!r:.80}")
    return values[0]
