"""What models that write captions have in common: token ids, words, and rows to explain."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Float, Int

from jaxrel.models.display import sentence
from jaxrel.models.inputs import Inputs, as_list, words_before


def special_ids(tokenizer: Any) -> tuple[int, int, int]:
    """Return the ids of a tokenizer's start, end and padding; without padding, the end pads.

    Raises:
      ValueError: there is no tokenizer, or it has no start or end.
    """
    if tokenizer is None:
        raise ValueError(
            "this model has no tokenizer, and does not know how captions start; load it with "
            "from_pretrained, or pass processor=Processor(tokenizer, ...)"
        )
    start, end, pad = (getattr(tokenizer, f"{x}_token_id") for x in ("bos", "eos", "pad"))
    if start is None or end is None:
        raise ValueError(
            "this model's tokenizer has no start or no end token (bos_token, eos_token), and a "
            "caption needs both; see word_tokenizer"
        )
    return start, end, end if pad is None else pad


def end_of_caption(text: Int[Array | np.ndarray, "batch tokens"], end: int) -> Int[Array, " batch"]:
    """Return the position of each caption's first end token; without one, its length."""
    found = jnp.asarray(text) == end
    return jnp.where(found.any(-1), found.argmax(-1), found.shape[1])


def logit_by_token(
    logits: Float[Array, "batch tokens vocabulary"], text: Int[Array, "batch tokens"]
) -> Float[Array, "batch tokens"]:
    """Return the logit of each token given those before it, or its log-probability.

    Args:
      logits: logits of the token after each token, or their log-softmax.
      text: token ids.

    Returns:
      Column i is for token i; nothing comes before token 0, and column 0 is zero.
    """
    chosen = jnp.take_along_axis(logits[:, :-1], text[:, 1:, None], axis=-1)[..., 0]
    return jnp.pad(chosen, ((0, 0), (1, 0)))


def mean_log_probability(
    logits: Float[Array, "batch tokens vocabulary"],
    text: Int[Array, "batch tokens"],
    last: Int[Array, " batch"],
) -> Float[Array, " batch"]:
    """Return the mean log-probability of each caption's words and its end (teacher forcing).

    Args:
      logits: logits of the token after each token.
      text: token ids.
      last: the position of each caption's end.
    """
    of_word = logit_by_token(jax.nn.log_softmax(logits), text)
    counted = words_before(text, last + 1)
    return jnp.where(counted, of_word, 0).sum(-1) / jnp.maximum(counted.sum(-1), 1)


def check_one_caption_each(images: int, captions: int) -> None:
    """Raise ValueError if there are other numbers of images and captions."""
    if images != captions:
        raise ValueError(f"{images} images and {captions} captions: give one caption per image")


def by_example(image: Any, text: Any, target: Any) -> dict[str, Any]:
    """Images and captions as lists with an entry per image, before they are prepared.

    Args:
      image: an image, or a list of them.
      text: a caption for each, or None where the model writes them.
      target: which words to explain, the same of every caption.

    Raises:
      ValueError: there are other numbers of images and captions.
    """
    images, texts = as_list(image), None if text is None else as_list(text)
    if images and texts:
        check_one_caption_each(len(images), len(texts))
    return {
        "image": images,
        "text": texts,
        "target": tuple(target) if isinstance(target, list) else target,
    }


def explained_position(inputs: Inputs, target: Any) -> Int[Array, "*batch"]:
    """Return the position of the words to explain: `target`, or else what the inputs say.

    Raises:
      ValueError: neither says which word.
    """
    if target is None and "position" not in inputs:
        raise ValueError(
            "which word of the caption? Pass target= its position, from 1, or make the inputs "
            "with model.pairs, which gives every word a row"
        )
    return jnp.asarray(inputs["position"] if target is None else target)


def rows_by_word(
    inputs: Inputs, shown: Sequence[Sequence[str]], words: Any, target: Any = None
) -> dict[str, np.ndarray]:
    """Bring inputs to one row per word: its image, its caption and its position.

    Args:
      inputs: one image and one caption per row.
      shown, words, target: see `word_rows`.

    Returns:
      The inputs' rows, with "position" and "example", the row that each word came from.

    Raises:
      ValueError: see `word_rows`.
    """
    # On the host: a program would be compiled for each number of words.
    example, position = word_rows(shown, words, target)
    rows = {name: np.asarray(value)[example] for name, value in inputs.items()}
    return rows | {"position": position, "example": example}


def word_rows(
    shown: Sequence[Sequence[str]], words: Sequence[int] | np.ndarray, target: Any = None
) -> tuple[Int[np.ndarray, " rows"], Int[np.ndarray, " rows"]]:
    """Return one row per word to explain: which caption it is in, and its position there.

    Args:
      shown: by caption, how to display each token; "" for a token that stands for no word.
      words: by caption, the number of tokens between start and end.
      target: the positions to explain, from 1, or one; None: all that can be displayed.

    Raises:
      ValueError: a caption has no words, or none at a position.
    """
    words = np.asarray(words)
    if not words.all():
        raise ValueError(f"the caption of image {int(words.argmin())} has no words")
    asked = None if target is None else _positions(target)
    rows = []
    for example, count in enumerate(words):
        known = [i for i in range(1, count + 1) if shown[example][i]]
        if asked is None and not known:
            raise ValueError(f"the tokenizer knows no word of the caption of image {example}")
        for position in known if asked is None else asked:
            if not 1 <= position <= count:
                raise ValueError(
                    f"the caption of image {example} has words 1 to {count}, and no word {position}"
                )
            rows.append((example, position))
    example, position = np.asarray(rows, np.int32).T
    return example, position


def _positions(target: Any) -> Int[np.ndarray, " words"]:
    asked = np.atleast_1d(np.asarray(target))
    if asked.ndim != 1 or not asked.size or not np.issubdtype(asked.dtype, np.integer):
        raise ValueError(
            "target must be the position of a word in its caption, from 1, or several (of a "
            f"CLIPMapper also 'caption'); got {target!r}"
        )
    return asked


def describe_words(shown: Sequence[Sequence[str]], position: Any) -> list[str]:
    """Return each row's word in brackets, after the preceding words."""
    places = np.asarray(position).tolist()
    before = [sentence(row[:i]) for row, i in zip(shown, places, strict=True)]
    words = [sentence([row[i]]) for row, i in zip(shown, places, strict=True)]
    return [f"{start} [{word}]".strip() for start, word in zip(before, words, strict=True)]


def sentences(shown: Sequence[Sequence[str]]) -> list[str]:
    """Return captions in words, without the tokens that stand for none."""
    return [sentence(row) for row in shown]
