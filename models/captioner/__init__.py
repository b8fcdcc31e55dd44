"""Captioners with attention: an image's features, and recurrent cells that read them.

Three kinds, as Sun et al. 2022 ("Explain and improve: LRP-inference fine-tuning for image
captioning models") explain them: "adaptive", one LSTM with a visual sentinel (Lu et al. 2017);
"gridtd", their Ada-LSTM, with a second LSTM for language; and "aoa", their MH-FC, with
multi-head attention behind a gate (Huang et al. 2019). The image comes as a grid of features
of a VGG or a ResNet, or as features of regions (bottom-up attention, Anderson et al. 2018).
"""

import dataclasses
import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import jax
import numpy as np
from flax import nnx
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from jaxrel import tag
from jaxrel.models import decoding
from jaxrel.models.captioner.cells import (
    ATTENTION_FORMS,
    AdaptiveCell,
    AoACell,
    Context,
    GridTDCell,
    Read,
    dropout,
    linear,
)
from jaxrel.models.captions import (
    describe_words,
    end_of_caption,
    logit_by_token,
    mean_log_probability,
    sentences,
    special_ids,
    word_rows,
)
from jaxrel.models.checkpoint import (
    CONFIG,
    Parameter,
    find_folder,
    parameters_by_path,
    read_config,
    read_parameters,
    read_tensors,
    write_model,
)
from jaxrel.models.layout import Layout, Stream
from jaxrel.models.processor import Processor, quiet_transformers
from jaxrel.models.transformer import look_up, read_at
from jaxrel.models.vision import (
    EncoderConfig,
    VGGConfig,
    encoder_config,
    encoder_from_tensors,
    make_encoder,
)

MODEL_TYPE = "captioner"
KINDS = ("adaptive", "gridtd", "aoa")

Inputs = Mapping[str, Array | np.ndarray]
Cell = AdaptiveCell | GridTDCell | AoACell


