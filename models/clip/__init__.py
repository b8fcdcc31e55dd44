"""CLIP: an image tower and a text tower with one embedding space (Radford et al. 2021)."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrel import capture_with_grad, tag
from jaxrel.models.checkpoint import (
    CONFIG,
    Parameter,
    find_folder,
    new_folder,
    read_config,
    read_parameters,
    read_tensors,
    write_tensors,
)
from jaxrel.models.layout import Layout, Stream
from jaxrel.models.processor import Processor
from jaxrel.models.transformer import (
    ACTIVATIONS,
    Mask,
    Memory,
    Transformer,
    causal_mask,
    key_mask,
    layer_norm,
    look_up,
)

MODEL_TYPE = "clip"

Inputs = Mapping[str, Array | np.ndarray]


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of the image tower; the defaults are those of ViT-B/32.

    Args:
      width: features per token.
      layers: number of layers.
      heads: attention heads; divides `width`.
      mlp_width: hidden features of the MLP.
      image_size: pixels of a side of the square input.
      patch_size: pixels of a side of a patch.
      activation: "quick_gelu" or "gelu".
      layer_norm_eps: added to the variance in layer norms.
    """

    width: int = 768
    layers: int = 12
    heads: int = 12
    mlp_width: int = 3072
    image_size: int = 224
    patch_size: int = 32
    activation: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        _check_tower(self, "vision", ("image_size", "patch_size"))
        if self.image_size < self.patch_size:
            raise ValueError(
                f"vision: image_size {self.image_size} is smaller than one patch of "
                f"{self.patch_size} pixels"
            )

    @property
    def grid(self) -> tuple[int, int]:
        """(rows, columns) of patches."""
        side = self.image_size // self.patch_size
        return side, side

    @property
    def tokens(self) -> int:
        """The class token and the patches."""
        return 1 + self.grid[0] * self.grid[1]


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
        _check_tower(self, "text", ("vocab_size", "context"))


def _check_tower(config: Any, name: str, sizes: tuple[str, ...]) -> None:
    for size in ("width", "layers", "heads", "mlp_width", *sizes):
        value = getattr(config, size)
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name}: {size} must be a positive integer, got {value!r}")
    if config.width % config.heads:
        raise ValueError(
            f"{name}: width {config.width} is not a multiple of its {config.heads} heads"
        )
    if config.activation not in ACTIVATIONS:
        raise ValueError(
            f"{name}: unknown activation {config.activation!r}, known are {', '.join(ACTIVATIONS)}"
        )


# Field of our configuration: key of the Hugging Face configuration.
_TOWER_KEYS = {
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "mlp_width": "intermediate_size",
    "activation": "hidden_act",
    "layer_norm_eps": "layer_norm_eps",
}
_VISION_KEYS = _TOWER_KEYS | {"image_size": "image_size", "patch_size": "patch_size"}
_TEXT_KEYS = _TOWER_KEYS | {
    "vocab_size": "vocab_size",
    "context": "max_position_embeddings",
    "eos_token_id": "eos_token_id",
}


