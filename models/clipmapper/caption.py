"""CLIPmapper that writes captions of images."""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrel import contrast
from jaxrel.models import captions
from jaxrel.models.clip.tokens import end_of_text, token_ids
from jaxrel.models.clip.towers import Kept, kept_mask
from jaxrel.models.clipmapper.mapper import Memories
from jaxrel.models.clipmapper.model import KINDS, CLIPMapper
from jaxrel.models.inputs import Inputs, words_before
from jaxrel.models.transformer import Mask, Memory, read_at


class CLIPMapperCaption(CLIPMapper):
    """CLIPmapper that writes captions: each word from the image and the preceding tokens."""

    task = "caption"

    def __call__(self, inputs: Inputs, *, return_attention: bool = False) -> Any:
        """Return the logits of the next word after each token of the captions.

        Args:
          inputs: images and captions, one caption per image.
          return_attention: also return the attention maps.

        Returns:
          float32 [batch, tokens, vocabulary]; with `return_attention` a pair of it and the maps
          by name, [layers, batch, heads, query, key].

        Raises:
          ValueError, TypeError: an input is missing or has a wrong shape or dtype.
        """
        words, maps = self._features(inputs, return_attention)
        logits = self.word_logits(words)
        return (logits, maps) if return_attention else logits

    def word_logits(
        self, words: Float[Array, "batch words mapped"]
    ) -> Float[Array, "batch words vocabulary"]:
        """Return the logits of the word after each token, from what `map` returns."""
        return self.head(words).astype(jnp.float32)

    def log_probability(self, inputs: Inputs) -> Float[Array, " batch"]:
        """Return the mean log-probability of the caption's words and its end (teacher forcing)."""
        return self.mean_log_probability(self(inputs), jnp.asarray(inputs["text"]))

    def mean_log_probability(
        self, logits: Float[Array, "batch tokens vocabulary"], text: Int[Array, "batch tokens"]
    ) -> Float[Array, " batch"]:
        """Return `log_probability` from the logits of the word after each token."""
        last = end_of_text(text, self.config.clip.text.eos_token_id)
        return captions.mean_log_probability(logits, text, last)

    def score(self, inputs: Inputs, target: Any = None) -> Float[Array, " batch"]:
        """Return the logit of one word of each caption: the scalar that explanations explain.

        Args:
          inputs: images and captions; "position" int [batch], if there, is the target. With
            "words" bool [batch, tokens] it is the mean of the logits of several words. "against"
            bool [batch, vocabulary], if there, are the words that it is contrasted with.
          target: the position of the word in its caption, from 1 (0 is the start token), one or
            one per caption.

        Raises:
          ValueError: neither the inputs nor `target` say which word.
        """
        if target is None and "words" in inputs:
            of_token = captions.logit_by_token(self(inputs), jnp.asarray(inputs["text"]))
            return of_token.mean(axis=-1, where=jnp.asarray(inputs["words"]))
        position = captions.explained_position(inputs, target)
        logits = self(inputs)
        word = read_at(jnp.asarray(inputs["text"]), position)
        if "against" in inputs:
            return contrast(read_at(logits, position - 1), word, inputs["against"])
        return read_at(read_at(logits, position - 1), word)

    def contrasted(self, inputs: Inputs, against: Any) -> dict[str, Array | np.ndarray]:
        """Return rows whose score is their word's logit less that of others: see `score`.

        Args:
          inputs: rows, one per word, as `pairs` returns them.
          against: another word of the vocabulary, a tuple of them, or "*" for all others; or a list
            with one of these for each row.

        Raises:
          ValueError: other numbers, a word that is no token of the model, a row's own word, or
            rows of whole captions.
        """
        if "words" in inputs:
            raise ValueError("against contrasts a word with others; explain words, not captions")
        word = np.asarray(read_at(jnp.asarray(inputs["text"]), jnp.asarray(inputs["position"])))
        each = against if isinstance(against, list) else [against] * len(word)
        if len(each) != len(word):
            raise ValueError(f"against: {len(each)} for {len(word)} rows; give one for each")
        mask = np.zeros((len(word), self.config.clip.text.vocab_size), bool)
        for row, own, others in zip(mask, word, each, strict=True):
            if isinstance(others, str) and others == "*":
                row[:] = True
                row[own] = False
                continue
            row[[self._word(x) for x in (others if isinstance(others, tuple) else (others,))]] = 1
            if row[own]:
                raise ValueError(
                    "against: a word cannot be contrasted with itself; say which words are "
                    "explained with target="
                )
        return {**inputs, "against": jnp.asarray(mask)}

    def _word(self, word: Any) -> int:
        """The id of a word that is one token."""
        tokenizer = self.processor.tokenizer
        ids = tokenizer(word, add_special_tokens=False)["input_ids"] if tokenizer else []
        if len(ids) != 1 or ids[0] == tokenizer.unk_token_id:
            raise ValueError(f"against: {word!r} is no single token of this model")
        return ids[0]

    def generate(
        self, image: Float[Array, "batch height width 3"], keep: Kept | None = None
    ) -> Int[Array, "batch words"]:
        """Write a caption for each image, the most probable word at each step (greedy).

        Args:
          image: normalised images.
          keep: which of the image's tokens are seen, as in `encode_image`; all by default.

        Returns:
          Token ids with start and end, padded; a caption that has not ended when the context
          is full ends there.
        """
        text = self.config.clip.text
        start, end, pad = captions.special_ids(self.processor.tokenizer)
        # A caption has one start, and padding only after its end (which may be the same token).
        never = jnp.zeros(text.vocab_size, bool).at[jnp.array([start, pad])].set(True)
        never = never.at[end].set(False)
        tokens, _ = self.encode_image(image, keep)
        mask = kept_mask(keep)
        empty = jnp.full((len(image), text.context), pad, jnp.int32).at[:, 0].set(start)

        def unfinished(state):
            _, position, ended, _ = state
            return (position < text.context) & ~ended.all()

        def step(state):
            ids, position, ended, memory = state
            before = jax.lax.dynamic_index_in_dim(ids, position - 1, 1, keepdims=False)
            logits, memory = self.next_word(before, memory, position - 1, mask)
            best = jnp.where(never, -jnp.inf, logits).argmax(-1).astype(jnp.int32)
            best = jnp.where(position == text.context - 1, end, best)
            best = jnp.where(ended, pad, best)
            ids = jax.lax.dynamic_update_index_in_dim(ids, best, position, 1)
            return ids, position + 1, ended | (best == end), memory

        ended = jnp.zeros(len(image), bool)
        state = (empty, jnp.int32(1), ended, self.begin(tokens, mask))
        return jax.lax.while_loop(unfinished, step, state)[0]

    def begin(
        self, image: Float[Array, "batch tokens features"], image_mask: Mask | None = None
    ) -> tuple[Memory, dict[str, Memories]]:
        """Return the memory of an image before its caption, for `next_word`.

        Args:
          image: the image's tokens, as `encode_image` returns them.
          image_mask: which of them are seen.
        """
        context = self.config.clip.text.context
        seen = self.vision_in(self.vision_norm(image))
        return (
            self.text.transformer.empty(len(image), context),
            self.mapper.begin(seen, image_mask, context),
        )

    def next_word(
        self,
        token: Int[Array, " batch"],
        memory: tuple[Memory, dict[str, Memories]],
        position: Int[Array, ""],
        image_mask: Mask | None = None,
    ) -> tuple[Float[Array, "batch vocabulary"], tuple[Memory, dict[str, Memories]]]:
        """Return the logits of the word after a token, as a call would on all tokens so far.

        Args:
          token: the last token of each caption.
          memory: memory of the preceding tokens, from `begin` or the last call.
          position: position of the token.
          image_mask: as in `begin`.

        Returns:
          The logits, float32, and the memory with this token.
        """
        encoded, of_tower = self.text.step(token, memory[0], position)
        word, of_mapper = self.mapper.step(
            self.text_in(self.text_norm(encoded)), memory[1], position, image_mask
        )
        logits = self.word_logits(self.final_norm(word))[:, 0]
        return logits, (of_tower, of_mapper)

    def predict(self, inputs: Inputs) -> list[str]:
        """Return a caption for each image, in words."""
        ids = _generate(self, jnp.asarray(inputs["image"]))
        return self.sentences(ids)

    def sentences(self, ids: Int[Array | np.ndarray, "batch tokens"]) -> list[str]:
        """Return captions in words, without what the tokenizer does not know."""
        return captions.sentences(self.tokens({"text": ids}))

    def prepare(self, *, image: Any = None, text: Any = None) -> dict[str, Array]:
        """Make inputs from images and captions; without a caption the model writes it.

        Args:
          image: a PIL image, a uint8 [height, width, 3] array, or a list of them.
          text: a caption or a list of captions to explain instead of the model's own.

        Raises:
          TypeError, ValueError: see `CLIP.prepare`.
        """
        sizes = self.config.clip
        pixels = jnp.asarray(self.processor.image(image, side=sizes.vision.sides))
        if text is None:
            return {"image": pixels, "text": _generate(self, pixels)}
        ids = token_ids(self.processor, text, sizes.text)
        spelling = self.processor.spelling(text, sizes.text.context, known=True)
        return {"image": pixels, "text": ids, **spelling}

    def examples(self, *, image: Any, text: Any, target: Any = None) -> dict[str, Any]:
        """Return images and captions as lists with an entry per image; see `prepare`, `pairs`."""
        return captions.by_example(image, text, target)

    def pairs(self, inputs: Inputs, target: Any = None) -> Mapping[str, Array | np.ndarray]:
        """Bring inputs to one row per word: its image, its caption and its position.

        Args:
          inputs: images and captions, one caption per image.
          target: the positions of the words to explain, from 1, or one; by default all words
            but those that the tokenizer does not know, such as a word tokenizer's commas.
            "caption" explains each caption as a whole, in one row: the mean of its words' logits.

        Raises:
          ValueError: the numbers do not fit, or a caption has no word there.
        """
        captions.check_one_caption_each(len(inputs["image"]), len(inputs["text"]))
        words = np.asarray(self.content(inputs)["text"]).sum(-1)
        # Words that the model does not know are displayed, and not explained.
        shown = self.processor.tokens(np.asarray(inputs["text"]), known=True)
        if isinstance(target, str) and target == "caption":
            captions.word_rows(shown, words)  # says which caption has no words
            whole = jnp.asarray([[bool(token) for token in row] for row in shown])
            kept = {name: jnp.asarray(value) for name, value in inputs.items()}
            return kept | {"words": whole, "example": jnp.arange(len(whole))}
        return captions.rows_by_word(inputs, shown, words, target)

    def describe(self, inputs: Inputs) -> list[str]:
        """Return each row's word after the preceding words, or its whole caption."""
        rows = self.tokens(inputs)
        if "words" in inputs:
            return captions.sentences(rows)
        return captions.describe_words(rows, inputs["position"])

    def target_tokens(self, inputs: Inputs) -> dict[str, Array]:
        """Return the token from which each word is predicted: the one before it.

        For whole captions it returns weights of all tokens that predict a word, [batch, tokens].
        """
        if "words" in inputs:
            before = jnp.roll(jnp.asarray(inputs["words"]), -1, axis=1).astype(jnp.float32)
            return {"text": before / before.sum(-1, keepdims=True)}
        return {"text": jnp.asarray(inputs["position"]) - 1}

    def content(self, inputs: Inputs) -> dict[str, Bool[Array, "batch tokens"]]:
        """Return where the tokens are that stand for something: patches, and preceding words."""
        content = super().content(inputs)
        if "position" in inputs:
            content["text"] &= words_before(content["text"], jnp.asarray(inputs["position"]))
        return content


KINDS["caption"] = CLIPMapperCaption


@jax.jit
def _generate(model: CLIPMapperCaption, image: Array) -> Array:
    return model.generate(image)