@dataclass(frozen=True)
class CaptionerConfig:
    """Sizes of a captioner.

    Args:
      kind: "adaptive", "gridtd" or "aoa".
      encoder: of images; None for a model of region features.
      regions: (number of regions, features of each) where there is no encoder.
      image_size: pixels of a side of the square image; not used for regions.
      vocab_size: tokens, the special ones included.
      embed: features of a word.
      hidden: features of states and attended values.
      heads: of the attention (kind "aoa"); divides `hidden`.
      attention: form of the scores of adaptive attention, "paper" or "as coded": see
        `AdaptiveAttention`. Not used by "aoa".
      dropout: before the prediction of the word; only with a key, as in training. Sun et al. 2022
        have 0.5, and for "aoa" 0.3.
      attention_dropout: of the attention maps of "aoa", as `dropout`.
      context: the longest caption, with start and end.
      dtype: of the computation, "float32" or "bfloat16"; not stored.

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
        for name, known in (
            ("kind", KINDS),
            ("attention", ATTENTION_FORMS),
            ("dtype", ("float32", "bfloat16")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"captioner: {name} must be one of {', '.join(known)}, got "
                    f"{getattr(self, name)!r}"
                )
        for name in ("image_size", "vocab_size", "embed", "hidden", "heads", "context"):
            _check_size(name, getattr(self, name))
        for name in ("dropout", "attention_dropout"):
            value = getattr(self, name)
            if not isinstance(value, float | int) or not 0 <= value < 1:
                raise ValueError(f"captioner: {name} must be at least 0 and below 1, got {value!r}")
        if self.kind == "aoa" and self.hidden % self.heads:
            raise ValueError(
                f"captioner: hidden {self.hidden} is not a multiple of its {self.heads} heads"
            )
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
                _check_size("regions", size)
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
        known = {f.name for f in dataclasses.fields(cls)} - {"encoder", "dtype"}
        if set(sizes) != known:
            raise ValueError(
                f"{CONFIG}: captioner_config must hold {', '.join(sorted(known))}; missing or "
                f"unknown: {', '.join(sorted(set(sizes) ^ known))}"
            )
        regions = sizes["regions"]
        regions = tuple(regions) if isinstance(regions, list) else regions
        read = None if encoder is None else encoder_config(encoder)
        return cls(**(sizes | {"regions": regions}), encoder=read)

    def to_dict(self) -> dict[str, Any]:
        """Write the content of a config.json (without `dtype`)."""
        sizes = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            if f.name not in ("encoder", "dtype")
        }
        return {
            "model_type": MODEL_TYPE,
            "encoder_config": None if self.encoder is None else self.encoder.to_dict(),
            "captioner_config": sizes | {"regions": self.regions and list(self.regions)},
        }


def _check_size(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"captioner: {name} must be a positive integer, got {value!r}")


class Captioner(nnx.Module):
    """Writes captions, each word from the image and the words before it.

    `inputs` is a dict {"image": float [batch, side, side, 3], normalised; "text": int [batch,
    tokens]}, as `prepare` makes it. In the place of "image" it may hold "features" float [batch,
    positions, features], those of regions or what `encode` returned. Optional for "aoa" is "heads"
    bool [batch, heads]: gradients and relevance go through the values of these heads alone, and
    the output is the same.

    The tags are "features" (what the encoder returns, [batch, rows, columns, channels]),
    "features/tokens" (the same by position), "text/tokens" (the embedded words), "attention" and
    "sentinel" (by step).

    Args:
      config: the sizes.
      rngs: for the initial parameters (stream "params").
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
        _check_vocabulary(self.processor, config)
        encoder = config.encoder
        self.encoder = None if encoder is None else make_encoder(encoder, dtype=dtype, rngs=rngs)
        self.project = linear(config.features, config.hidden, dtype=dtype, rngs=rngs)
        self.cell = _cell(config, dtype, rngs)
        self.embedding = nnx.Embed(
            config.vocab_size,
            config.embed,
            embedding_init=nnx.initializers.normal(1.0),
            dtype=dtype,
            rngs=rngs,
        )
        self.head = linear(config.hidden, config.vocab_size, dtype=dtype, rngs=rngs)

    # The pieces, from the image to the word.

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
          features: as `encode` returns them, or of regions.
          heads: of "aoa", those whose values have a gradient or relevance; None: all.
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
        """Read one word: the next state, and what the word after it is predicted from.

        Args:
          context: of the image, from `start`.
          state: before the word.
          embedded: the word.
          dropout_key: for dropout; None: no dropout.
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
        inside, before_head = _keys(dropout_key, 2)
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
          features: of the images.
          text: token ids.
          heads: see `start`.
          dropout_key: for dropout inside the cell; None: no dropout.

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
          dropout_key: for dropout, as in training; None: no dropout.

        Returns:
          float32 [batch, tokens, vocabulary]; with `return_attention` a pair of it and of
          {"attention": [batch, tokens, heads, positions], "sentinel": [batch, tokens]}, the
          maps with which the word after each token is predicted ("aoa" has no sentinel).

        Raises:
          ValueError, TypeError: an input is missing, has a wrong shape or dtype, or values that
            are not finite or no token ids.
        """
        inside, before_head = _keys(dropout_key, 2)
        read = self._read(inputs, dropout_key=inside)
        logits = self.word_logits(read.attended, read.hidden, dropout_key=before_head)
        return (logits, read.maps) if return_attention else logits

    def scheduled_logits(
        self,
        inputs: Inputs,
        own_words: Bool[Array, " batch"],
        *,
        from_step: int = 3,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "batch tokens vocabulary"]:
        """As `__call__`, but from a step on some captions go on with the model's own words.

        For training with scheduled sampling (Bengio et al. 2015).

        Args:
          inputs: images or features, and captions.
          own_words: the captions in which, from there on, the most probable word is read in the
            place of the caption's.
          from_step: the first place where it is.
          dropout_key: for dropout; None: no dropout.

        Raises:
          ValueError, TypeError: see `__call__`.
        """
        self._check(inputs)
        text = jnp.asarray(inputs["text"])
        context, state = self.start(self._features(inputs))
        length = text.shape[1]
        keys = None if dropout_key is None else jax.random.split(dropout_key, length)

        def one(carry: Any, now: Any) -> Any:
            state, own = carry
            given, place, key = now
            word = jnp.where(own_words & (place >= from_step), own, given)
            state, logits, _ = self.step(context, state, self.embed(word), dropout_key=key)
            return (state, logits.argmax(-1).astype(given.dtype)), logits

        words = (text.swapaxes(0, 1), jnp.arange(length), keys)
        return jax.lax.scan(one, (state, text[:, 0]), words)[1].swapaxes(0, 1)

    # What is explained, and what it is predicted from.

    def score(self, inputs: Inputs, target: Any = None) -> Float[Array, " batch"]:
        """Return the logit of one word of each caption: the scalar that explanations explain.

        Args:
          inputs: images and captions; "position" int [batch], if there, is the target.
          target: the position of the word in its caption, from 1 (0 is the start token), one or
            one per caption.

        Raises:
          ValueError: neither the inputs nor `target` say which word.
        """
        if target is None and "position" not in inputs:
            raise ValueError(
                "which word of the caption? Pass target= its position, from 1, or make the inputs "
                "with model.pairs, which gives every word a row"
            )
        position = jnp.asarray(inputs["position"] if target is None else target)
        read = self._read(inputs)
        attended, hidden = (read_at(x, position - 1) for x in (read.attended, read.hidden))
        word = read_at(jnp.asarray(inputs["text"]), position)
        return read_at(self.word_logits(attended, hidden), word)

    def word_scores(self, inputs: Inputs) -> Float[Array, "batch tokens"]:
        """Return the logit of each token of its caption, given those before.

        Column i is for token i; column 0, the start token, is zero.
        """
        return logit_by_token(self(inputs), jnp.asarray(inputs["text"]))

    def log_probability(self, inputs: Inputs) -> Float[Array, " batch"]:
        """Return the mean log-probability of the caption's words and its end (teacher forcing)."""
        _, end, _ = special_ids(self.processor.tokenizer)
        return mean_log_probability(self(inputs), jnp.asarray(inputs["text"]), end)

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
        )

    def target_tokens(self, inputs: Inputs) -> dict[str, Int[Array, " batch"]]:
        """Return the token that each word is predicted from: the one before it."""
        return {"text": jnp.asarray(inputs["position"]) - 1}

    def content(self, inputs: Inputs) -> dict[str, Bool[Array, "batch tokens"]]:
        """Return what stands for something: positions of the image, and words.

        A region whose features are all zero is padding. With "position" in the inputs, the words
        are those before it.
        """
        text = jnp.asarray(inputs["text"])
        _, end, _ = special_ids(self.processor.tokenizer)
        place = jnp.arange(text.shape[1])
        last = end_of_caption(text, end)
        if "position" in inputs:
            last = jnp.minimum(last, jnp.asarray(inputs["position"]))
        seen = jnp.ones((len(text), self.config.positions), bool)
        if self.encoder is None:
            seen = (jnp.asarray(inputs["features"]) != 0).any(-1)
        return {"features": seen, "text": (place >= 1) & (place < last[:, None])}

    def tokens(self, inputs: Inputs) -> list[list[str]]:
        """Return one string per text token to display it; "" for special and unknown tokens."""
        unknown = getattr(self.processor.tokenizer, "unk_token", None)
        rows = self.processor.tokens(np.asarray(inputs["text"]))
        return [["" if token == unknown else token for token in row] for row in rows]

    def seen(self, image: Any) -> Any:
        """Return the part of an image that the model sees; `prepare` crops to the middle."""
        return image if self.encoder is None else self.processor.seen(image)

    # Captions.

    def prepare(self, *, image: Any = None, text: Any = None) -> dict[str, Array]:
        """Make inputs from images and captions; without a caption the model writes it.

        Args:
          image: a PIL image, a uint8 [height, width, 3] array, or a list of them; for a model
            of regions their features, [regions, features], a batch or a list of them.
          text: a caption or a list of captions to explain in the place of the model's own.

        Raises:
          TypeError: not an image, or not text.
          ValueError: no image, features of a wrong shape or that are not finite, an empty
            caption, one that is too long, or one with a word that the model does not know.
        """
        if self.encoder is None:
            seen = {"features": jnp.asarray(self._region_features(image))}
        else:
            seen = {"image": jnp.asarray(self.processor.image(image))}
        if text is None:
            (x,) = seen.values()
            return seen | {"text": _generate(self, x, beams=1)}
        self._check_known(text)
        ids = self.processor.text(text, self.config.context)
        return seen | {"text": jnp.asarray(ids)}

    def pairs(self, inputs: Inputs, target: Any = None) -> dict[str, Array]:
        """Bring inputs to one row per word: its image, its caption and its position.

        Args:
          inputs: images and captions, one caption per image.
          target: the positions of the words to explain, from 1, or one; by default all words
            but those that the tokenizer does not know.

        Raises:
          ValueError: the numbers do not fit, or a caption has no word there.
        """
        self._check(inputs)
        whole = {name: x for name, x in inputs.items() if name != "position"}
        words = np.asarray(self.content(whole)["text"]).sum(-1)
        example, position = word_rows(self.tokens(inputs), words, target)
        rows = {name: jnp.asarray(value)[example] for name, value in whole.items()}
        return rows | {"position": jnp.asarray(position), "example": jnp.asarray(example)}

    def describe(self, inputs: Inputs) -> list[str]:
        """Return each row's word, after the words before it."""
        return describe_words(self.tokens(inputs), inputs["position"])

    def caption_format(self, *, unknown: bool = True) -> decoding.Format:
        """Return how captions are written, for the functions of `jaxrel.models.decoding`.

        Args:
          unknown: whether the token for unknown words may be written.

        Raises:
          ValueError: there is no tokenizer.
        """
        tokenizer = self.processor.tokenizer
        start, end, pad = special_ids(tokenizer)
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
          beams: of beam search; 1 is greedy.
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
          beams: of beam search; 1 is greedy.
        """
        seen = jnp.asarray(inputs["features" if "features" in inputs else "image"])
        return self.sentences(_generate(self, seen, beams=beams))

    def sentences(self, ids: Int[Array | np.ndarray, "batch tokens"]) -> list[str]:
        """Return captions in words, without what the tokenizer does not know."""
        return sentences(self.tokens({"text": ids}))

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
          dtype: of the computation, "float32" (default) or "bfloat16".
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
        model = _abstract(config, Processor.from_folder(folder))
        tensors = read_tensors(folder, allow_pickle=allow_pickle)
        shapes = {path: variable.shape for path, variable in _parameters(model)}
        _fill(model, read_parameters(tensors, parameters_by_path(shapes), shapes))
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
          tensors: by the names of its PyTorch state dict, such as "AdaLSTM.x_gate.weight".
          processor: tokenizer and image preprocessing.

        Raises:
          ValueError: the tensors are not those of a model of these sizes, or are not finite; or
            the form of attention is another.
        """
        if config.kind != "aoa" and config.attention != "as coded":
            raise ValueError(
                "the reference implementation trains with attention='as coded', and the config "
                f"has {config.attention!r}: its weights do not fit that form"
            )
        model = _abstract(config, processor)
        inside = {n: x for n, x in tensors.items() if not n.startswith("img_encoder.")}
        table = _reference_table(config)
        shapes = {path: x.shape for path, x in _parameters(model) if path[0] != "encoder"}
        _fill(model, read_parameters(_merged(inside), table, shapes))
        if config.encoder is not None:
            model.encoder = encoder_from_tensors(
                config.encoder, tensors, prefix=_ENCODER_PREFIX, dtype=jnp.dtype(config.dtype)
            )
        return model

    def save_pretrained(self, folder: str | os.PathLike, *, dtype: str = "float32") -> None:
        """Write config.json, model.safetensors and the processor's files.

        The folder appears as a whole, or, when something fails, not at all.

        Args:
          folder: a new folder, or an older model folder, which is replaced.
          dtype: of the file: "float32", or "float16" for half the size.

        Raises:
          FileExistsError: the folder exists and is no model folder.
          ValueError: another dtype.
        """
        parameters = {path: np.asarray(value[...]) for path, value in _parameters(self)}
        write_model(folder, self.config.to_dict(), parameters, self.processor, dtype=dtype)

    # Checks.

    def _read(self, inputs: Inputs, *, dropout_key: PRNGKeyArray | None = None) -> Read:
        self._check(inputs)
        features, text = self._features(inputs), jnp.asarray(inputs["text"])
        heads = None if inputs.get("heads") is None else jnp.asarray(inputs["heads"])
        return self.teacher_forced(features, text, heads=heads, dropout_key=dropout_key)

    def _features(self, inputs: Inputs) -> Float[Array, "batch positions features"]:
        """The features of the inputs, tagged; ValueError if they are not this model's."""
        self._check_seen(inputs)
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

    def _check(self, inputs: Inputs) -> None:
        self._check_seen(inputs)
        text, context = inputs.get("text"), self.config.context
        if text is None:
            raise ValueError(
                f"inputs lack text; they hold {', '.join(inputs)}. Make them with "
                "model.prepare(image=..., text=...)"
            )
        if text.ndim != 2 or not 1 <= text.shape[1] <= context:
            raise ValueError(
                f"text must be token ids of shape [batch, tokens] with at most {context} tokens, "
                f"got {list(text.shape)}; use model.prepare"
            )
        if not jnp.issubdtype(text.dtype, jnp.integer):
            raise TypeError(f"text must be integer token ids, got {text.dtype}; use model.prepare")
        # A traced value cannot be looked at; an id out of range would give NaN there.
        if not isinstance(text, jax.core.Tracer):
            ids = np.asarray(text)
            outside = (ids < 0) | (ids >= self.config.vocab_size)
            if outside.any():
                raise ValueError(
                    f"text holds the id {int(ids[outside][0])}, and this model has "
                    f"the ids 0 to {self.config.vocab_size - 1}: another tokenizer made it"
                )
        images = len(inputs["features"] if "features" in inputs else inputs["image"])
        if images != len(text):
            raise ValueError(
                f"{images} images and {len(text)} captions: give one caption per image"
            )
        if inputs.get("heads") is not None:
            self._check_heads(inputs["heads"], len(text))

    def _check_heads(self, heads: Any, captions: int) -> None:
        expected = (captions, self.config.heads)
        if self.config.kind != "aoa":
            raise ValueError(
                f"inputs hold heads to choose, and a captioner of kind {self.config.kind!r} has "
                "one; leave them out"
            )
        if heads.dtype != bool or heads.shape != expected:
            raise ValueError(
                f"heads must be bool {list(expected)}, got {heads.dtype} {list(heads.shape)}"
            )

    def _check_seen(self, inputs: Inputs) -> None:
        """Check the images or features of the inputs."""
        held = [name for name in ("image", "features") if name in inputs]
        wanted = "features" if self.encoder is None else "image (or features)"
        if len(held) != 1 or (self.encoder is None and held == ["image"]):
            raise ValueError(
                f"inputs must hold {wanted}, and hold {' and '.join(held) or 'neither'}. Make "
                "them with model.prepare(image=..., text=...)"
            )
        (name,) = held
        x, side = inputs[name], self.config.image_size
        if name == "features":
            expected = [self.config.positions, self.config.features]
            what = "finite floats"
        else:
            expected = [side, side, 3]
            what = "normalised floats"
        if list(x.shape[1:]) != expected:
            sizes = ", ".join(map(str, expected))
            raise ValueError(
                f"{name} must have shape [batch, {sizes}], got {list(x.shape)}; use model.prepare"
            )
        if not jnp.issubdtype(x.dtype, jnp.floating):
            raise TypeError(f"{name} must be {what}, got {x.dtype}; use model.prepare")
        if name == "features" and not isinstance(x, jax.core.Tracer):
            _check_finite(np.asarray(x, np.float32))

    def _region_features(self, image: Any) -> Float[np.ndarray, "batch regions features"]:
        """Features of regions as a batch; ValueError if they are not this model's."""
        number, width = self.config.positions, self.config.features
        expected = f"[{number}, {width}] for each image: {number} regions of {width} features"
        if image is None or (isinstance(image, list | tuple) and not image):
            raise ValueError(f"no features: pass image= those of the regions, {expected}")
        given = image if isinstance(image, list | tuple) else [image]
        arrays = [np.asarray(one) for one in given]
        if not isinstance(image, list | tuple) and arrays[0].ndim == 3:
            arrays = list(arrays[0])
        for i, one in enumerate(arrays):
            if one.shape != (number, width) or one.dtype.kind not in "fiu":
                raise ValueError(
                    f"the features of image {i} are {one.dtype} {list(one.shape)}, and this "
                    f"model reads floats {expected} (zeros where there are fewer)"
                )
        features = np.stack(arrays).astype(np.float32)
        _check_finite(features)
        return features

    def _check_known(self, text: Any) -> None:
        """Raise ValueError if a caption has a word that the model cannot read."""
        tokenizer, captions = self.processor.tokenizer, [text] if isinstance(text, str) else text
        if tokenizer is None or not isinstance(captions, list | tuple):
            return  # `Processor.text` says what is wrong
        for caption in captions:
            if not isinstance(caption, str):
                return
            unknown = _unknown_words(tokenizer, caption)
            if unknown:
                raise ValueError(
                    f"this model does not know {', '.join(map(repr, unknown))} in the caption "
                    f"{caption!r}; it knows {len(tokenizer)} tokens, see "
                    "model.processor.tokenizer.get_vocab()"
                )


