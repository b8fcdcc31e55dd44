"""The captioner: an encoder, a recurrent cell, and what explains them."""

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, ClassVar

import jax
import numpy as np
from flax import nnx
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxrel import tag
from jaxrel.models import captions, decoding
from jaxrel.models.base import Model, empty
from jaxrel.models.captioner.cells import CELLS, AoACell, Context, Read, dropout, linear
from jaxrel.models.captioner.config import MODEL_TYPE, CaptionerConfig
from jaxrel.models.captioner.inputs import check_inputs, check_seen, region_features
from jaxrel.models.captioner.reference import ENCODER_PREFIX, read_reference
from jaxrel.models.checkpoint import fill, find_folder, read_config, read_values, shapes_of
from jaxrel.models.familiarity import read_familiarity
from jaxrel.models.inputs import Inputs, words_before
from jaxrel.models.layout import Layout, Stream
from jaxrel.models.processor import Processor
from jaxrel.models.transformer import look_up, read_at
from jaxrel.models.vision.encoders import make_encoder
from jaxrel.models.vision.layouts import encoder_from_tensors


class Captioner(Model):
    """Writes captions, each word from the image and the preceding tokens.

    `inputs` is a dict {"image": float [batch, side, side, 3], normalised; "text": int [batch,
    tokens]}, as `prepare` makes it. Instead of "image" it may hold "features" float [batch,
    positions, features], those of regions or what `encode` returned. Optional for "aoa" is "heads"
    bool [batch, heads]: gradients and relevance go only through the values of these heads, and
    the output is the same.

    The tags are "features" (what the encoder returns, [batch, rows, columns, channels]),
    "features/tokens" (the same by position), "text/tokens" (the embedded words), "attention" and
    "sentinel" (by step).

    Args:
      config: the sizes.
      rngs: keys for the initial parameters (stream "params").
      processor: tokenizer and image preprocessing.

    Raises:
      ValueError: the tokenizer has another number of tokens than the model.
    """

    task: ClassVar[str] = "caption"

    def __init__(
        self, config: CaptionerConfig, *, rngs: nnx.Rngs, processor: Processor | None = None
    ) -> None:
        dtype = jnp.dtype(config.dtype)
        self.config = config
        self.processor = processor or Processor()
        self.processor.check_vocabulary(config.vocab_size, exact=True)
        encoder = config.encoder
        self.encoder = None if encoder is None else make_encoder(encoder, dtype=dtype, rngs=rngs)
        self.project = linear(config.features, config.hidden, dtype=dtype, rngs=rngs)
        self.cell = CELLS[config.kind](config, dtype=dtype, rngs=rngs)
        self.embedding = nnx.Embed(
            config.vocab_size,
            config.embed,
            embedding_init=nnx.initializers.normal(1.0),
            dtype=dtype,
            rngs=rngs,
        )
        self.head = linear(config.hidden, config.vocab_size, dtype=dtype, rngs=rngs)

    # Steps from the image to the word.

    def encode(
        self, image: Float[Array, "batch height width 3"]
    ) -> Float[Array, "batch positions features"]:
        """Return the features of normalised images, row by row.

        Raises:
          ValueError: the model reads features of regions.
        """
        if self.encoder is None:
            raise ValueError(
                "this model has no encoder: it reads features of regions, as inputs['features']"
            )
        return self._tagged(self.encoder(image))

    def start(
        self,
        features: Float[Array, "batch positions features"],
        heads: Bool[Array, "batch heads"] | None = None,
    ) -> tuple[Context, Any]:
        """Return what every step reads of the images, and the state before the first word.

        Args:
          features: what `encode` returns, or features of regions.
          heads: for "aoa", the heads whose values have a gradient or relevance; None: all.
        """
        values = jax.nn.relu(self.project(features))
        # Regions are projected before they are averaged, a grid only for multi-head attention.
        projected = self.config.kind == "aoa" or self.config.encoder is None
        mean = (values if projected else features).mean(axis=1)
        if isinstance(self.cell, AoACell):
            return self.cell.start(values, mean, heads)
        return self.cell.start(values, mean)

    def embed(self, text: Int[Array, "*batch"]) -> Float[Array, "*batch embed"]:
        """Return the embedding of token ids."""
        return look_up(self.embedding, text)

    def read(
        self,
        context: Context,
        state: Any,
        embedded: Float[Array, "batch embed"],
        *,
        dropout_key: PRNGKeyArray | None = None,
    ) -> tuple[Any, Read]:
        """Read one word, and return the next state and the values that predict the next word.

        Args:
          context: what `start` returned for the images.
          state: state before the word.
          embedded: the word.
          dropout_key: key for dropout; None: no dropout.
        """
        return self.cell(context, state, embedded, dropout_key)

    def word_logits(
        self,
        attended: Float[Array, "*batch hidden"],
        hidden: Float[Array, "*batch hidden"],
        *,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*batch vocabulary"]:
        """Return the logits of the next word from what `read` gives, float32."""
        kept = dropout(attended + hidden, self.config.dropout, dropout_key)
        return self.head(kept).astype(jnp.float32)

    def step(
        self,
        context: Context,
        state: Any,
        embedded: Float[Array, "batch embed"],
        *,
        dropout_key: PRNGKeyArray | None = None,
    ) -> tuple[Any, Float[Array, "batch vocabulary"], dict[str, Array]]:
        """Read one word, and return the next state, the logits of the word after it, and maps.

        Args:
          context, state, embedded, dropout_key: see `read`.

        Returns:
          The state, float32 logits, and {"attention": [batch, heads, positions]; of a cell with
          a sentinel also "sentinel": [batch]}.
        """
        inside, before_head = _two_keys(dropout_key)
        state, read = self.read(context, state, embedded, dropout_key=inside)
        logits = self.word_logits(read.attended, read.hidden, dropout_key=before_head)
        return state, logits, read.maps

    def teacher_forced(
        self,
        features: Float[Array, "batch positions features"],
        text: Int[Array, "batch tokens"],
        *,
        heads: Bool[Array, "batch heads"] | None = None,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Read:
        """Read whole captions; one scan runs over their words.

        Args:
          features: features of the images.
          text: token ids.
          heads: see `start`.
          dropout_key: key for dropout inside the cell; None: no dropout.

        Returns:
          What `read` gives after each token, [batch, tokens, ...].
        """
        context, state = self.start(features, heads)
        words = tag(self.embed(text), "text/tokens")
        keys = None if dropout_key is None else jax.random.split(dropout_key, text.shape[1])

        def one(state: Any, now: Any) -> tuple[Any, Read]:
            word, key = now
            return self.read(context, state, word, dropout_key=key)

        _, reads = jax.lax.scan(one, state, (words.swapaxes(0, 1), keys))
        return jax.tree.map(lambda x: x.swapaxes(0, 1), reads)

    def __call__(
        self,
        inputs: Inputs,
        *,
        return_attention: bool = False,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Any:
        """Return the logits of the next word after each token of the captions.

        Args:
          inputs: images or features, and captions, one caption per image.
          return_attention: also return the attention maps.
          dropout_key: key for dropout, as in training; None: no dropout.

        Returns:
          float32 [batch, tokens, vocabulary]; with `return_attention` a pair of it and of
          {"attention": [batch, tokens, heads, positions], "sentinel": [batch, tokens]}, the
          maps with which the word after each token is predicted ("aoa" has no sentinel).

        Raises:
          ValueError, TypeError: an input is missing, has a wrong shape or dtype, or values that
            are not finite or no token ids.
        """
        inside, before_head = _two_keys(dropout_key)
        read = self._read(inputs, dropout_key=inside)
        logits = self.word_logits(read.attended, read.hidden, dropout_key=before_head)
        return (logits, read.maps) if return_attention else logits

    # What explanations ask: scores, maps, and the meaning of tokens.

    def score(self, inputs: Inputs, target: Any = None) -> Float[Array, " batch"]:
        """Return the logit of one word of each caption: the scalar that explanations explain.

        Args:
          inputs: images and captions; "position" int [batch], if there, is the target.
          target: the position of the word in its caption, from 1 (0 is the start token), one or
            one per caption.

        Raises:
          ValueError: neither the inputs nor `target` say which word.
        """
        position = captions.explained_position(inputs, target)
        read = self._read(inputs)
        attended, hidden = (read_at(x, position - 1) for x in (read.attended, read.hidden))
        word = read_at(jnp.asarray(inputs["text"]), position)
        return read_at(self.word_logits(attended, hidden), word)

    def word_scores(self, inputs: Inputs) -> Float[Array, "batch tokens"]:
        """Return the logit of each token of its caption, given the preceding tokens.

        Column i is for token i; column 0, the start token, is zero.
        """
        return captions.logit_by_token(self(inputs), jnp.asarray(inputs["text"]))

    def log_probability(self, inputs: Inputs) -> Float[Array, " batch"]:
        """Return the mean log-probability of the caption's words and its end (teacher forcing)."""
        text = jnp.asarray(inputs["text"])
        return captions.mean_log_probability(self(inputs), text, self._end(text))

    def attention_maps(self, inputs: Inputs) -> dict[str, Array]:
        """Return the maps with which each token of the captions is predicted.

        Returns:
          {"attention": [batch, tokens, heads, positions]}, and of a cell with a sentinel also
          "sentinel" [batch, tokens], its weight. Index i is for token i; nothing predicts the
          start token, and its maps are zero.
        """
        maps = self._read(inputs).maps
        return {n: jnp.roll(x, 1, axis=1).at[:, 0].set(0) for n, x in maps.items()}

    @property
    def layout(self) -> Layout:
        """What the axes of the relevance of features and words mean."""
        config = self.config
        return Layout(
            (
                Stream("features", "image", config.positions, config.grid, prefix=0),
                Stream("text", "text", config.context),
            ),
            by_word=True,
            target="words",
        )

    def target_tokens(self, inputs: Inputs) -> dict[str, Int[Array, " batch"]]:
        """Return the token from which each word is predicted: the one before it."""
        return {"text": jnp.asarray(inputs["position"]) - 1}

    def content(self, inputs: Inputs) -> dict[str, Bool[Array, "batch tokens"]]:
        """Return what stands for something: positions of the image, and words.

        A region whose features are all zero is padding. With "position" in the inputs, the words
        are those before it.
        """
        text = jnp.asarray(inputs["text"])
        last = self._end(text)
        if "position" in inputs:
            last = jnp.minimum(last, jnp.asarray(inputs["position"]))
        seen = jnp.ones((len(text), self.config.positions), bool)
        if self.encoder is None:
            seen = (jnp.asarray(inputs["features"]) != 0).any(-1)
        return {"features": seen, "text": words_before(text, last)}

    def tokens(self, inputs: Inputs) -> list[list[str]]:
        """Return one string per text token to display it; "" for special and unknown tokens."""
        return self.processor.shown(inputs, known=True)

    def seen(self, image: Any) -> Any:
        """Return the part of an image that the model sees; `prepare` crops to the middle."""
        return image if self.encoder is None else self.processor.seen(image)

    # Inputs, rows to explain, and captions.

    def prepare(self, *, image: Any = None, text: Any = None) -> dict[str, Array]:
        """Make inputs from images and captions; without a caption the model writes it.

        Args:
          image: a PIL image, a uint8 [height, width, 3] array, or a list of them; for a model
            of regions their features, [regions, features], a batch or a list of them.
          text: a caption or a list of captions to explain instead of the model's own.

        Raises:
          TypeError: not an image, or not text.
          ValueError: no image, features of a wrong shape or that are not finite, an empty
            caption, one that is too long, or one with a word that the model does not know.
        """
        if self.encoder is None:
            seen = {"features": jnp.asarray(region_features(image, self.config))}
        else:
            pixels = self.processor.image(image, side=self.config.image_size)
            seen = {"image": jnp.asarray(pixels)}
        if text is None:
            (x,) = seen.values()
            return seen | {"text": _generate(self, x, beams=1)}
        ids = self.processor.text(text, self.config.context, unknown="raise")
        spelling = self.processor.spelling(text, self.config.context, known=True)
        return seen | {"text": jnp.asarray(ids)} | spelling

    def examples(self, *, image: Any, text: Any, target: Any = None) -> dict[str, Any]:
        """Return images and captions as lists with an entry per image; see `prepare`, `pairs`."""
        return captions.by_example(image, text, target)

    def pairs(self, inputs: Inputs, target: Any = None) -> Mapping[str, Array | np.ndarray]:
        """Bring inputs to one row per word: its image, its caption and its position.

        Args:
          inputs: images and captions, one caption per image.
          target: the positions of the words to explain, from 1, or one; by default all words
            but those that the tokenizer does not know.

        Raises:
          ValueError: the numbers do not fit, or a caption has no word there.
        """
        check_inputs(inputs, self.config)
        whole = {name: x for name, x in inputs.items() if name != "position"}
        words = np.asarray(self.content(whole)["text"]).sum(-1)
        return captions.rows_by_word(whole, self.tokens(inputs), words, target)

    def describe(self, inputs: Inputs) -> list[str]:
        """Return each row's word in brackets, after the preceding words."""
        return captions.describe_words(self.tokens(inputs), inputs["position"])

    def caption_format(self, *, unknown: bool = True) -> decoding.Format:
        """Return how captions are written, for the functions of `jaxrel.models.decoding`.

        Args:
          unknown: whether the token for unknown words may be written.

        Raises:
          ValueError: there is no tokenizer.
        """
        tokenizer = self.processor.tokenizer
        start, end, pad = captions.special_ids(tokenizer)
        never = () if unknown or tokenizer.unk_token_id is None else (tokenizer.unk_token_id,)
        return decoding.Format(start, end, pad, self.config.context, never)

    def decoder(
        self, features: Float[Array, "batch positions features"]
    ) -> tuple[decoding.Step, Any]:
        """Return a step function and its first state, for `jaxrel.models.decoding`.

        Its rows are `image * beams + beam`, for any number of beams; what is read of an image
        is not repeated for each.
        """
        context, first = self.start(features)

        def one(state: Any, word: Array) -> tuple[Any, Array]:
            state, logits, _ = self.step(context, state, self.embed(word))
            return state, logits

        def step(state: Any, words: Array) -> tuple[Any, Array]:
            beams = len(words) // len(features)
            by_beam = jax.tree.map(lambda x: x.reshape(-1, beams, *x.shape[1:]), (state, words))
            stepped = jax.vmap(one, in_axes=(1, 1), out_axes=1)(*by_beam)
            return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), stepped)

        return step, first

    def generate(
        self,
        image: Float[Array, "batch *shape"],
        *,
        beams: int = 1,
        length_penalty: float | None = None,
        unknown: bool = True,
    ) -> Int[Array, "batch tokens"]:
        """Write a caption for each image.

        Args:
          image: normalised images [batch, side, side, 3], or features [batch, positions,
            features].
          beams: number of beams; 1 is greedy.
          length_penalty: see `jaxrel.models.decoding.beam_search`.
          unknown: whether the token for unknown words may be written.

        Returns:
          Token ids with start and end, padded; a caption that has not ended when the context
          is full ends there. `jaxrel.models.decoding` has more ways, and tells which those are.

        Raises:
          ValueError: wrong shape, or there is no tokenizer.
        """
        features = self._features({"features" if image.ndim == 3 else "image": image})
        step, state = self.decoder(features)
        form = self.caption_format(unknown=unknown)
        if beams == 1 and length_penalty is None:
            return decoding.greedy(step, state, form).ids
        found = decoding.beam_search(step, state, form, beams=beams, length_penalty=length_penalty)
        return found.ids

    def predict(self, inputs: Inputs, *, beams: int = 1) -> list[str]:
        """Return a caption for each image, in words.

        Args:
          inputs: images or features.
          beams: number of beams; 1 is greedy.
        """
        seen = jnp.asarray(inputs["features" if "features" in inputs else "image"])
        return self.sentences(_generate(self, seen, beams=beams))

    def sentences(self, ids: Int[Array | np.ndarray, "batch tokens"]) -> list[str]:
        """Return captions in words, without what the tokenizer does not know."""
        return captions.sentences(self.tokens({"text": ids}))

    # Files.

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | os.PathLike,
        *,
        dtype: str | None = None,
        allow_pickle: bool = False,
    ) -> "Captioner":
        """Load a model and its tokenizer and image preprocessing.

        Args:
          name_or_folder: a bundled model, a folder that `save_pretrained` wrote, or a hub name.
          dtype: dtype of the computation, "float32" (default) or "bfloat16".
          allow_pickle: read a pickled checkpoint where there is nothing else; needs torch.

        Raises:
          FileNotFoundError: no such model, or a file is missing.
          OSError: the hub did not answer, or a file is truncated.
          ValueError: config.json, the tokenizer or the weights are not those of a captioner, do
            not belong together, are pickled, or hold values that are not finite.
        """
        folder = find_folder(name_or_folder)
        config = CaptionerConfig.from_dict(read_config(folder, MODEL_TYPE))
        config = replace(config, dtype=dtype or config.dtype)
        model = empty(cls, config, Processor.from_folder(folder))
        fill(model, read_values(folder, model, allow_pickle=allow_pickle))
        model.familiar = read_familiarity(folder)
        return model

    @classmethod
    def from_reference(
        cls,
        config: CaptionerConfig,
        tensors: Mapping[str, np.ndarray],
        *,
        processor: Processor | None = None,
    ) -> "Captioner":
        """Make a model of the weights of the reference implementation of Sun et al. 2022.

        The vocabulary comes in the order of `word_tokenizer` (see `reference_order`), so that
        the tokenizer is `word_tokenizer(words, config.context)`, with the kept words in their
        order. Checkpoints of "aoa" from before April 2021 have keys and values exchanged: give
        the tensors of decoder_k_proj and decoder_v_proj each other's names first.

        Args:
          config: the sizes; attention "as coded", with which those weights were trained.
          tensors: tensors by the names of its PyTorch state dict, such as "AdaLSTM.x_gate.weight".
          processor: tokenizer and image preprocessing.

        Raises:
          ValueError: the tensors are not those of a model of these sizes, or are not finite; or
            the form of attention is another.
        """
        model = empty(cls, config, processor)
        shapes = {path: shape for path, shape in shapes_of(model).items() if path[0] != "encoder"}
        fill(model, read_reference(config, tensors, shapes))
        if config.encoder is not None:
            model.encoder = encoder_from_tensors(
                config.encoder, tensors, prefix=ENCODER_PREFIX, dtype=jnp.dtype(config.dtype)
            )
        return model

    # What the methods above share.

    def _read(self, inputs: Inputs, *, dropout_key: PRNGKeyArray | None = None) -> Read:
        check_inputs(inputs, self.config)
        features, text = self._features(inputs), jnp.asarray(inputs["text"])
        heads = None if inputs.get("heads") is None else jnp.asarray(inputs["heads"])
        return self.teacher_forced(features, text, heads=heads, dropout_key=dropout_key)

    def _end(self, text: Int[Array, "batch tokens"]) -> Int[Array, " batch"]:
        """The position of each caption's end."""
        _, end, _ = captions.special_ids(self.processor.tokenizer)
        return captions.end_of_caption(text, end)

    def _features(self, inputs: Inputs) -> Float[Array, "batch positions features"]:
        """The features of the inputs, tagged; ValueError if they are not this model's."""
        check_seen(inputs, self.config)
        if "features" in inputs:
            return self._tagged(jnp.asarray(inputs["features"]))
        return self.encode(jnp.asarray(inputs["image"]))

    def _tagged(self, features: Array) -> Float[Array, "batch positions features"]:
        """Tag features as a grid, if they have one, and by position."""
        if self.config.grid is not None:
            by_place = features.reshape(len(features), *self.config.grid, self.config.features)
            features = tag(by_place, "features")
        by_position = (len(features), self.config.positions, self.config.features)
        return tag(features.reshape(by_position), "features/tokens")


def _two_keys(key: PRNGKeyArray | None) -> tuple[Any, Any]:
    """Keys for the dropout inside the cell, and for that before the head."""
    if key is None:
        return None, None
    inside, before_head = jax.random.split(key)
    return inside, before_head


@jax.jit(static_argnames="beams")
def _generate(model: Captioner, seen: Array, *, beams: int) -> Array:
    return model.generate(seen, beams=beams)
