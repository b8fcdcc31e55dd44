"""What models that compare images with texts do alike."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeVar

import jax
import numpy as np
from flax import nnx
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrel import capture_with_grad
from jaxrel.models.base import Model, empty
from jaxrel.models.captions import sentences
from jaxrel.models.checkpoint import Parameter, fill, read_parameters, shapes_of
from jaxrel.models.display import SPELLING
from jaxrel.models.inputs import (
    Inputs,
    as_list,
    as_pairs,
    by_example,
    check_floats,
    check_held,
    check_text,
)
from jaxrel.models.patches import ImageSize, interpolate_positions

_ADVICE = "as many images as texts, one image, one text, or target= the text's index for each image"

# Arrays by name, such as attention maps.
Maps = dict[str, Array | None]


class Contrastive(Model):
    """A model with an image tower and a text tower, whose embeddings are compared.

    `inputs` is always a dict {"image": float [batch, height, width, 3], normalised; "text": int
    [batch, tokens]}, as `prepare` makes it. A class has `_embed_image` and `_embed_text`, which
    return embeddings of length 1 and attention maps by name, `logit_scale` and `_logit`.
    """

    logit_scale: nnx.Param

    def _embed_image(self, image: Array, return_attention: bool) -> tuple[Array, Maps]:
        raise NotImplementedError

    def _embed_text(self, text: Array, return_attention: bool) -> tuple[Array, Maps]:
        raise NotImplementedError

    def _logit(self, cosine: Array) -> Array:
        raise NotImplementedError

    def __call__(self, inputs: Inputs, *, return_attention: bool = False) -> Any:
        """Compare every image with every text.

        Args:
          inputs: images and texts, of batch sizes that may differ.
          return_attention: also return the attention maps.

        Returns:
          A dict: "logits_per_image" [images, texts], "image_embeds" and "text_embeds"
          (of length 1). With `return_attention`, a pair of it and the maps by name, such as
          {"vision": [layers, images, heads, query, key], "text": [layers, texts, heads, query,
          key]}.

        Raises:
          ValueError: an input is missing or has a wrong shape.
          TypeError: an input has a wrong dtype.
        """
        image, text = self._check(inputs)
        image, of_image = self._embed_image(image, return_attention)
        text, of_text = self._embed_text(text, return_attention)
        output = {
            "logits_per_image": self._logit(image @ text.T),
            "image_embeds": image,
            "text_embeds": text,
        }
        return (output, {**of_image, **of_text}) if return_attention else output

    def encode_image(
        self, image: Float[Array | np.ndarray, "batch height width 3"]
    ) -> Float[Array, "batch embed"]:
        """Return the embeddings of images, of length 1."""
        return self._embed_image(self._check_image(image), False)[0]

    def encode_text(
        self, text: Int[Array | np.ndarray, "batch tokens"]
    ) -> Float[Array, "batch embed"]:
        """Return the embeddings of texts, of length 1."""
        return self._embed_text(self._check_text(text), False)[0]

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
        texts = {"text": text, **{name: inputs[name] for name in (SPELLING,) if name in inputs}}
        if target is not None:
            target = jnp.atleast_1d(jnp.asarray(target))
            _check_target(target, len(text))
            texts = {name: jnp.asarray(x)[target] for name, x in texts.items()}
        return as_pairs({"image": image, **texts}, "texts", _ADVICE)

    def examples(self, *, image: Any, text: Any, target: Any = None) -> dict[str, Any]:
        """Return images and texts as lists with an entry per pair, before they are prepared.

        Args:
          image: as in `prepare`.
          text: as in `prepare`.
          target: as in `pairs`.

        Raises:
          ValueError: see `pairs`.
        """
        if target is not None:
            texts = as_list(text)
            chosen = np.atleast_1d(np.asarray(target))
            _check_target(chosen, len(texts))
            text = [texts[i] for i in chosen]
        return by_example(image, text, "texts", _ADVICE) | {"target": None}

    def score(self, inputs: Inputs, target: Any = None) -> Float[Array, " batch"]:
        """Return the similarity of each pair: the scalar that explanations explain.

        Inputs are brought to pairs before the towers, so that each score depends on its own
        row of the attention maps only, and the gradient of the sum is each row's own.

        Args:
          inputs: images and texts; "against" as `contrasted` makes it, if there.
          target: see `pairs`.

        Returns:
          `logits_per_image[i, target[i]]`, float32; less that of others if there are.

        Raises:
          ValueError: see `pairs`.
        """
        against = inputs.get("against")
        inputs = self.pairs(inputs, target)
        image, _ = self._embed_image(inputs["image"], False)
        text, _ = self._embed_text(inputs["text"], False)
        return self._similarity(image, text, against)

    def _similarity(
        self,
        image: Float[Array, "*layers batch embed"],
        text: Float[Array, "batch embed"],
        against: Float[Array | np.ndarray, "batch texts embed"] | None,
    ) -> Float[Array, "*layers batch"]:
        """The similarity with a text, less the log of the sum of exponentials of that with others.

        One product with the difference of embeddings, so that LRP shares both parts alike between
        image and text; the derivative is exact: see `jaxrel.contrast`.
        """
        if against is None:
            return self._logit(jnp.sum(image * text, axis=-1))
        scale = jnp.exp(self.logit_scale[...])
        others = scale * jnp.einsum("...be,bne->...bn", image, against)
        # Constants before the softmax, which would look like attention to the embeddings.
        others = jax.lax.stop_gradient(others)
        shares = jax.nn.softmax(others, axis=-1)
        entropy = jax.nn.logsumexp(others, axis=-1) - (shares * others).sum(axis=-1)
        other = jnp.einsum("...bn,bne->...be", shares, against)
        return scale * jnp.sum(image * (text - other), axis=-1) - entropy

    def contrasted(self, inputs: Inputs, against: Any) -> dict[str, Array | np.ndarray]:
        """Return pairs whose score is the similarity with their text less that with others.

        The others enter as embeddings: the relevance of words is that of the pair's own text.

        Args:
          inputs: pairs, as `pairs` returns them.
          against: a text, or a tuple of texts, for all pairs; or a list with one of these for each.

        Returns:
          The pairs with "against", [batch, texts, embed]: see `score`.

        Raises:
          TypeError: not texts.
          ValueError: other numbers, or see `prepare`.
        """
        rows = len(inputs["image"])
        each = against if isinstance(against, list) else [against]
        groups = [one if isinstance(one, tuple) else (one,) for one in each]
        counts = {len(group) for group in groups}
        if len(groups) not in (1, rows) or len(counts) != 1 or not all(groups) or "*" in groups[0]:
            raise ValueError(
                f"against must be a text, or a tuple of texts, for all {rows} pairs, or a list "
                f"with one of these for each, of as many texts; got {against!r:.80}"
            )
        texts = [text for group in groups for text in group]
        embedded = _embedded(self, self._read_text(texts)[0])
        by_row = embedded.reshape(len(groups), -1, embedded.shape[-1])
        whole = jnp.broadcast_to(by_row, (rows, *by_row.shape[1:]))
        return {**inputs, "against": whole}

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

    def prepare(self, *, image: Any = None, text: Any = None) -> dict[str, Array]:
        """Make inputs from images and sentences, with the model's own preprocessing.

        Args:
          image: a PIL image, a uint8 [height, width, 3] array, or a list of them.
          text: a sentence or a list of sentences.

        Returns:
          Inputs: "image" float32 NHWC, "text" int32, padded to the context length. Where ids do
          not tell how a text is spelled, also "spelling", which only `tokens` reads.

        Raises:
          TypeError: not an image or not text.
          ValueError: no image, no or empty text, a text that is too long or of which the
            model knows no word, a tokenizer that is not this model's, or a model folder
            without tokenizer or preprocessing.

        Warns:
          UserWarning: the model does not know some of the words.
        """
        ids, spelling = self._read_text(text)
        pixels = self.processor.image(image, side=self.config.vision.sides)
        return {"image": jnp.asarray(pixels), "text": ids, **spelling}

    def _read_text(self, text: Any) -> tuple[Array, Mapping[str, Any]]:
        """Token ids of texts, and what `Processor.spelling` says of them."""
        raise NotImplementedError

    def tokens(self, inputs: Inputs) -> list[list[str]]:
        """Return one string per text token to display it.

        Args:
          inputs: what `prepare` returns.

        Returns:
          Per text, as many strings as tokens: "##" in front continues the word before;
          "" stands for special and padding tokens. A word that the model does not know is
          marked "(unknown)".
        """
        return self.processor.shown(inputs)

    def describe(self, inputs: Inputs) -> list[str]:
        """Return what each pair's score says of its image: the text, as the model reads it."""
        return sentences(self.tokens(inputs))

    def _check(self, inputs: Inputs) -> tuple[Array, Array]:
        check_held(inputs, "image", "text")
        return self._check_image(inputs["image"]), self._check_text(inputs["text"])

    def _check_image(self, image: Any) -> Array:
        advice = "use model.prepare, or load the model with from_pretrained(..., image_size=...)"
        check_floats("image", image, (*self.config.vision.sides, 3), advice=advice)
        return jnp.asarray(image)

    def _check_text(self, text: Any) -> Array:
        check_text(text, self.config.text.context)
        return jnp.asarray(text)


