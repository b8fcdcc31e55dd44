"""The SigLIP model: whether an image and a text go together (Zhai et al. 2023)."""

import os
from dataclasses import replace
from typing import Any

import jax
from flax import nnx
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrel.models.checkpoint import Parameter, find_folder, read_config, read_tensors
from jaxrel.models.clip.hugging_face import tower_parameters
from jaxrel.models.clip.towers import TextTower, normalise
from jaxrel.models.contrastive import Contrastive, Maps, load
from jaxrel.models.inputs import Inputs
from jaxrel.models.layout import Layout, Stream
from jaxrel.models.patches import ImageSize
from jaxrel.models.processor import Processor
from jaxrel.models.siglip.config import MODEL_TYPE, SigLIPConfig
from jaxrel.models.siglip.towers import SigLIPVisionTower
from jaxrel.models.tables import bias, convolution, fused, linear, norm

_HEAD = "vision_model.head"
_POOLING = ("vision", "pooling")
# The tensor names of the Hugging Face SiglipModel.
PARAMETERS = (
    Parameter(("logit_scale",), "logit_scale"),
    Parameter(("logit_bias",), "logit_bias"),
    convolution(("vision", "patch_embedding"), "vision_model.embeddings.patch_embedding"),
    bias(("vision", "patch_embedding"), "vision_model.embeddings.patch_embedding"),
    Parameter(
        ("vision", "position_embedding"), "vision_model.embeddings.position_embedding.weight"
    ),
    *tower_parameters("vision", "vision_model"),
    *norm(("vision", "post_norm"), "vision_model.post_layernorm"),
    Parameter((*_POOLING, "probe"), f"{_HEAD}.probe"),
    *fused(
        [(*_POOLING, "attention", name) for name in ("query", "key", "value")],
        f"{_HEAD}.attention.in_proj",
        "_",
    ),
    *linear((*_POOLING, "attention", "out"), f"{_HEAD}.attention.out_proj"),
    *norm((*_POOLING, "norm"), f"{_HEAD}.layernorm"),
    *linear((*_POOLING, "expand"), f"{_HEAD}.mlp.fc1"),
    *linear((*_POOLING, "contract"), f"{_HEAD}.mlp.fc2"),
    Parameter(
        ("text", "token_embedding", "embedding"), "text_model.embeddings.token_embedding.weight"
    ),
    Parameter(("text", "position_embedding"), "text_model.embeddings.position_embedding.weight"),
    *tower_parameters("text", "text_model"),
    *norm(("text", "final_norm"), "text_model.final_layer_norm"),
    *linear(("text", "projection"), "text_model.head"),
)