@dataclass(frozen=True)
class CLIPConfig:
    """Sizes of a CLIP model; the defaults are those of ViT-B/32.

    Args:
      vision: sizes of the image tower.
      text: sizes of the text tower.
      projection: features of the common embedding space.
      logit_scale: the initial logarithm of the factor on the cosines.
      remat: recompute each layer in the backward pass instead of storing it.
      dtype: of the computation, "float32" or "bfloat16". Parameters, attention maps,
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
        if self.projection < 1:
            raise ValueError(f"projection must be a positive integer, got {self.projection!r}")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> "CLIPConfig":
        """Read the content of a Hugging Face config.json; keys that it lacks have defaults.

        Raises:
          ValueError: a value that is out of range or that this model does not support.
        """
        vision, text = _section(config, "vision_config"), _section(config, "text_config")
        if vision.get("num_channels", 3) != 3:
            raise ValueError(f"{CONFIG}: num_channels must be 3, got {vision['num_channels']}")
        for key in ("image_size", "patch_size"):
            vision[key] = _one(vision.get(key, getattr(VisionConfig, key)), f"vision_config.{key}")
        text["eos_token_id"] = _one(
            text.get("eos_token_id", TextConfig.eos_token_id), "text_config.eos_token_id"
        )
        return cls(
            vision=VisionConfig(**_pick(vision, _VISION_KEYS)),
            text=TextConfig(**_pick(text, _TEXT_KEYS)),
            projection=config.get("projection_dim", cls.projection),
            logit_scale=float(config.get("logit_scale_init_value", cls.logit_scale)),
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


def _section(config: Mapping[str, Any], name: str) -> dict[str, Any]:
    # Configurations of 2021 have a second copy, `*_config_dict`, which wins in transformers.
    sections = (config.get(name) or {}, config.get(f"{name}_dict") or {})
    if not all(isinstance(section, dict) for section in sections):
        raise ValueError(f"{CONFIG}: {name} must be an object, got {config[name]!r}")
    return sections[0] | sections[1]


def _pick(section: Mapping[str, Any], keys: Mapping[str, str]) -> dict[str, Any]:
    return {ours: section[key] for ours, key in keys.items() if key in section}


def _one(value: Any, name: str) -> int:
    values = set(value) if isinstance(value, (list, tuple)) else {value}
    number = values.pop() if len(values) == 1 else None
    if not isinstance(number, int):
        raise ValueError(f"{CONFIG}: {name} must be one integer, got {value!r}")
    return number


# Which tokens are seen: whether each is, or the indices of those that are.
Kept = Bool[Array, "batch tokens"] | Int[Array, "batch kept"]


def kept_mask(keep: Kept | None) -> Mask | None:
    """The mask that hides tokens; None where all are seen, or the others are left out."""
    return None if keep is None or keep.dtype != bool else key_mask(keep)


class VisionTower(nnx.Module):
    """An image to a class token and patch tokens (Dosovitskiy et al. 2021).

    With a `projection` it also embeds them; None leaves those parameters out.
    """

    def __init__(
        self, config: VisionConfig, projection: int | None, dtype: jnp.dtype, *, rngs: nnx.Rngs
    ) -> None:
        width, normal = config.width, jax.random.normal
        self.patch_embedding = nnx.Conv(
            3,
            width,
            (config.patch_size, config.patch_size),
            strides=config.patch_size,
            padding="VALID",
            use_bias=False,
            dtype=dtype,
            rngs=rngs,
        )
        self.class_embedding = nnx.Param(width**-0.5 * normal(rngs.params(), (width,)))
        self.position_embedding = nnx.Param(
            width**-0.5 * normal(rngs.params(), (config.tokens, width))
        )
        self.pre_norm = layer_norm(width, eps=config.layer_norm_eps, dtype=dtype, rngs=rngs)
        self.transformer = _transformer(config, "vision", dtype, rngs)
        if projection is not None:
            self.post_norm = layer_norm(width, eps=config.layer_norm_eps, dtype=dtype, rngs=rngs)
            self.projection = _projection(width, projection, dtype, rngs)

    def __call__(
        self,
        image: Float[Array, "batch height width 3"],
        *,
        keep: Kept | None = None,
        remat: bool = False,
        return_attention: bool = False,
    ) -> tuple[
        Float[Array, "batch seen features"],
        Float[Array, "layers batch heads seen seen"] | None,
    ]:
        """Return all tokens before the last norm, and the attention maps (or None).

        Tokens that are not kept are hidden from all others in every layer, where `keep` says
        which are; indices leave the other tokens out, which gives the same tokens sooner.
        """
        patches = self.patch_embedding(image)
        patches = patches.reshape(patches.shape[0], -1, patches.shape[-1])
        patches = tag(patches, "vision/tokens")
        # As zeros of the patches' own, the class token is sharded over a mesh as they are.
        first = self.class_embedding[...].astype(patches.dtype) + jnp.zeros_like(patches[:, :1])
        x = jnp.concatenate([first, patches], axis=1)
        x = x + self.position_embedding[...].astype(x.dtype)
        mask = kept_mask(keep)
        if keep is not None and mask is None:
            x = jnp.take_along_axis(x, keep[..., None], axis=1)
        return self.transformer(
            self.pre_norm(x), mask, remat=remat, return_attention=return_attention
        )

    def embed(self, tokens: Float[Array, "batch tokens features"]) -> Float[Array, "batch embed"]:
        """Return the normalised embedding read from the class token."""
        return _normalise(self.projection(self.post_norm(tokens[:, 0])))


class TextTower(nnx.Module):
    """Token ids to text tokens, each of which sees those before it.

    With a `projection` it also embeds them; None leaves those parameters out.
    """

    def __init__(
        self, config: TextConfig, projection: int | None, dtype: jnp.dtype, *, rngs: nnx.Rngs
    ) -> None:
        width = config.width
        self.token_embedding = nnx.Embed(
            config.vocab_size,
            width,
            embedding_init=nnx.initializers.normal(0.02),
            dtype=dtype,
            rngs=rngs,
        )
        self.position_embedding = nnx.Param(
            0.01 * jax.random.normal(rngs.params(), (config.context, width))
        )
        self.transformer = _transformer(config, "text", dtype, rngs)
        if projection is not None:
            self.final_norm = layer_norm(width, eps=config.layer_norm_eps, dtype=dtype, rngs=rngs)
            self.projection = _projection(width, projection, dtype, rngs)

    def __call__(
        self,
        text: Int[Array, "batch tokens"],
        *,
        keep: Bool[Array, "batch tokens"] | None = None,
        remat: bool = False,
        return_attention: bool = False,
    ) -> tuple[
        Float[Array, "batch tokens features"],
        Float[Array, "layers batch heads tokens tokens"] | None,
    ]:
        """Return all tokens before the last norm, and the attention maps (or None).

        Tokens that are not kept are hidden from all others in every layer.
        """
        tokens = text.shape[-1]
        mask = causal_mask(tokens) if keep is None else causal_mask(tokens) & key_mask(keep)
        x = tag(look_up(self.token_embedding, text), "text/tokens")
        x = x + self.position_embedding[:tokens].astype(x.dtype)
        return self.transformer(x, mask, remat=remat, return_attention=return_attention)

    def step(
        self, token: Int[Array, " batch"], memory: Memory, position: Int[Array, ""]
    ) -> tuple[Float[Array, "batch 1 features"], Memory]:
        """Return one token before the last norm, and the memory with it; see `Transformer.step`."""
        x = look_up(self.token_embedding, token)[:, None]
        x = x + self.position_embedding[position].astype(x.dtype)
        return self.transformer.step(x, memory, position)

    def embed(
        self, tokens: Float[Array, "batch tokens features"], end: Int[Array, " batch"]
    ) -> Float[Array, "batch embed"]:
        """Return the normalised embedding read from the token at `end`."""
        read = jnp.take_along_axis(tokens, end[:, None, None], axis=1)[:, 0]
        return _normalise(self.projection(self.final_norm(read)))


def _transformer(
    config: VisionConfig | TextConfig, name: str, dtype: jnp.dtype, rngs: nnx.Rngs
) -> Transformer:
    return Transformer(
        config.width,
        config.layers,
        config.heads,
        config.mlp_width,
        activation=config.activation,
        eps=config.layer_norm_eps,
        dtype=dtype,
        name=name,
        rngs=rngs,
    )


def _projection(width: int, features: int, dtype: jnp.dtype, rngs: nnx.Rngs) -> nnx.Linear:
    init = nnx.initializers.normal(width**-0.5)
    return nnx.Linear(width, features, use_bias=False, kernel_init=init, dtype=dtype, rngs=rngs)


def _normalise(x: Float[Array, "batch embed"]) -> Float[Array, "batch embed"]:
    x = x.astype(jnp.float32)
    return x / jnp.linalg.norm(x, axis=-1, keepdims=True)


class CLIP(nnx.Module):
    """CLIP with both towers (Radford et al. 2021).

    `inputs` is always a dict {"image": float [batch, height, width, 3], normalised; "text": int
    [batch, tokens]}, as `prepare` makes it. The tags are "vision" and "text" (attention maps,
    [batch, heads, query, key] per layer) and, with these names in front, "/before" (the
    residual stream) and "/after" (the attention output that is added to it).

    Args:
      config: the sizes.
      rngs: for the initial parameters (stream "params").
      processor: tokenizer and image preprocessing for `prepare` and `tokens`.

    Raises:
      ValueError: the tokenizer has more tokens than the model.
    """

    def __init__(
        self, config: CLIPConfig, *, rngs: nnx.Rngs, processor: Processor | None = None
    ) -> None:
        dtype = jnp.dtype(config.dtype)
        self.config = config
        self.processor = processor or Processor()
        check_vocabulary(self.processor, config)
        self.vision = VisionTower(config.vision, config.projection, dtype, rngs=rngs)
        self.text = TextTower(config.text, config.projection, dtype, rngs=rngs)
        self.logit_scale = nnx.Param(jnp.asarray(config.logit_scale, jnp.float32))

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | os.PathLike,
        *,
        image_size: int | None = None,
        dtype: str | None = None,
        allow_pickle: bool = False,
    ) -> "CLIP":
        """Load a model and its tokenizer and image preprocessing.

        Args:
          name_or_folder: a bundled model, a local folder in the Hugging Face layout
            (config.json with model.safetensors or shards), or a hub name.
          image_size: another side of the square input, in pixels; the position embedding is
            interpolated (bicubic).
          dtype: of the computation, "float32" (default) or "bfloat16".
          allow_pickle: read a pickled checkpoint where there is nothing else; needs torch.

        Raises:
          FileNotFoundError: no such model, or a file is missing.
          OSError: the hub did not answer, or a file is truncated.
          ValueError: config.json or the weights are not those of a CLIP model, do not belong
            together, are pickled, or hold values that are not finite.
        """
        folder = find_folder(name_or_folder)
        config = CLIPConfig.from_dict(read_config(folder, MODEL_TYPE))
        config = replace(config, dtype=dtype or config.dtype)
        processor = Processor.from_folder(folder, image_size=image_size)
        check_vocabulary(processor, config)
        shapes = {path: value.shape for path, value in _parameters(_abstract(config, None))}
        tensors = read_tensors(folder, allow_pickle=allow_pickle)
        parameters = read_parameters(tensors, PARAMETERS, shapes)
        if image_size is not None:
            native = config.vision.grid
            config = replace(config, vision=replace(config.vision, image_size=image_size))
            where = ("vision", "position_embedding")
            parameters[where] = interpolate_positions(parameters[where], native, config.vision.grid)
        model = _abstract(config, processor)
        for path, variable in _parameters(model):
            variable.set_value(jnp.asarray(parameters[path]))
        return model

    def save_pretrained(self, folder: str | os.PathLike) -> None:
        """Write config.json, model.safetensors and the processor's files.

        The folder appears as a whole, or, when something fails, not at all.

        Args:
          folder: a new folder, or an older model folder, which is replaced.

        Raises:
          FileExistsError: the folder exists and is no model folder.
        """
        parameters = {path: np.asarray(value[...]) for path, value in _parameters(self)}
        with new_folder(folder) as draft:
            text = json.dumps(self.config.to_dict(), indent=2)
            (draft / CONFIG).write_text(text + "\n", encoding="utf-8")
            write_tensors(draft, parameters, PARAMETERS)
            self.processor.save(draft)

    @property
    def layout(self) -> Layout:
        """What the axes of the attention maps mean."""
        vision, text = self.config.vision, self.config.text
        return Layout(
            (
                Stream("vision", "image", vision.tokens, vision.grid),
                Stream("text", "text", text.context),
            )
        )

    def __call__(self, inputs: Inputs, *, return_attention: bool = False) -> Any:
        """Compare every image with every text.

        Args:
          inputs: images and texts, of batch sizes that may differ.
          return_attention: also return the attention maps.

        Returns:
          A dict: "logits_per_image" [images, texts], "image_embeds" and "text_embeds"
          (of length 1). With `return_attention`, a pair of it and {"vision": [layers, images,
          heads, query, key], "text": [layers, texts, heads, query, key]}.

        Raises:
          ValueError: an input is missing or has a wrong shape.
          TypeError: an input has a wrong dtype.
        """
        image, text = self._check(inputs)
        image, vision_maps = self._encode_image(image, return_attention)
        text, text_maps = self._encode_text(text, return_attention)
        output = {
            "logits_per_image": jnp.exp(self.logit_scale[...]) * image @ text.T,
            "image_embeds": image,
            "text_embeds": text,
        }
        if return_attention:
            return output, {"vision": vision_maps, "text": text_maps}
        return output

    def encode_image(
        self, image: Float[Array | np.ndarray, "batch height width 3"]
    ) -> Float[Array, "batch embed"]:
        """Return the embeddings of images, of length 1."""
        return self._encode_image(self._check_image(image), False)[0]

    def encode_text(
        self, text: Int[Array | np.ndarray, "batch tokens"]
    ) -> Float[Array, "batch embed"]:
        """Return the embeddings of texts, of length 1."""
        return self._encode_text(self._check_text(text), False)[0]

    def pairs(self, inputs: Inputs, target: Any = None) -> dict[str, Array]:
        """Bring inputs to one image and one text per row, which `score` compares.

        Args:
          inputs: images and texts.
          target: the index of the text for each image, or one for all. None: image i goes
            with text i, and one image (or text) goes with all texts (or images).

        Returns:
          Inputs with the same number of images and texts.

        Raises:
          ValueError: the numbers do not fit, or `target` is no index of a text.
        """
        image, text = self._check(inputs)
        if target is not None:
            target = jnp.atleast_1d(jnp.asarray(target))
            _check_target(target, len(text))
            text = text[target]
        if len(image) != len(text) and 1 not in (len(image), len(text)):
            raise ValueError(
                f"{len(image)} images and {len(text)} texts make no pairs: give as many "
                "images as texts, one image, one text, or target= the text's index for "
                "each image"
            )
        rows = max(len(image), len(text))
        image, text = (jnp.broadcast_to(x, (rows, *x.shape[1:])) for x in (image, text))
        return {"image": image, "text": text}

    def score(self, inputs: Inputs, target: Any = None) -> Float[Array, " batch"]:
        """Return the similarity of each pair: the scalar that explanations explain.

        Inputs are brought to pairs before the towers, so that each score depends on its own
        row of the attention maps only, and the gradient of the sum is each row's own.

        Args:
          inputs: images and texts.
          target: see `pairs`.

        Returns:
          `logits_per_image[i, target[i]]`, float32.

        Raises:
          ValueError: see `pairs`.
        """
        inputs = self.pairs(inputs, target)
        image, _ = self._encode_image(inputs["image"], False)
        text, _ = self._encode_text(inputs["text"], False)
        return jnp.exp(self.logit_scale[...]) * jnp.sum(image * text, axis=-1)

    def predict(self, inputs: Inputs) -> Float[Array, "images texts"]:
        """Return the probability of each text for each image, among the texts given."""
        return jax.nn.softmax(self(inputs)["logits_per_image"], axis=-1)

    def attention_gradients(
        self, inputs: Inputs, target: Any = None
    ) -> tuple[Float[Array, " batch"], dict[str, Array], dict[str, Array]]:
        """Return scores, attention maps and the scores' gradients by them, in one pass.

        Args:
          inputs: images and texts.
          target: see `pairs`.

        Returns:
          The scores, and two dicts {"vision": [layers, batch, heads, query, key], "text": ...}:
          maps and gradients, float32.
        """
        score = capture_with_grad(lambda inputs: self.score(inputs, target), ("vision", "text"))
        return score(inputs)

    def target_tokens(self, inputs: Inputs) -> dict[str, Int[Array, " batch"]]:
        """Return the index of the token each embedding is read from: CLS, and the end token."""
        image, text = self._check(inputs)
        return {
            "vision": jnp.zeros(len(image), jnp.int32),
            "text": end_of_text(text, self.config.text.eos_token_id),
        }

    def content(self, inputs: Inputs) -> dict[str, Bool[Array, "batch tokens"]]:
        """Return where the tokens are that stand for something: patches, and words."""
        image, text = self._check(inputs)
        patches = jnp.arange(self.config.vision.tokens) >= 1
        columns = jnp.arange(text.shape[1])
        end = end_of_text(text, self.config.text.eos_token_id)
        return {
            "vision": jnp.broadcast_to(patches, (len(image), len(patches))),
            "text": (columns >= 1) & (columns < end[:, None]),
        }

    def prepare(self, *, image: Any = None, text: Any = None) -> dict[str, Array]:
        """Make inputs from images and sentences, with the model's own preprocessing.

        Args:
          image: a PIL image, a uint8 [height, width, 3] array, or a list of them.
          text: a sentence or a list of sentences.

        Returns:
          Inputs: "image" float32 NHWC, "text" int32, padded to the context length.

        Raises:
          TypeError: not an image or not text.
          ValueError: no image, no or empty text, a text that is too long or of which the
            model knows no word, a tokenizer that is not this model's, or a model folder
            without tokenizer or preprocessing.

        Warns:
          UserWarning: the model does not know some of the words.
        """
        ids = self.processor.text(text, self.config.text.context)
        pixels = self.processor.image(image)
        self._check_ends(ids)
        inputs = {"image": jnp.asarray(pixels), "text": jnp.asarray(ids)}
        self._check(inputs)
        return inputs

    def tokens(self, inputs: Inputs) -> list[list[str]]:
        """Return one string per text token to display it.

        Args:
          inputs: as `prepare` returns them.

        Returns:
          Per text, as many strings as tokens: "##" in front continues the word before;
          "" stands for special and padding tokens.
        """
        return self.processor.tokens(np.asarray(inputs["text"]))

    def describe(self, inputs: Inputs) -> list[str]:
        """Return what each pair's score says of its image: the text, as the model reads it."""
        tokens = self.tokens(inputs)
        words = (" ".join(filter(None, row)).replace(" ##", "") for row in tokens)
        return list(words)

    def seen(self, image: Any) -> Any:
        """Return the part of an image that the model sees; `prepare` crops to the middle."""
        return self.processor.seen(image)

    def _encode_image(self, image: Array, return_attention: bool) -> tuple[Array, Array | None]:
        tokens, maps = self.vision(
            image, remat=self.config.remat, return_attention=return_attention
        )
        return self.vision.embed(tokens), maps

    def _encode_text(self, text: Array, return_attention: bool) -> tuple[Array, Array | None]:
        tokens, maps = self.text(text, remat=self.config.remat, return_attention=return_attention)
        return self.text.embed(tokens, end_of_text(text, self.config.text.eos_token_id)), maps

    def _check(self, inputs: Inputs) -> tuple[Array, Array]:
        missing = [name for name in ("image", "text") if name not in inputs]
        if missing:
            raise ValueError(
                f"inputs lack {' and '.join(missing)}; they hold {', '.join(inputs) or 'nothing'}. "
                "Make them with model.prepare(image=..., text=...)"
            )
        return self._check_image(inputs["image"]), self._check_text(inputs["text"])

    def _check_image(self, image: Any) -> Array:
        size = self.config.vision.image_size
        if image.ndim != 4 or image.shape[1:] != (size, size, 3):
            raise ValueError(
                f"image must have shape [batch, {size}, {size}, 3], got {list(image.shape)}; use "
                "model.prepare, or load the model with from_pretrained(..., image_size=...)"
            )
        if not jnp.issubdtype(image.dtype, jnp.floating):
            raise TypeError(
                f"image must be normalised floats, got {image.dtype}; use model.prepare"
            )
        return jnp.asarray(image)

    def _check_text(self, text: Any) -> Array:
        context = self.config.text.context
        if text.ndim != 2 or not 1 <= text.shape[1] <= context:
            raise ValueError(
                f"text must be token ids of shape [batch, tokens] with at most {context} tokens, "
                f"got {list(text.shape)}; use model.prepare"
            )
        if not jnp.issubdtype(text.dtype, jnp.integer):
            raise TypeError(f"text must be integer token ids, got {text.dtype}; use model.prepare")
        return jnp.asarray(text)

    def _check_ends(self, ids: np.ndarray) -> None:
        eos = self.config.text.eos_token_id
        found = self.processor.tokenizer.eos_token_id
        last = np.asarray(end_of_text(ids, eos))
        if any(row[index] != found for row, index in zip(ids, last, strict=True)):
            raise ValueError(
                f"the tokenizer ends a text with the id {found}, and the model reads its text "
                f"embedding at the id {eos}: this is the tokenizer of another model"
            )