def _unknown_words(tokenizer: Any, caption: str) -> list[str]:
    """Words that a tokenizer does not know; punctuation is no word."""
    with quiet_transformers():
        out = tokenizer(caption, return_offsets_mapping=True, verbose=False)
    spans = zip(out["input_ids"], out["offset_mapping"], strict=True)
    words = [caption[a:b] for i, (a, b) in spans if i == tokenizer.unk_token_id]
    return [word for word in words if any(map(str.isalnum, word))]


def _check_finite(features: np.ndarray) -> None:
    wrong = np.flatnonzero(~np.isfinite(features).all(axis=(1, 2)))
    if wrong.size:
        bad = int((~np.isfinite(features[wrong[0]])).sum())
        raise ValueError(
            f"the features of image {wrong[0]} have {bad} values that are NaN or infinite; "
            "extract them again"
        )


def _check_vocabulary(processor: Processor, config: CaptionerConfig) -> None:
    tokenizer = processor.tokenizer
    if tokenizer is not None and len(tokenizer) != config.vocab_size:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens and the model {config.vocab_size}: this "
            "is the tokenizer of another model"
        )


def _keys(key: PRNGKeyArray | None, count: int) -> tuple[Any, ...]:
    return (None,) * count if key is None else tuple(jax.random.split(key, count))


