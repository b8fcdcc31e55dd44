"""The CLIP model: similarities of images and texts (Radford et al. 2021)."""

import os
from dataclasses import replace
from typing import Any

import jax
from flax import nnx
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrel.models.checkpoint import find_folder, read_config, read_tensors
from jaxrel.models.clip import open_clip
from jaxrel.models.clip.config import MODEL_TYPE, CLIPConfig
from jaxrel.models.clip.hugging_face import PARAMETERS
from jaxrel.models.clip.resnet import FEATURES, CLIPResNetConfig, ResNetTower
from jaxrel.models.clip.tokens import content, end_of_text, token_ids
from jaxrel.models.clip.towers import TextTower, VisionTower, normalise
from jaxrel.models.contrastive import Contrastive, Maps, load
from jaxrel.models.familiarity import read_familiarity
from jaxrel.models.inputs import Inputs, words_before
from jaxrel.models.layout import Layout, Stream
from jaxrel.models.patches import ImageSize
from jaxrel.models.processor import Processor


class CLIP(Contrastive):
    """CLIP with both towers (Radford et al. 2021).

    `inputs` is always a dict {"image": float [batch, height, width, 3], normalised; "text": int
    [batch, tokens]}, as `prepare` makes it. The tags are "vision" and "text" (attention maps,
    [batch, heads, query, key] per layer) and, with these names in front, "/before" (the
    residual stream) and "/after" (the attention output that is added to it).

    Args:
      config: the sizes.
      rngs: keys for the initial parameters (stream "params").
      processor: tokenizer and image preprocessing for `prepare` and `tokens`.

    Raises:
      ValueError: the tokenizer has more tokens than the model.
    """

    parameter_table = PARAMETERS
    vision: Any  # of a subclass another tower

    def __init__(
        self, config: CLIPConfig, *, rngs: nnx.Rngs, processor: Processor | None = None
    ) -> None:
        dtype = jnp.dtype(config.dtype)
        self.config = config
        self.processor = processor or Processor()
        self.processor.check_vocabulary(config.text.vocab_size)
        self.vision = VisionTower(config.vision, config.projection, dtype, rngs=rngs)
        self.text = TextTower(config.text, config.projection, dtype, rngs=rngs)
        self.logit_scale = nnx.Param(jnp.asarray(config.logit_scale, jnp.float32))

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | os.PathLike,
        *,
        image_size: ImageSize | None = None,
        dtype: str | None = None,
        allow_pickle: bool = False,
    ) -> "CLIP":
        """Load a model and its tokenizer and image preprocessing.

        Args:
          name_or_folder: a bundled model, a local folder, or a hub name: in the Hugging Face
            layout (config.json with model.safetensors or shards), or in that of OpenCLIP
            (open_clip_config.json with open_clip_model.safetensors), of which it reads ViTs and
            OpenAI's ResNets (as a `CLIPResNet`) with a causal text tower.
          image_size: another side of the square input, in pixels, or (height, width), to which
            images are then resized without keeping their aspect; the position embedding is
            interpolated (bicubic, as the library whose layout it is does).
          dtype: dtype of the computation, "float32" (default) or "bfloat16".
          allow_pickle: read a pickled checkpoint where there is nothing else; needs torch.

        Raises:
          FileNotFoundError: no such model, or a file is missing.
          OSError: the hub did not answer, or a file is truncated.
          ValueError: config.json or the weights are not those of a CLIP model, do not belong
            together, are pickled, or hold values that are not finite; a model of OpenCLIP that is
            of another kind, with the field that says so.
        """
        folder = find_folder(name_or_folder)
        options: dict[str, Any] = {"image_size": image_size}
        if open_clip.is_one(folder):
            config, processor, more = open_clip.read(folder, image_size, allow_pickle=allow_pickle)
            options |= more
        else:
            config = CLIPConfig.from_dict(read_config(folder, MODEL_TYPE))
            processor = Processor.from_folder(folder, image_size=image_size)
            tensors = read_tensors(folder, allow_pickle=allow_pickle)
            options |= {"tensors": tensors, "table": PARAMETERS}
        config = replace(config, dtype=dtype or config.dtype)
        resnet = isinstance(config, CLIPResNetConfig)
        kind = CLIPResNet if resnet and cls is CLIP else cls
        if resnet != issubclass(kind, CLIPResNet):
            tower = "ResNet" if resnet else "ViT"
            raise ValueError(
                f"{folder} holds a CLIP with a {tower}, and this class, {cls.__name__}, has "
                "another image tower; load it with CLIP.from_pretrained"
            )
        model = load(kind, config, processor=processor, **options)
        model.familiar = read_familiarity(folder) if image_size is None else None
        return model

    @property
    def layout(self) -> Layout:
        """What the axes of the attention maps mean."""
        vision, text = self.config.vision, self.config.text
        return Layout(
            (
                Stream("vision", "image", vision.tokens, vision.grid),
                Stream("text", "text", text.context),
            ),
            target="text",
        )

    def layer_scores(self, inputs: Inputs) -> Float[Array, " batch"]:
        """Return the sum over all layers of both towers of the score of each layer's own tokens.

        It is what LeGrad differentiates (Bousselham et al. 2025): the similarity of the mean token
        after a layer, embedded as the last layer's are, with the embedding of the pair's other
        part. A gradient goes through a layer's own score alone. For texts, of which the paper does
        not speak, the mean is over the tokens up to the end.

        Args:
          inputs: pairs, as `pairs` returns them.
        """
        image, text = self._check(inputs)
        end = end_of_text(text, self.config.text.eos_token_id)
        remat = self.config.remat
        of_image, image_layers = self.vision.each_layer(image, remat=remat)
        of_text, text_layers = self.text.each_layer(text, end, remat=remat)
        of_image, of_text = jax.lax.stop_gradient((of_image, of_text))
        of_layers = self._similarity(image_layers, of_text, inputs.get("against"))
        of_words = self._similarity(text_layers, of_image, None)
        return of_layers.sum(axis=0) + of_words.sum(axis=0)

    def target_tokens(self, inputs: Inputs) -> dict[str, Int[Array, " batch"]]:
        """Return the index of the token each embedding is read from: class and end token."""
        image, text = self._check(inputs)
        return {
            "vision": jnp.zeros(len(image), jnp.int32),
            "text": end_of_text(text, self.config.text.eos_token_id),
        }

    def content(self, inputs: Inputs) -> dict[str, Bool[Array, "batch tokens"]]:
        """Return where the tokens are that stand for something: patches, and words."""
        image, text = self._check(inputs)
        return content(self.config, image, text)

    def _read_text(self, text: Any) -> tuple[Array, Any]:
        ids = token_ids(self.processor, text, self.config.text)
        return ids, self.processor.spelling(text, self.config.text.context)

    def _embed_image(self, image: Array, return_attention: bool) -> tuple[Array, Maps]:
        tokens, maps = self.vision(
            image, remat=self.config.remat, return_attention=return_attention
        )
        return self.vision.embed(tokens), {"vision": maps}

    def _embed_text(self, text: Array, return_attention: bool) -> tuple[Array, Maps]:
        tokens, maps = self.text(text, remat=self.config.remat, return_attention=return_attention)
        end = end_of_text(text, self.config.text.eos_token_id)
        return self.text.embed(tokens, end), {"text": maps}

    def _logit(self, cosine: Array) -> Array:
        return jnp.exp(self.logit_scale[...]) * cosine