def end_of_text(
    text: Int[Array | np.ndarray, "batch tokens"], eos_token_id: int
) -> Int[Array, " batch"]:
    """Return the position of each text's end token.

    Args:
      text: token ids.
      eos_token_id: the end token; its first occurrence counts, since padding may use it too.
        2 stands in old Hugging Face configurations for "the highest id" of each text.
    """
    text = jnp.asarray(text)
    return jnp.argmax(text if eos_token_id == 2 else text == eos_token_id, axis=-1)


def interpolate_positions(
    positions: Float[np.ndarray, "tokens width"],
    grid: tuple[int, int],
    new_grid: tuple[int, int],
) -> Float[np.ndarray, "new_tokens width"]:
    """Interpolate a position embedding to another grid of patches.

    Bicubic convolution with a = -0.75 (Keys 1981) at cell centres with the border repeated,
    as transformers' `interpolate_pos_encoding` does.

    Args:
      positions: of the class token and the patches, row by row.
      grid: (rows, columns) of the patches.
      new_grid: (rows, columns) wanted.
    """
    patches = positions[1:].reshape(*grid, -1)
    rows, columns = (_bicubic(old, new) for old, new in zip(grid, new_grid, strict=True))
    patches = np.einsum("ir,jc,rcw->ijw", rows, columns, patches)
    patches = patches.reshape(-1, positions.shape[-1]).astype(positions.dtype)
    return np.concatenate([positions[:1], patches])