def _cell(config: CaptionerConfig, dtype: Any, rngs: nnx.Rngs) -> Cell:
    if config.kind == "aoa":
        return AoACell(
            config.embed,
            config.hidden,
            config.heads,
            attention_dropout=config.attention_dropout,
            dtype=dtype,
            rngs=rngs,
        )
    kind = AdaptiveCell if config.kind == "adaptive" else GridTDCell
    return kind(
        config.embed,
        config.hidden,
        config.positions,
        config.hidden if config.encoder is None else config.features,
        form=config.attention,
        dtype=dtype,
        rngs=rngs,
    )


@jax.jit(static_argnames="beams")
def _generate(model: Captioner, seen: Array, *, beams: int) -> Array:
    return model.generate(seen, beams=beams)


def _abstract(config: CaptionerConfig, processor: Processor | None) -> Captioner:
    """A model with shapes in the place of parameters."""
    return nnx.eval_shape(lambda: Captioner(config, rngs=nnx.Rngs(0), processor=processor))


def _parameters(model: Captioner) -> list[tuple[tuple[str, ...], nnx.Variable]]:
    """Parameters and the statistics of batch normalisation, by path."""
    found = nnx.to_flat_state(nnx.state(model, (nnx.Param, nnx.BatchStat)))
    return [(tuple(map(str, path)), variable) for path, variable in found]