class SigLIP(Contrastive):
    """SigLIP with both towers (Zhai et al. 2023), and SigLIP 2 of fixed image sizes.

    Its score is a logit of its own for each pair, exp(logit_scale) cosine + logit_bias; the
    sigmoid of it is the probability that image and text go together. `inputs` are those of `CLIP`,
    but every text is padded to the context: the text tower sees all tokens, padding too, and its
    embedding is read at the last.

    The tags are those of `CLIP`, and "vision/pooling": the map of the attention that pools the
    patches, [batch, heads, 1, tokens]. There is no class token; relevance accumulates over the
    layers and is read through the pooling map (`jaxrel.attention.pooling`).

    Args:
      config: the sizes.
      rngs: keys for the initial parameters (stream "params").
      processor: tokenizer and image preprocessing for `prepare` and `tokens`.

    Raises:
      ValueError: the tokenizer has more tokens than the model.
    """

    parameter_table = PARAMETERS

    def __init__(
        self, config: SigLIPConfig, *, rngs: nnx.Rngs, processor: Processor | None = None
    ) -> None:
        dtype = jnp.dtype(config.dtype)
        self.config = config
        self.processor = processor or Processor()
        self.processor.check_vocabulary(config.text.vocab_size)
        self.vision = SigLIPVisionTower(config.vision, dtype, rngs=rngs)
        self.text = TextTower(
            config.text, config.vision.width, dtype, causal=False, use_bias=True, rngs=rngs
        )
        # The initial values of the paper, section 3.2.
        self.logit_scale = nnx.Param(jnp.log(jnp.full(1, 10.0)))
        self.logit_bias = nnx.Param(jnp.full(1, -10.0))

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | os.PathLike,
        *,
        image_size: ImageSize | None = None,
        dtype: str | None = None,
        allow_pickle: bool = False,
    ) -> "SigLIP":
        """Load a model and its tokenizer and image preprocessing.

        Args:
          name_or_folder: a local folder in the Hugging Face layout (config.json with
            model.safetensors or shards, and tokenizer.json), or a hub name. SigLIP 2 has this
            layout too, but for its NaFlex models, which are of the type "siglip2".
          image_size, dtype, allow_pickle: as in `CLIP.from_pretrained`.

        Raises:
          FileNotFoundError, OSError: see `CLIP.from_pretrained`.
          ValueError: config.json or the weights are not those of a SigLIP model of a fixed image
            size; others as `CLIP.from_pretrained`.
        """
        folder = find_folder(name_or_folder)
        config = SigLIPConfig.from_dict(read_config(folder, MODEL_TYPE))
        config = replace(config, dtype=dtype or config.dtype)
        tensors = read_tensors(folder, allow_pickle=allow_pickle)
        processor = Processor.from_folder(folder, image_size=image_size)
        options: Any = {"processor": processor, "image_size": image_size, "prefix": 0}
        return load(cls, config, tensors, PARAMETERS, **options)

    @property
    def layout(self) -> Layout:
        """What the axes of the attention maps mean."""
        vision, text = self.config.vision, self.config.text
        return Layout(
            (
                Stream("vision", "image", vision.tokens, vision.grid, 0, "vision/pooling"),
                Stream("text", "text", text.context, prefix=0),
            ),
            target="text",
        )

    def predict(self, inputs: Inputs) -> Float[Array, "images texts"]:
        """Return the probability that each image and each text go together."""
        return jax.nn.sigmoid(self(inputs)["logits_per_image"])

    def target_tokens(self, inputs: Inputs) -> dict[str, Int[Array, " batch"]]:
        """Return the index of the text token that is read, the last; patches are pooled."""
        _, text = self._check(inputs)
        return {"text": jnp.full(len(text), text.shape[1] - 1, jnp.int32)}

    def content(self, inputs: Inputs) -> dict[str, Bool[Array, "batch tokens"]]:
        """Return where the tokens are that stand for something: all patches, and words.

        Without a tokenizer, which knows its special tokens, all text tokens count.
        """
        image, text = self._check(inputs)
        specials = jnp.asarray(sorted(self.processor.specials) or [-1])
        return {
            "vision": jnp.ones((len(image), self.config.vision.tokens), bool),
            "text": ~jnp.isin(text, specials),
        }

    def _read_text(self, text: Any) -> tuple[Array, Any]:
        # Both were trained on lower-case texts; the tokenizer files of SigLIP 2 do not say so.
        if isinstance(text, list | tuple):
            text = [one.lower() if isinstance(one, str) else one for one in text]
        elif isinstance(text, str):
            text = text.lower()
        context = self.config.text.context
        ids = jnp.asarray(self.processor.text(text, context))
        return ids, self.processor.spelling(text, context)

    def _check_text(self, text: Any) -> Array:
        text = super()._check_text(text)
        if text.shape[1] != self.config.text.context:
            raise ValueError(
                f"text must be padded to {self.config.text.context} tokens, as the model was "
                f"trained, got {list(text.shape)}; use model.prepare"
            )
        return text

    def _embed_image(self, image: Array, return_attention: bool) -> tuple[Array, Maps]:
        pooled, maps = self.vision(
            image, remat=self.config.remat, return_attention=return_attention
        )
        return normalise(pooled), maps

    def _embed_text(self, text: Array, return_attention: bool) -> tuple[Array, Maps]:
        tokens, maps = self.text(text, remat=self.config.remat, return_attention=return_attention)
        last = jnp.full(len(text), text.shape[1] - 1, jnp.int32)
        return self.text.embed(tokens, last), {"text": maps}

    def _logit(self, cosine: Array) -> Array:
        return jnp.exp(self.logit_scale[...]) * cosine + self.logit_bias[...]