def _bicubic(old: int, new: int, a: float = -0.75) -> np.ndarray:
    """The [new, old] matrix that interpolates a row of `old` cells to `new` cells."""
    centre = (np.arange(new) + 0.5) * old / new - 0.5
    taps = np.floor(centre)[:, None] + np.arange(-1, 3)
    d = np.abs(centre[:, None] - taps)
    near = ((a + 2) * d - (a + 3)) * d**2 + 1
    far = a * (((d - 5) * d + 8) * d - 4)
    matrix = np.zeros((new, old))
    cells = np.clip(taps, 0, old - 1).astype(int)
    np.add.at(matrix, (np.arange(new)[:, None], cells), np.where(d <= 1, near, far))
    return matrix


def check_vocabulary(processor: Processor, config: CLIPConfig) -> None:
    """Raise ValueError if the tokenizer has more tokens than the model."""
    tokenizer = processor.tokenizer
    if tokenizer is not None and len(tokenizer) > config.text.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens and the model {config.text.vocab_size}: "
            "this is the tokenizer of another model"
        )


def _check_target(target: Array, texts: int) -> None:
    if not jnp.issubdtype(target.dtype, jnp.integer) or target.ndim != 1:
        raise ValueError(
            f"target must be the text's index, one or one per image, got {target.dtype} of "
            f"shape {list(target.shape)}"
        )
    # A traced index cannot be looked at; out of range it would be clamped by XLA.
    if not isinstance(target, jax.core.Tracer):
        wrong = [int(i) for i in target if not 0 <= i < texts]
        if wrong:
            raise ValueError(f"target {wrong[0]} names no text: there are {texts}, 0..{texts - 1}")