def _fill(model: Captioner, parameters: Mapping[tuple[str, ...], np.ndarray]) -> None:
    for path, variable in _parameters(model):
        if path in parameters:
            variable.set_value(jnp.asarray(parameters[path]))


# The reference implementation.

_ENCODER_PREFIX = "img_encoder.encoder."

# Linear maps of x and of h that are one map of [x; h] here: the sum of two maps and biases.
_MERGED = {
    name: tuple(f"{name}.{part}" for part in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"))
    for name in ("AdaLSTM.lstm_cell", "LanguageLSTM")
} | {
    "AdaLSTM.gate": tuple(
        f"AdaLSTM.{gate}.{part}" for part in ("weight", "bias") for gate in ("x_gate", "h_gate")
    )
}

_REFERENCE_NAMES = {
    "aoa": {
        "cell.lstm.gates": "LanguageLSTM",
        "cell.query": "decoder_multihead_attention.q_proj",
        "cell.key": "decoder_k_proj",
        "cell.value": "decoder_v_proj",
        "cell.gate": "decoder_aoa_linear_gate",
        "cell.out": "decoder_aoa_linear",
    },
    "adaptive": {
        "cell.image": "global_img_feature_proj",
        "cell.lstm.lstm.gates": "AdaLSTM.lstm_cell",
        "cell.lstm.gate": "AdaLSTM.gate",
        "cell.attention.image": "AdaAttention.W_v_proj",
        "cell.attention.sentinel": "AdaAttention.W_s_proj",
        "cell.attention.hidden": "AdaAttention.W_g_proj",
        "cell.attention.score": "AdaAttention.w_h",
    },
}
_REFERENCE_NAMES["gridtd"] = _REFERENCE_NAMES["adaptive"] | {"cell.language.gates": "LanguageLSTM"}
_WITHOUT_BIAS = ("AdaAttention.W_g_proj", "AdaAttention.w_h")


def reference_order(vocab_size: int) -> Int[np.ndarray, " tokens"]:
    """Return, for each id of `word_tokenizer`, the reference implementation's id of that token.

    There the ids are 0 `<pad>`, the words, `<unk>`, `<start>`, `<end>`. The order's `argsort`
    leads from its ids to those here.
    """
    return np.r_[0, np.arange(vocab_size - 3, vocab_size), np.arange(1, vocab_size - 3)]


def _reference_table(config: CaptionerConfig) -> list[Parameter]:
    names = {"project": "img_projector", "head": "fc"} | _REFERENCE_NAMES[config.kind]
    table = [Parameter(("embedding", "embedding"), "embedding.weight")]
    for ours, theirs in names.items():
        path = tuple(ours.split("."))
        table.append(Parameter((*path, "kernel"), f"{theirs}.weight", (1, 0)))
        if theirs not in _WITHOUT_BIAS:
            table.append(Parameter((*path, "bias"), f"{theirs}.bias"))
    return table


def _merged(tensors: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Tensors with the maps that are one here merged, and with the vocabulary in our order."""
    tensors = dict(tensors)
    for name, parts in _MERGED.items():
        if all(part in tensors for part in parts):
            of_x, of_h, *biases = (np.asarray(tensors.pop(part)) for part in parts)
            if len(of_x) != len(of_h):
                raise ValueError(
                    f"the tensors {parts[0]} and {parts[1]} have {len(of_x)} and {len(of_h)} rows, "
                    "and make one map: they are of different models"
                )
            tensors[f"{name}.weight"] = np.concatenate([of_x, of_h], axis=1)
            tensors[f"{name}.bias"] = biases[0] + biases[1]
    projector = "img_projector.weight"
    if projector in tensors and tensors[projector].ndim == 4:  # a 1 x 1 convolution
        tensors[projector] = tensors[projector][:, :, 0, 0]
    for name in ("embedding.weight", "fc.weight", "fc.bias"):
        if name in tensors:
            tensors[name] = tensors[name][reference_order(len(tensors[name]))]
    return tensors
