"""Sizes of SigLIP, and their Hugging Face config.json."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxrel.models.checkpoint import CONFIG
from jaxrel.models.clip.config import (
    TOWER_KEYS,
    check_channels,
    read_fields,
    read_image_size,
    read_one,
    read_section,
)
from jaxrel.models.patches import ImageSize, Patched
from jaxrel.models.sizes import check_choice
from jaxrel.models.transformer import check_transformer

MODEL_TYPE = "siglip"


@dataclass(frozen=True)
class SigLIPVisionConfig(Patched):
    """Sizes of the image tower; the defaults are those of ViT-B/16.

    Args:
      width: features per token, and of the embedding.
      layers: number of layers.
      heads: attention heads, of the layers and of the pooling; divides `width`.
      mlp_width: hidden features of the MLPs.
      image_size: pixels of a side of the square input, or (height, width).
      patch_size: pixels of a side of a patch.
      activation: a key of `transformer.ACTIVATIONS`.
      layer_norm_eps: added to the variance in layer norms.
    """

    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    image_size: ImageSize = 224
    patch_size: int = 16
    activation: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        check_transformer(self, "vision")
        self.check_patches("vision")

    @property
    def tokens(self) -> int:
        """The patches; there is no class token."""
        return self.patches


@dataclass(frozen=True)
class SigLIPTextConfig:
    """Sizes of the text tower; the defaults are those of ViT-B/16.

    Args:
      width: features per token.
      layers: number of layers.
      heads: attention heads; divides `width`.
      mlp_width: hidden features of the MLP.
      vocab_size: number of token ids.
      context: number of tokens, to which every text is padded.
      activation: a key of `transformer.ACTIVATIONS`.
      layer_norm_eps: added to the variance in layer norms.
    """

    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    vocab_size: int = 32000
    context: int = 64
    activation: str = "gelu_pytorch_tanh"
    layer_norm_eps: float = 1e-6

    def __post_init__(self) -> None:
        check_transformer(self, "text", "vocab_size", "context")


_VISION_KEYS = TOWER_KEYS | {"image_size": "image_size", "patch_size": "patch_size"}
_TEXT_KEYS = TOWER_KEYS | {"vocab_size": "vocab_size", "context": "max_position_embeddings"}


@dataclass(frozen=True)
class SigLIPConfig:
    """Sizes of a SigLIP model; the defaults are those of ViT-B/16.

    Args:
      vision: sizes of the image tower.
      text: sizes of the text tower.
      remat: recompute each layer in the backward pass instead of storing it.
      dtype: dtype of the computation, "float32" or "bfloat16"; see `CLIPConfig`.

    Raises:
      ValueError: a size or a name is out of range.
    """

    vision: SigLIPVisionConfig = field(default_factory=SigLIPVisionConfig)
    text: SigLIPTextConfig = field(default_factory=SigLIPTextConfig)
    remat: bool = False
    dtype: str = "float32"

    def __post_init__(self) -> None:
        check_choice("siglip", "dtype", self.dtype, ("float32", "bfloat16"))

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "SigLIPConfig":
        """Read the content of a Hugging Face config.json; keys that it lacks have defaults.

        Raises:
          ValueError: a value that is out of range or that this model does not support.
        """
        vision, text = read_section(config, "vision_config"), read_section(config, "text_config")
        check_channels(vision)
        if vision.get("vision_use_head", True) is not True:
            raise ValueError(
                f"{CONFIG}: vision_config.vision_use_head is {vision['vision_use_head']!r:.80}, "
                "and what is supported is true: images are compared by what the head pools"
            )
        for key, read in (("image_size", read_image_size), ("patch_size", read_one)):
            default = getattr(SigLIPVisionConfig, key)
            vision[key] = read(vision.get(key, default), f"vision_config.{key}")
        sizes = SigLIPVisionConfig(**read_fields(vision, _VISION_KEYS, "vision_config."))
        projection = text.get("projection_size")
        text_sizes = SigLIPTextConfig(**read_fields(text, _TEXT_KEYS, "text_config."))
        features = text_sizes.width if projection is None else projection
        if features != sizes.width:
            raise ValueError(
                f"{CONFIG}: texts are embedded in {features!r:.80} features (projection_size of "
                f"text_config, or its hidden_size) and images in {sizes.width} (hidden_size of "
                "vision_config); they must be as many"
            )
        return cls(vision=sizes, text=text_sizes)

    def to_dict(self) -> dict[str, Any]:
        """Write the content of a Hugging Face config.json (without `remat` and `dtype`)."""
        vision = {key: getattr(self.vision, ours) for ours, key in _VISION_KEYS.items()}
        text = {key: getattr(self.text, ours) for ours, key in _TEXT_KEYS.items()}
        projection = {"projection_size": self.vision.width}
        return {
            "model_type": MODEL_TYPE,
            "architectures": ["SiglipModel"],
            "vision_config": {"model_type": "siglip_vision_model", **vision},
            "text_config": {"model_type": "siglip_text_model", **text, **projection},
        }