def _abstract(config: CLIPConfig, processor: Processor | None) -> CLIP:
    """A model with shapes in the place of parameters."""
    return nnx.eval_shape(lambda: CLIP(config, rngs=nnx.Rngs(0), processor=processor))


def _parameters(model: CLIP) -> list[tuple[Any, nnx.Variable]]:
    return [(path, variable) for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))]


def _tower_parameters(ours: str, theirs: str) -> list[Parameter]:
    layer = f"{theirs}.encoder.layers.{{layer}}"
    block = (ours, "transformer", "blocks")
    linears = {
        ("attention", "query"): "self_attn.q_proj",
        ("attention", "key"): "self_attn.k_proj",
        ("attention", "value"): "self_attn.v_proj",
        ("attention", "out"): "self_attn.out_proj",
        ("expand",): "mlp.fc1",
        ("contract",): "mlp.fc2",
    }
    norms = {("norm1",): "layer_norm1", ("norm2",): "layer_norm2"}
    return [
        *(_kernel((*block, *path), f"{layer}.{name}") for path, name in linears.items()),
        *(_bias((*block, *path), f"{layer}.{name}") for path, name in (linears | norms).items()),
        *(_scale((*block, *path), f"{layer}.{name}") for path, name in norms.items()),
    ]


def _kernel(path: tuple[str, ...], name: str) -> Parameter:
    return Parameter((*path, "kernel"), f"{name}.weight", axes=(1, 0))


