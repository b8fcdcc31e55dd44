"""CLIP in the layout of OpenCLIP: open_clip_config.json and open_clip_model.safetensors."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from jaxrel.models.checkpoint import (
    CONFIG,
    INDEX,
    OPEN_CLIP,
    OPEN_CLIP_WEIGHTS,
    WEIGHTS,
    Parameter,
    read_file,
    read_json,
)
from jaxrel.models.clip.config import (
    CLIPConfig,
    TextConfig,
    VisionConfig,
    read_image_size,
)
from jaxrel.models.clip.resnet import CLIPResNetConfig, ResNetTowerConfig
from jaxrel.models.patches import ImageSize
from jaxrel.models.preprocessing import ImageProcessing
from jaxrel.models.processor import Processor
from jaxrel.models.sizes import is_number, is_size
from jaxrel.models.tables import convolution, fused, layers, linear, norm
from jaxrel.models.tokenizer import read_tokenizer
from jaxrel.models.vision.layouts import COUNTER, conv_norm, stages_table

_PICKLE = "open_clip_pytorch_model.bin"

# What is read of each section, and the value of its other settings that changes nothing, where
# that is neither null, false, 0 nor empty. What says how a model is trained is not looked at.
_READ = {
    "model_cfg": "embed_dim vision_cfg text_cfg quick_gelu custom_text",
    "model_cfg.vision_cfg": "layers width head_width mlp_ratio patch_size image_size",
    "model_cfg.text_cfg": "context_length vocab_size width heads layers mlp_ratio",
}
_USUAL = {
    "pool_type": {"model_cfg.vision_cfg": "tok", "model_cfg.text_cfg": "argmax"},
    "pos_embed_type": "learnable",
    "proj_type": "linear",
}
_TRAINING = {
    *("init_logit_scale", "patch_dropout", "output_tokens", "attn_pooler_queries"),
    *("attn_pooler_heads", "timm_model_pretrained", "timm_pool", "timm_proj"),
    *("hf_tokenizer_name", "tokenizer_kwargs", "hf_model_pretrained"),
}
_FILTERS = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}

_LINEARS: dict[tuple[str, ...], str] = {
    ("attention", "out"): "attn.out_proj",
    ("expand",): "mlp.c_fc",
    ("contract",): "mlp.c_proj",
}
_NORMS: dict[tuple[str, ...], str] = {("norm1",): "ln_1", ("norm2",): "ln_2"}


def is_one(folder: Path) -> bool:
    """Whether a folder is to be read in this layout.

    Many folders have both layouts; the Hugging Face one is read then.
    """
    if not (folder / OPEN_CLIP).is_file():
        return False
    if not (folder / CONFIG).is_file():
        return True
    # Beside a model of OpenCLIP there may be timm's image tower alone, under the usual names.
    other = "model_type" in read_json(folder / CONFIG)
    return not other or not any((folder / name).is_file() for name in (WEIGHTS, INDEX))


def read(
    folder: Path, image_size: ImageSize | None, *, allow_pickle: bool = False
) -> tuple[CLIPConfig | CLIPResNetConfig, Processor, dict[str, Any]]:
    """Read a folder in this layout.

    Where an odd number of pixels is cropped away, OpenCLIP's middle may lie one pixel beside ours.

    Args:
      folder: the folder; `is_one` is true of it.
      image_size: resize and crop to this instead of the folder's number.
      allow_pickle: see `read_tensors`.

    Returns:
      The sizes; tokenizer and image preprocessing; and further arguments of `contrastive.load`.

    Raises:
      FileNotFoundError: no weights.
      OSError: a file is truncated.
      ValueError: a setting that is not supported, with its name, or a file that cannot be read.
    """
    path = folder / OPEN_CLIP
    settings = read_json(path)
    try:
        model = _section(settings, "model_cfg")
        config = _config(model)
        images = _images(settings.get("preprocess_cfg"), config.vision.image_size)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if image_size is not None:
        images = images.for_size(image_size)
    weights = folder / OPEN_CLIP_WEIGHTS
    if not weights.is_file() and (folder / _PICKLE).is_file():
        weights = folder / _PICKLE
    tensors = read_file(weights, allow_pickle=allow_pickle)
    image_table = _RESNET if isinstance(config, CLIPResNetConfig) else _VIT
    text_table = _text_table("text." if model.get("custom_text") else "")
    return (
        config,
        Processor(read_tokenizer(folder), images),
        {
            "tensors": {n: x for n, x in tensors.items() if not n.endswith(COUNTER)},
            "table": [Parameter(("logit_scale",), "logit_scale"), *image_table, *text_table],
            "antialias": True,
            "wanted": f"the model that {OPEN_CLIP} describes",
        },
    )


def _section(parent: Mapping[str, Any], name: str, prefix: str = "") -> Mapping[str, Any]:
    """A section whose settings are all supported."""
    where = prefix + name
    section = parent.get(name)
    if not isinstance(section, Mapping):
        raise ValueError(f"{where} must be an object, got {section!r:.80}")
    for key, value in section.items():
        if key in _READ[where].split() or key in _TRAINING or not value:
            continue
        usual = _USUAL.get(key)
        usual = usual.get(where) if isinstance(usual, Mapping) else usual
        if value != usual:
            wanted = "that it is left out" if usual is None else repr(usual)
            raise ValueError(
                f"{where}.{key} is {value!r:.80}, and what is supported is {wanted}: a ViT with a "
                "class token, or OpenAI's ResNet, and a causal text tower. Models of timm and "
                "transformers inside of OpenCLIP are often published as CLIPModel or SiglipModel "
                "of transformers too, which can be read"
            )
    return section


def _config(model: Mapping[str, Any]) -> CLIPConfig | CLIPResNetConfig:
    vision = _section(model, "vision_cfg", "model_cfg.")
    text = _section(model, "text_cfg", "model_cfg.")
    activation = "quick_gelu" if model.get("quick_gelu") else "gelu"
    width = _size(vision, "vision_cfg.width", 768)
    text_width = _size(text, "text_cfg.width", 512)
    towers: dict[str, Any] = {
        "text": TextConfig(
            width=text_width,
            layers=_size(text, "text_cfg.layers", 12),
            heads=_size(text, "text_cfg.heads", 8),
            mlp_width=int(text_width * _ratio(text, "text_cfg.mlp_ratio")),
            vocab_size=_size(text, "text_cfg.vocab_size", 49408),
            context=_size(text, "text_cfg.context_length", 77),
            eos_token_id=2,  # the embedding is read at the highest id
            activation=activation,
        ),
        "projection": _size(model, "embed_dim", None),
    }
    image_size = read_image_size(vision.get("image_size", 224), "vision_cfg.image_size")
    head_width = _size(vision, "vision_cfg.head_width", 64)
    if isinstance(stages := vision.get("layers"), list):
        heads = 32 * width // head_width
        return CLIPResNetConfig(
            vision=ResNetTowerConfig(tuple(stages), width, heads, image_size), **towers
        )
    tower = VisionConfig(
        width=width,
        layers=_size(vision, "vision_cfg.layers", 12),
        heads=width // head_width,
        mlp_width=int(width * _ratio(vision, "vision_cfg.mlp_ratio")),
        image_size=image_size,
        patch_size=_size(vision, "vision_cfg.patch_size", 16),
        activation=activation,
    )
    return CLIPConfig(vision=tower, **towers)


def _size(section: Mapping[str, Any], name: str, default: int | None) -> int:
    value = section.get(name.split(".")[-1], default)
    if not is_size(value):
        raise ValueError(f"model_cfg.{name} must be a positive integer, got {value!r:.80}")
    return value


def _ratio(section: Mapping[str, Any], name: str) -> float:
    value = section.get("mlp_ratio", 4.0)
    if not is_number(value) or value <= 0:
        raise ValueError(f"model_cfg.{name} must be a positive number, got {value!r:.80}")
    return value


def _images(settings: Any, image_size: ImageSize) -> ImageProcessing:
    """The image preprocessing; what it does not say is as in OpenCLIP, which is as in CLIP."""
    if settings is None:
        settings = {}
    if not isinstance(settings, Mapping):
        raise ValueError(f"preprocess_cfg must be an object, got {settings!r:.80}")
    size = settings.get("size")
    size = read_image_size(image_size if size is None else size, "preprocess_cfg.size")
    mode = settings.get("resize_mode", "shortest")
    filter_name = settings.get("interpolation", "bicubic")
    for name, value, known in (
        ("resize_mode", mode, ("shortest", "squash")),
        ("interpolation", filter_name, tuple(_FILTERS)),
        ("mode", settings.get("mode", "RGB"), ("RGB",)),
    ):
        if value not in known:
            raise ValueError(
                f"preprocess_cfg.{name} is {value!r:.80}, and what is supported is "
                f"{' or '.join(map(repr, known))}"
            )
    fields = {"image_mean": settings.get("mean"), "image_std": settings.get("std")}
    images = replace(ImageProcessing.from_dict(fields), resample=int(_FILTERS[filter_name]))
    if mode == "squash":
        images = replace(images, crops=False)
    elif isinstance(size, tuple):
        raise ValueError(
            f"preprocess_cfg.resize_mode is {mode!r} and its size is {list(size)}; what is "
            "supported of images that are not square is 'squash'"
        )
    return images.for_size(size)


def _tower(ours: str, theirs: str) -> list[Parameter]:
    block = (ours, "transformer", "blocks")
    prefix = f"{theirs}transformer.resblocks.{{layer}}."
    inputs = [(*block, "attention", name) for name in ("query", "key", "value")]
    return [*layers(block, _LINEARS, _NORMS, prefix), *fused(inputs, f"{prefix}attn.in_proj", "_")]


def _text_table(prefix: str) -> list[Parameter]:
    return [
        Parameter(("text", "token_embedding", "embedding"), f"{prefix}token_embedding.weight"),
        Parameter(("text", "position_embedding"), f"{prefix}positional_embedding"),
        *_tower("text", prefix),
        *norm(("text", "final_norm"), f"{prefix}ln_final"),
        Parameter(("text", "projection", "kernel"), f"{prefix}text_projection"),
    ]


_VIT = [
    Parameter(("vision", "class_embedding"), "visual.class_embedding"),
    convolution(("vision", "patch_embedding"), "visual.conv1"),
    Parameter(("vision", "position_embedding"), "visual.positional_embedding"),
    *norm(("vision", "pre_norm"), "visual.ln_pre"),
    *_tower("vision", "visual."),
    *norm(("vision", "post_norm"), "visual.ln_post"),
    # Projections are [inputs, outputs] here, as they are not in linear maps.
    Parameter(("vision", "projection", "kernel"), "visual.proj"),
]
_POOLING = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "c_proj"}
_RESNET = [
    *(
        parameter
        for i in range(3)
        for parameter in conv_norm(
            Parameter, ("vision", "stem", str(i)), "visual.", (f"conv{i + 1}", f"bn{i + 1}")
        )
    ),
    *(
        replace(parameter, path=("vision", *parameter.path))
        for parameter in stages_table(
            range(4),
            3,
            "visual.layer{number}.{layer}",
            ("conv{number}", "bn{number}"),
            ("downsample.0", "downsample.1"),
        )
    ),
    Parameter(("vision", "position_embedding"), "visual.attnpool.positional_embedding"),
    *(
        parameter
        for ours, theirs in _POOLING.items()
        for parameter in linear(("vision", "pooling", ours), f"visual.attnpool.{theirs}")
    ),
]
