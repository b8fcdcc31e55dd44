"""Sizes of DINOv2 and DINOv3, and their Hugging Face config.json."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from jaxrel.models.checkpoint import CONFIG
from jaxrel.models.clip.config import (
    TOWER_KEYS,
    check_channels,
    read_fields,
    read_image_size,
    read_one,
)
from jaxrel.models.patches import ImageSize, Patched
from jaxrel.models.sizes import check_choice, check_numbers, is_number
from jaxrel.models.transformer import Variant, check_transformer

DINOV2, REGISTERS, DINOV3 = MODEL_TYPES = ("dinov2", "dinov2_with_registers", "dinov3_vit")
_ARCHITECTURES = dict(
    zip(MODEL_TYPES, ("Dinov2Model", "Dinov2WithRegistersModel", "DINOv3ViTModel"), strict=True)
)
# What of transformers' configurations must be so, where it is there: by kind, key and value.
_NEEDED: dict[str, dict[str, Any]] = {
    DINOV2: {"use_mask_token": True},
    REGISTERS: {},
    DINOV3: {"proj_bias": True, "mlp_bias": True},
}
# Where the defaults of transformers differ from ours, by kind.
_DEFAULTS: dict[str, dict[str, Any]] = {
    DINOV2: {},
    REGISTERS: {"registers": 4},
    DINOV3: {
        **{"width": 384, "heads": 6, "mlp_width": 1536, "patch_size": 16},
        **{"layer_norm_eps": 1e-5, "biases": (True, False, True)},
    },
}


@dataclass(frozen=True)
class DINOConfig(Patched):
    """Sizes of a DINO ViT; the defaults are those of DINOv2's ViT-B/14.

    Args:
      kind: "dinov2", "dinov2_with_registers" or "dinov3_vit". The first two learn an embedding of
        positions, which is interpolated to other image sizes; the last turns queries and keys by
        the places of their patches, of any image size.
      width: features per token.
      layers: number of layers.
      heads: attention heads; divides `width`, of DINOv3 in multiples of 4.
      mlp_width: hidden features of the MLP.
      image_size: pixels of a side of the square input, or (height, width).
      patch_size: pixels of a side of a patch.
      registers: number of register tokens, between the class token and the patches.
      activation: a key of `transformer.ACTIVATIONS`; "silu" of DINOv2's gated MLPs.
      layer_norm_eps: added to the variance in layer norms.
      gated: whether the MLP is gated (SwiGLU).
      biases: whether queries, keys and values have a bias.
      rope_theta: of DINOv3, the base of the frequencies of its rotations.
      remat: recompute each layer in the backward pass instead of storing it.
      dtype: dtype of the computation, "float32" or "bfloat16"; see `CLIPConfig`.

    Raises:
      ValueError: a size or a name is out of range.
    """

    name: ClassVar[str] = "dino"

    kind: str = DINOV2
    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    image_size: ImageSize = 224
    patch_size: int = 14
    registers: int = 0
    activation: str = "gelu"
    layer_norm_eps: float = 1e-6
    gated: bool = False
    biases: tuple[bool, bool, bool] = (True, True, True)
    rope_theta: float = 100.0
    remat: bool = False
    dtype: str = "float32"

    def __post_init__(self) -> None:
        check_choice(self.name, "kind", self.kind, MODEL_TYPES)
        check_choice(self.name, "dtype", self.dtype, ("float32", "bfloat16"))
        check_transformer(self, self.name)
        check_numbers(self.name, self, ["rope_theta"])
        self.check_patches(self.name)
        if self.registers < 0:
            raise ValueError(
                f"dino: registers must be 0 or a positive integer, got {self.registers!r:.80}"
            )
        if self.rotates and (self.width // self.heads) % 4:
            raise ValueError(
                f"dino: the heads of {self.kind} need a multiple of 4 features for their rotation, "
                f"and width {self.width} gives each of {self.heads} heads "
                f"{self.width // self.heads}"
            )

    @property
    def rotates(self) -> bool:
        """Whether positions are rotations and no embedding."""
        return self.kind == DINOV3

    @property
    def prefix(self) -> int:
        """Tokens before the patches: the class token and the registers."""
        return 1 + self.registers

    @property
    def tokens(self) -> int:
        """All tokens."""
        return self.prefix + self.patches

    @property
    def variant(self) -> Variant:
        """How the layers differ from those of CLIP."""
        return Variant(layer_scale=True, gated=self.gated, biases=self.biases)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "DINOConfig":
        """Read the content of a Hugging Face config.json; keys that it lacks have defaults.

        Raises:
          ValueError: a value that is out of range or that this model does not support.
        """
        kind: Any = config.get("model_type")
        check_choice(CONFIG, "model_type", kind, MODEL_TYPES)
        _check_supported(kind, config)
        section = dict(config)
        for key, read in (("image_size", read_image_size), ("patch_size", read_one)):
            if key in section:
                section[key] = read(section[key], key)
        keys = {**TOWER_KEYS, "image_size": "image_size", "patch_size": "patch_size"}
        if kind != DINOV3:
            del keys["mlp_width"]
        found = {**_DEFAULTS[kind], **read_fields(section, keys)}
        if kind != DINOV2 and "num_register_tokens" in section:
            found["registers"] = read_one(section["num_register_tokens"], "num_register_tokens")
        if kind == DINOV3 and "rope_theta" in section:
            if not is_number(theta := section["rope_theta"]):
                raise ValueError(f"{CONFIG}: rope_theta must be a number, got {theta!r:.80}")
            found["rope_theta"] = float(theta)
        return cls(kind=kind, **_with_mlp(kind, config, found))

    def to_dict(self) -> dict[str, Any]:
        """Write the content of a Hugging Face config.json (without `remat` and `dtype`)."""
        found = {key: getattr(self, ours) for ours, key in TOWER_KEYS.items()}
        found |= {"image_size": self.image_size, "patch_size": self.patch_size}
        if self.kind != DINOV2:
            found["num_register_tokens"] = self.registers
        if self.kind == DINOV3:
            biases = zip(("query_bias", "key_bias", "value_bias"), self.biases, strict=True)
            found |= {**dict(biases), "use_gated_mlp": self.gated, "rope_theta": self.rope_theta}
        else:
            ratio = found.pop("intermediate_size") * (1.5 if self.gated else 1) / self.width
            ratio = int(ratio) if ratio == int(ratio) else ratio
            found |= {"mlp_ratio": ratio, "use_swiglu_ffn": self.gated, "qkv_bias": self.biases[0]}
        return {"model_type": self.kind, "architectures": [_ARCHITECTURES[self.kind]], **found}


def _check_supported(kind: str, config: Mapping[str, Any]) -> None:
    check_channels(config)
    for key, wanted in _NEEDED[kind].items():
        if config.get(key, wanted) != wanted:
            raise ValueError(
                f"{CONFIG}: {key} is {config[key]!r:.80}, and what is supported is {wanted!r}"
            )
    names = config.get("architectures") or ()
    for name in names if isinstance(names, list | tuple) else (names,):
        if name != _ARCHITECTURES[kind]:
            raise ValueError(
                f"{CONFIG}: architectures names {name!r:.80}, and what is supported is "
                f"{_ARCHITECTURES[kind]!r}, the model without a classifier"
            )


def _with_mlp(kind: str, config: Mapping[str, Any], found: dict[str, Any]) -> dict[str, Any]:
    """The fields with what is said of the MLP and of biases."""
    if kind == DINOV3:
        usual = _DEFAULTS[kind]["biases"]
        names = ("query_bias", "key_bias", "value_bias")
        flags = (_flag(config, key, default) for key, default in zip(names, usual, strict=True))
        return found | {"biases": tuple(flags), "gated": _flag(config, "use_gated_mlp", False)}
    gated, ratio = _flag(config, "use_swiglu_ffn", False), config.get("mlp_ratio", 4)
    if not is_number(ratio) or ratio <= 0:
        raise ValueError(f"{CONFIG}: mlp_ratio must be a positive number, got {ratio!r:.80}")
    width = int(found.get("width", DINOConfig.width) * ratio)
    if gated:
        # Two thirds, so that three matrices have the size of two; then a multiple of 8.
        found = {**found, "activation": "silu"}
        width = (int(width * 2 / 3) + 7) // 8 * 8
    bias = _flag(config, "qkv_bias", True)
    return found | {"mlp_width": width, "gated": gated, "biases": (bias, bias, bias)}


def _flag(config: Mapping[str, Any], key: str, default: bool) -> bool:
    value = config.get(key, default)
    if not isinstance(value, bool):
        raise ValueError(f"{CONFIG}: {key} must be true or false, got {value!r:.80}")
    return value