def _bias(path: tuple[str, ...], name: str) -> Parameter:
    return Parameter((*path, "bias"), f"{name}.bias")


def _scale(path: tuple[str, ...], name: str) -> Parameter:
    return Parameter((*path, "scale"), f"{name}.weight")


def _norm(path: tuple[str, ...], name: str) -> list[Parameter]:
    return [_scale(path, name), _bias(path, name)]


# The tensor names of the Hugging Face CLIPModel ("pre_layrnorm" is spelled so there).
PARAMETERS = (
    Parameter(("logit_scale",), "logit_scale"),
    Parameter(("vision", "class_embedding"), "vision_model.embeddings.class_embedding"),
    Parameter(
        ("vision", "patch_embedding", "kernel"),
        "vision_model.embeddings.patch_embedding.weight",
        axes=(2, 3, 1, 0),
    ),
    Parameter(
        ("vision", "position_embedding"), "vision_model.embeddings.position_embedding.weight"
    ),
    *_norm(("vision", "pre_norm"), "vision_model.pre_layrnorm"),
    *_tower_parameters("vision", "vision_model"),
    *_norm(("vision", "post_norm"), "vision_model.post_layernorm"),
    _kernel(("vision", "projection"), "visual_projection"),
    Parameter(
        ("text", "token_embedding", "embedding"), "text_model.embeddings.token_embedding.weight"
    ),
    Parameter(("text", "position_embedding"), "text_model.embeddings.position_embedding.weight"),
    *_tower_parameters("text", "text_model"),
    *_norm(("text", "final_norm"), "text_model.final_layer_norm"),
    _kernel(("text", "projection"), "text_projection"),
)
