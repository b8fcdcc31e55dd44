"""Sizes of captioners, and their config.json."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from jaxrel.models.checkpoint import CONFIG
from jaxrel.models.sizes import (
    check_choice,
    check_heads,
    check_keys,
    check_sizes,
    check_types,
    field_names,
    from_json,
    is_size,
    to_json,
)
from jaxrel.models.vision.config import EncoderConfig, VGGConfig, encoder_config

MODEL_TYPE = "captioner"
KINDS = ("adaptive", "gridtd", "aoa")
ATTENTION_FORMS = ("paper", "as coded")

# The encoder has a section of its own, and dtype is not stored.
_NOT_SIZES = ("encoder", "dtype")


@dataclass(frozen=True)
class CaptionerConfig:
    """Sizes of a captioner.

    Args:
      kind: "adaptive", "gridtd" or "aoa".
      encoder: sizes of the image encoder; None for a model of region features.
      regions: (number of regions, features of each) where there is no encoder.
      image_size: pixels of a side of the square image; not used for regions.
      vocab_size: tokens, the special ones included.
      embed: features of a word.
      hidden: features of states and attended values.
      heads: number of attention heads (kind "aoa"); divides `hidden`.
      attention: form of the scores of adaptive attention, "paper" or "as coded": see
        `AdaptiveAttention`. Not used by "aoa".
      dropout: share of values dropped before each prediction; only with a key, as in training.
        Sun et al. 2022 have 0.5, and 0.3 for "aoa".
      attention_dropout: share of the attention maps of "aoa" that is dropped, as `dropout`.
      context: number of tokens of the longest caption, with start and end.
      dtype: dtype of the computation, "float32" or "bfloat16"; not stored.

    Raises:
      ValueError: a size or a name is out of range, or there are both or neither of encoder and
        regions.
    """

    kind: str = "gridtd"
    encoder: EncoderConfig | None = field(default_factory=VGGConfig)
    regions: tuple[int, int] | None = None
    image_size: int = 224
    vocab_size: int = 10000
    embed: int = 512
    hidden: int = 512
    heads: int = 8
    attention: str = "paper"
    dropout: float = 0.5
    attention_dropout: float = 0.1
    context: int = 22
    dtype: str = "float32"

    def __post_init__(self) -> None:
        choices = {"kind": KINDS, "attention": ATTENTION_FORMS, "dtype": ("float32", "bfloat16")}
        for name, known in choices.items():
            check_choice("captioner", name, getattr(self, name), known)
        sizes = ("image_size", "vocab_size", "embed", "hidden", "heads", "context")
        check_sizes("captioner", self, sizes)
        for name in ("dropout", "attention_dropout"):
            value = getattr(self, name)
            if not isinstance(value, float | int) or not 0 <= value < 1:
                raise ValueError(f"captioner: {name} must be at least 0 and below 1, got {value!r}")
        if self.kind == "aoa":
            check_heads("captioner", "hidden", self.hidden, self.heads)
        if self.context < 3:
            raise ValueError(
                f"captioner: context is {self.context}: start, one word and end need at least 3"
            )
        if (self.encoder is None) == (self.regions is None):
            raise ValueError(
                "captioner: give encoder= for images, or encoder=None and regions=(number, "
                f"features); got encoder {self.encoder!r} and regions {self.regions!r}"
            )
        if self.regions is not None:
            if not isinstance(self.regions, tuple) or len(self.regions) != 2:
                raise ValueError(
                    f"captioner: regions must be (number, features), got {self.regions!r}"
                )
            for size in self.regions:
                if not is_size(size):
                    raise ValueError(f"captioner: regions must be a positive integer, got {size!r}")
        # An image size that does not fit the encoder is an error here and not later.
        _ = self.grid

    @property
    def grid(self) -> tuple[int, int] | None:
        """(rows, columns) of the features; None for regions."""
        return None if self.encoder is None else self.encoder.grid(self.image_size)

    @property
    def positions(self) -> int:
        """How many features an image has that attention chooses from."""
        return self._features[0]

    @property
    def features(self) -> int:
        """The width of the features."""
        return self._features[1]

    @property
    def _features(self) -> tuple[int, int]:
        if self.encoder is None:
            assert self.regions is not None
            return self.regions
        rows, columns = self.encoder.grid(self.image_size)
        return rows * columns, self.encoder.channels

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "CaptionerConfig":
        """Read the content of a config.json, as `to_dict` writes it.

        Raises:
          ValueError: a key is missing or unknown, or a value is out of range.
        """
        sizes, encoder = config.get("captioner_config"), config.get("encoder_config")
        if not isinstance(sizes, dict) or not isinstance(encoder, dict | None):
            raise ValueError(
                f"{CONFIG}: expected an object captioner_config, and encoder_config an object or "
                "null"
            )
        check_keys("captioner_config", sizes, field_names(cls, without=_NOT_SIZES))
        check_types("captioner_config", cls, sizes)
        read = None if encoder is None else encoder_config(encoder)
        return cls(**from_json(sizes), encoder=read)

    def to_dict(self) -> dict[str, Any]:
        """Write the content of a config.json (without `dtype`)."""
        return {
            "model_type": MODEL_TYPE,
            "encoder_config": None if self.encoder is None else self.encoder.to_dict(),
            "captioner_config": to_json(self, without=_NOT_SIZES),
        }
