"""The DINO model: features of images, learnt without labels."""

import operator
import os
from dataclasses import replace
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrel import capture_with_grad, tag
from jaxrel.models.base import Model, empty
from jaxrel.models.checkpoint import (
    Parameter,
    fill,
    find_folder,
    read_any_config,
    read_parameters,
    read_tensors,
    save_model,
    shapes_of,
)
from jaxrel.models.dino.config import DINOV3, REGISTERS, DINOConfig
from jaxrel.models.inputs import Inputs, check_floats, check_held
from jaxrel.models.layout import Layout, Stream
from jaxrel.models.patches import ImageSize, interpolate_positions, rotary
from jaxrel.models.processor import Processor
from jaxrel.models.tables import bias, convolution, fused, kernel, layers, linear, norm
from jaxrel.models.transformer import Transformer, layer_norm, read_at

_INPUTS = ("query", "key", "value")


class DINO(Model):
    """A ViT of DINOv2 (Oquab et al. 2023), with registers or not, or of DINOv3.

    It has no classes and no texts. What is explained is a feature of the class token after the
    last norm, such as a classifier on top of it reads: by default the feature that is largest for
    the image.

    `inputs` is a dict {"image": float [batch, height, width, 3], normalised}, as `prepare` makes
    it, and for explanations "feature" int [batch]. The tags are "vision" (attention maps) and,
    with this name in front, "/tokens" (embedded patches), "/before" and "/after", as in `CLIP`.

    Args:
      config: the sizes.
      rngs: keys for the initial parameters (stream "params").
      processor: image preprocessing for `prepare`.
    """

    def __init__(
        self, config: DINOConfig, *, rngs: nnx.Rngs, processor: Processor | None = None
    ) -> None:
        dtype, width = jnp.dtype(config.dtype), config.width
        self.config = config
        self.processor = processor or Processor()

        def normal(tokens: int) -> nnx.Param:
            return nnx.Param(0.02 * jax.random.normal(rngs.params(), (1, tokens, width)))

        size = (config.patch_size, config.patch_size)
        self.patch_embedding = nnx.Conv(
            3, width, size, strides=size, padding="VALID", dtype=dtype, rngs=rngs
        )
        self.class_embedding = normal(1)
        # Stands for hidden patches in training; kept so that a saved model is whole.
        self.mask_embedding = nnx.Param(jnp.zeros((1, 1, width) if config.rotates else (1, width)))
        if config.registers:
            self.registers = normal(config.registers)
        if not config.rotates:
            self.position_embedding = normal(1 + config.patches)
        self.transformer = Transformer(
            config, "vision", variant=config.variant, dtype=dtype, rngs=rngs
        )
        self.norm = layer_norm(width, eps=config.layer_norm_eps, dtype=dtype, rngs=rngs)

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | os.PathLike,
        *,
        image_size: ImageSize | None = None,
        dtype: str | None = None,
        allow_pickle: bool = False,
    ) -> "DINO":
        """Load a model and its image preprocessing.

        Args:
          name_or_folder: a local folder in the Hugging Face layout (config.json of model_type
            "dinov2", "dinov2_with_registers" or "dinov3_vit", with model.safetensors or shards),
            or a hub name.
          image_size: of the input, pixels of a side or (height, width); by default what the
            folder's preprocessing makes, which of DINOv2 is smaller than the image size of
            config.json. Positions are interpolated to it, as transformers does.
          dtype, allow_pickle: as in `CLIP.from_pretrained`.

        Raises:
          FileNotFoundError, OSError: see `CLIP.from_pretrained`.
          ValueError: config.json or the weights are not those of such a model; others as
            `CLIP.from_pretrained`.
        """
        folder = find_folder(name_or_folder)
        config = DINOConfig.from_dict(read_any_config(folder))
        config = replace(config, dtype=dtype or config.dtype)
        processor = Processor.from_folder(folder, image_size=image_size)
        tensors = read_tensors(folder, allow_pickle=allow_pickle)
        model = empty(cls, config, processor)
        parameters = read_parameters(tensors, parameter_table(config), shapes_of(model))
        if image_size is None and processor.images is not None:
            image_size = processor.images.sides
        if image_size is not None:
            native = config.grid
            config = replace(config, image_size=image_size)
            model = empty(cls, config, processor)
            where = ("position_embedding",)
            if where in parameters and config.grid != native:
                parameters[where] = interpolate_positions(
                    parameters[where], native, config.grid, antialias=config.kind == REGISTERS
                )
        fill(model, parameters)
        return model

    @property
    def layout(self) -> Layout:
        """What the axes of the attention maps mean."""
        config = self.config
        return Layout((Stream("vision", "image", config.tokens, config.grid, config.prefix),))

    def __call__(self, inputs: Inputs, *, return_attention: bool = False) -> Any:
        """Return the features of images.

        Args:
          inputs: images.
          return_attention: also return the attention maps.

        Returns:
          A dict: "last_hidden_state" [batch, tokens, width], all tokens after the last norm (the
          class token, registers, patches row by row), and "pooler_output" [batch, width], the
          class token. With `return_attention`, a pair of it and {"vision": [layers, batch, heads,
          query, key]}.

        Raises:
          ValueError: the image is missing or has a wrong shape.
          TypeError: the image has a wrong dtype.
        """
        image = self._check(inputs)
        patches = self.patch_embedding(image)
        patches = patches.reshape(patches.shape[0], -1, patches.shape[-1])
        x, maps = self.transformer(
            self._embed(tag(patches, "vision/tokens")),
            rotate=self._rotation(),
            remat=self.config.remat,
            return_attention=return_attention,
        )
        x = self.norm(x).astype(jnp.float32)
        output = {"last_hidden_state": x, "pooler_output": x[:, 0]}
        return (output, {"vision": maps}) if return_attention else output

    def score(self, inputs: Inputs, target: Any = None) -> Float[Array, " batch"]:
        """Return a feature of each image's class token: the scalar that explanations explain.

        Args:
          inputs: images; "feature" int [batch], if there, is the target.
          target: the feature's index, one or one per image; None: that of the inputs, or else
            the largest.
        """
        target = inputs.get("feature") if target is None else target
        features = self(inputs)["pooler_output"]
        # An index has no gradient: the choice of the feature is not explained, its value is.
        chosen = features.argmax(-1) if target is None else jnp.asarray(target)
        return read_at(features, chosen)

    def predict(self, inputs: Inputs) -> Float[Array, "batch width"]:
        """Return the class tokens' features."""
        return self(inputs)["pooler_output"]

    def pairs(self, inputs: Inputs, target: Any = None) -> dict[str, Array]:
        """Bring inputs to one image and one feature per row.

        Args:
          inputs: images.
          target: the index of the feature to explain, one or one per image; by default the
            largest of each.

        Raises:
          ValueError: the numbers do not fit, or there is no such feature.
        """
        image = self._check(inputs)
        if target is None:
            feature = _predict(self, {"image": image}).argmax(-1)
        else:
            feature = jnp.asarray(self._features(target, len(image)))
        return {"image": image, "feature": feature.astype(jnp.int32)}

    def _features(self, target: Any, rows: int) -> list[int]:
        chosen = [target] if np.ndim(target) == 0 else list(target)
        for one in chosen:
            if not hasattr(one, "__index__") or operator.index(one) not in range(self.config.width):
                raise ValueError(
                    f"target must be the index of a feature, 0 to {self.config.width - 1}, or one "
                    f"per image, got {one!r:.80}"
                )
        if len(chosen) not in (1, rows):
            raise ValueError(f"{len(chosen)} features for {rows} images; give one for each")
        return [operator.index(one) for one in chosen] * (rows if len(chosen) == 1 else 1)

    def attention_gradients(
        self, inputs: Inputs, target: Any = None
    ) -> tuple[Float[Array, " batch"], dict[str, Array], dict[str, Array]]:
        """Return scores, attention maps and the scores' gradients by them, in one pass.

        Args:
          inputs: images.
          target: see `score`.

        Returns:
          The scores, and two dicts {"vision": [layers, batch, heads, query, key]}: maps and
          gradients, float32.
        """
        return capture_with_grad(lambda inputs: self.score(inputs, target), "vision")(inputs)

    def target_tokens(self, inputs: Inputs) -> dict[str, Int[Array, " batch"]]:
        """Return the index of the token that is read, the class token."""
        return {"vision": jnp.zeros(len(self._check(inputs)), jnp.int32)}

    def content(self, inputs: Inputs) -> dict[str, Bool[Array, "batch tokens"]]:
        """Return where the tokens are that stand for something: the patches."""
        shape = (len(self._check(inputs)), self.config.tokens)
        return {"vision": jnp.broadcast_to(jnp.arange(shape[1]) >= self.config.prefix, shape)}

    def prepare(self, *, image: Any = None, text: Any = None) -> dict[str, Array]:
        """Make inputs from images, with the model's own preprocessing.

        Args:
          image: a PIL image, a uint8 [height, width, 3] array, or a list of them.
          text: None; there is no text tower.

        Raises:
          TypeError: not an image.
          ValueError: no image, a text, or a model folder without preprocessing.
        """
        if text is not None:
            raise ValueError(
                "this model reads no text: leave text= out; target= is the index of a feature"
            )
        return {"image": jnp.asarray(self.processor.image(image, side=self.config.sides))}

    def tokens(self, inputs: Inputs) -> list[list[str]]:
        """Return nothing: there is no text to display."""
        del inputs
        return []

    def describe(self, inputs: Inputs) -> list[str]:
        """Return each row's feature."""
        return [f"feature {index}" for index in np.asarray(inputs["feature"]).tolist()]

    def save_pretrained(self, folder: str | os.PathLike, *, dtype: str = "float32") -> None:
        """Write config.json, model.safetensors and the processor's files; see `Model`."""
        save_model(self, folder, parameter_table(self.config), dtype=dtype)

    def _embed(self, patches: Array) -> Array:
        """The patches with the tokens before them and, if they are embedded, their positions."""
        # As zeros of the patches' own, these tokens are sharded over a mesh as they are.
        zeros = jnp.zeros_like(patches[:, :1])
        first = self.class_embedding[...].astype(patches.dtype) + zeros
        if not self.config.rotates:
            positions = self.position_embedding[...].astype(patches.dtype)
            first, patches = first + positions[:, :1], patches + positions[:, 1:]
        parts = [first, patches]
        if self.config.registers:
            parts.insert(1, self.registers[...].astype(patches.dtype) + zeros)
        return jnp.concatenate(parts, axis=1)

    def _rotation(self) -> Any:
        config = self.config
        if not config.rotates:
            return None
        return rotary(config.grid, config.width // config.heads, config.rope_theta)

    def _check(self, inputs: Inputs) -> Array:
        check_held(inputs, "image")
        advice = "use model.prepare, or load the model with from_pretrained(..., image_size=...)"
        check_floats("image", inputs["image"], (*self.config.sides, 3), advice=advice)
        return jnp.asarray(inputs["image"])


@jax.jit
def _predict(model: DINO, inputs: Any) -> Array:
    return model.predict(inputs)


def parameter_table(config: DINOConfig) -> list[Parameter]:
    """Return where each parameter is in the published files, as transformers names them."""
    v3 = config.kind == DINOV3
    patches = "embeddings.patch_embeddings" + ("" if v3 else ".projection")
    table = [
        Parameter(("class_embedding",), "embeddings.cls_token"),
        Parameter(("mask_embedding",), "embeddings.mask_token"),
        convolution(("patch_embedding",), patches),
        bias(("patch_embedding",), patches),
        *_layers(config),
        *norm(("norm",), "norm" if v3 else "layernorm"),
    ]
    if config.registers:
        table.append(Parameter(("registers",), "embeddings.register_tokens"))
    if not v3:
        table.append(Parameter(("position_embedding",), "embeddings.position_embeddings"))
    return table


def _layers(config: DINOConfig) -> list[Parameter]:
    block = ("transformer", "blocks")
    scales = {("scale1",): "layer_scale1.lambda1", ("scale2",): "layer_scale2.lambda1"}
    norms: dict[tuple[str, ...], str] = {("norm1",): "norm1", ("norm2",): "norm2"}
    prefix = "layer.{layer}." if config.kind == DINOV3 else "encoder.layer.{layer}."
    linears: dict[tuple[str, ...], str]
    if config.kind == DINOV3:
        linears = {
            ("attention", "out"): "attention.o_proj",
            ("expand",): "mlp.up_proj",
            ("contract",): "mlp.down_proj",
        }
        inputs = {name: f"attention.{name[0]}_proj" for name in _INPUTS}
        if config.gated:
            linears["gate",] = "mlp.gate_proj"
    else:
        linears = {("attention", "out"): "attention.output.dense"}
        inputs = {name: f"attention.attention.{name}" for name in _INPUTS}
        linears["contract",] = "mlp.weights_out" if config.gated else "mlp.fc2"
        if not config.gated:
            linears["expand",] = "mlp.fc1"
    table = layers(block, linears, norms, prefix)
    table += [Parameter((*block, *path), prefix + name) for path, name in scales.items()]
    if config.gated and config.kind != DINOV3:
        table += fused([(*block, "gate"), (*block, "expand")], f"{prefix}mlp.weights_in")
    for (name, theirs), has_bias in zip(inputs.items(), config.biases, strict=True):
        path = (*block, "attention", name)
        table += (linear if has_bias else _without_bias)(path, prefix + theirs)
    return table


def _without_bias(path: tuple[str, ...], name: str) -> list[Parameter]:
    return [kernel(path, name)]