C = TypeVar("C", bound=Contrastive)


def load(
    kind: type[C],
    config: Any,
    tensors: Mapping[str, np.ndarray],
    table: Sequence[Parameter],
    *,
    processor: Any,
    image_size: ImageSize | None = None,
    prefix: int = 1,
    antialias: bool = False,
    wanted: str = "",
) -> C:
    """Make a model of tensors that have been read, for this or another size of images.

    Args:
      kind: the class.
      config: the sizes, as the tensors have them.
      tensors: tensors by name.
      table: where each parameter is.
      processor: tokenizer and image preprocessing.
      image_size: of the images that the model reads; the positions are interpolated.
      prefix: as in `interpolate_positions`.
      antialias: as in `interpolate_positions`.
      wanted: as in `read_parameters`.

    Raises:
      ValueError: see `read_parameters`; an image that is smaller than a patch.
    """
    model = empty(kind, config, processor)
    shapes = shapes_of(model)
    # The table of a ResNet has shortcuts and later blocks that some stages do not have.
    table = [parameter for parameter in table if parameter.path in shapes]
    parameters = read_parameters(tensors, table, shapes, wanted=wanted)
    if image_size is not None:
        native = config.vision.grid
        config = replace(config, vision=replace(config.vision, image_size=image_size))
        model = empty(kind, config, processor)
        where = ("vision", "position_embedding")
        parameters[where] = interpolate_positions(
            parameters[where], native, config.vision.grid, prefix=prefix, antialias=antialias
        )
    fill(model, parameters)
    return model


@jax.jit
def _embedded(model: Contrastive, text: Array) -> Array:
    return model.encode_text(text)


def _check_target(target: Array | np.ndarray, texts: int) -> None:
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