class CLIPResNet(CLIP):
    """CLIP with a ResNet as its image tower, as `CLIP.from_pretrained` reads it from OpenCLIP.

    There is no attention over an image's tokens: `jaxrel.explain` explains it by LRP and gradients
    in pixels, and by Grad-CAM of the last features. `inputs` and tags of the text are those of
    `CLIP`; see `ResNetTower` for those of the image.

    Args:
      config: the sizes.
      rngs: keys for the initial parameters (stream "params").
      processor: tokenizer and image preprocessing for `prepare` and `tokens`.

    Raises:
      ValueError: the tokenizer has more tokens than the model.
    """

    def __init__(
        self, config: CLIPResNetConfig, *, rngs: nnx.Rngs, processor: Processor | None = None
    ) -> None:
        dtype = jnp.dtype(config.dtype)
        self.config = config
        self.processor = processor or Processor()
        self.processor.check_vocabulary(config.text.vocab_size)
        self.vision = ResNetTower(config.vision, config.projection, dtype, rngs=rngs)
        self.text = TextTower(config.text, config.projection, dtype, rngs=rngs)
        self.logit_scale = nnx.Param(jnp.asarray(2.6592, jnp.float32))

    @property
    def layout(self) -> Layout:
        """What the axes of the relevance mean: pixels, and text tokens."""
        height, width = self.config.vision.sides
        pixels = Stream("vision", "image", height * width, (height, width), 0, features=FEATURES)
        return Layout((pixels, Stream("text", "text", self.config.text.context)), target="text")

    def target_tokens(self, inputs: Inputs) -> dict[str, Int[Array, " batch"]]:
        """Return the index of the token that the text's embedding is read from, its end."""
        _, text = self._check(inputs)
        return {"text": end_of_text(text, self.config.text.eos_token_id)}

    def content(self, inputs: Inputs) -> dict[str, Bool[Array, "batch tokens"]]:
        """Return where the tokens are that stand for something: all pixels, and words."""
        image, text = self._check(inputs)
        height, width = self.config.vision.sides
        end = end_of_text(text, self.config.text.eos_token_id)
        pixels = jnp.ones((len(image), height * width), bool)
        return {"vision": pixels, "text": words_before(text, end)}

    def save_pretrained(self, folder: str | os.PathLike, *, dtype: str = "float32") -> None:
        """Raise NotImplementedError: the Hugging Face layout has no such model."""
        del dtype
        raise NotImplementedError(
            f"{folder}: a CLIP with a ResNet cannot be saved, since the Hugging Face layout has no "
            "such model; keep the folder of OpenCLIP that it was loaded from"
        )

    def _embed_image(self, image: Array, return_attention: bool) -> tuple[Array, Maps]:
        pooled, maps = self.vision(image)
        return normalise(pooled), {"vision/pooling": maps}
