"""The cross-entropy of captions: every word and the end, given the true words before it."""

import optax
from jax import numpy as jnp
from jaxtyping import Array, Float, Int, Integer, PRNGKeyArray

from jaxrel.models.captioner import Captioner
from jaxrel.models.captions import end_of_caption, special_ids
from jaxrel.models.clip import end_of_text
from jaxrel.models.clipmapper import CLIPMapperCaption


def caption_loss(
    model: Captioner,
    features: Float[Array, "batch positions features"],
    text: Integer[Array, "batch tokens"],
    key: PRNGKeyArray | None = None,
) -> tuple[Array, dict[str, Array]]:
    """The loss of a captioner with attention.

    Args:
      model: a captioner.
      features: of the images, as `encode` returns them, or of regions.
      text: one caption per image.
      key: for dropout; None: no dropout.

    Returns:
      As `word_loss`.
    """
    text = text.astype(jnp.int32)
    logits = model({"features": features, "text": text[:, :-1]}, dropout_key=key)
    _, end, _ = special_ids(model.processor.tokenizer)
    return word_loss(logits, text, end_of_caption(text, end))


def mapper_caption_loss(
    model: CLIPMapperCaption,
    tokens: Float[Array, "batch patches features"],
    text: Integer[Array, "batch tokens"],
) -> tuple[Array, dict[str, Array]]:
    """The loss of a CLIPmapper.

    Args:
      model: a CLIPmapper that writes captions.
      tokens: of the images, as `encode_image` returns them.
      text: one caption per image.

    Returns:
      As `word_loss`.
    """
    text = text.astype(jnp.int32)
    words, _ = model.map(tokens, text[:, :-1])
    end = end_of_text(text, model.config.clip.text.eos_token_id)
    return word_loss(model.word_logits(words), text, end)


def word_loss(
    logits: Float[Array, "batch rest vocabulary"],
    text: Int[Array, "batch tokens"],
    end: Int[Array, " batch"],
) -> tuple[Array, dict[str, Array]]:
    """Mean cross-entropy of words and ends, and the share of them that is predicted.

    Args:
      logits: of the token after each but the last.
      text: token ids.
      end: the position of each caption's end; what follows it does not count.

    Returns:
      The loss, and {"accuracy": the share}.
    """
    following = text[:, 1:]
    counted = jnp.arange(1, text.shape[1]) <= end[:, None]
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, following)
    right = (logits.argmax(-1) == following) & counted
    count = counted.sum()
    return jnp.where(counted, entropy, 0).sum() / count, {"accuracy": right.sum() / count}
