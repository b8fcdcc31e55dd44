"""The loss of answers to questions: one right answer of Shapes, or the ten people's of VQA v2."""

import jax
import optax
from jax import numpy as jnp
from jaxtyping import Array, Float

from jaxrel.models.clipmapper import CLIPMapperVQA
from jaxrel.train.losses.auxiliary import Asked


def answer_loss(
    model: CLIPMapperVQA,
    about: Asked,
    tokens: Array,
    batch: dict[str, Array],
    asked_loss: float,
) -> tuple[Array, dict[str, Array]]:
    """Mean cross-entropy of the right answers, with the loss of what is asked about.

    Args:
      model: what is trained.
      about: the heads that find what is asked about.
      tokens: of the images, as `encode_image` returns them.
      batch: as the recipe `vqa-shapes` makes it.
      asked_loss: weight of finding what is asked about.

    Returns:
      The loss, and {"accuracy": the share of right answers, "asked": the loss of the patches,
      "places": that of the places}.
    """
    questions = batch["text"].shape[1]
    text = batch["text"].reshape(-1, batch["text"].shape[-1]).astype(jnp.int32)
    answer = batch["answer"].reshape(-1).astype(jnp.int32)
    (seen, words), _ = model.streams(jnp.repeat(tokens, questions, axis=0), text)
    logits = model.answer_logits(words, text)
    asked = answer >= 0
    entropy = optax.softmax_cross_entropy_with_integer_labels(logits, answer.clip(0))
    right = logits.argmax(-1) == answer
    count = asked.sum()
    patches, place = (x.reshape(-1, *x.shape[2:]) for x in (batch["asked"], batch["place"]))
    found = about.patch_loss(seen, patches, asked)
    placed = about.place_loss(model.at_end(words, text), place)
    loss = jnp.where(asked, entropy, 0).sum() / count + asked_loss * (found + placed)
    metrics = {"accuracy": (right & asked).sum() / count, "asked": found, "places": placed}
    return loss, metrics


def soft_answer_loss(
    logits: Float[Array, "batch answers"], target: Float[Array, "batch answers"]
) -> tuple[Array, dict[str, Array]]:
    """Sigmoid cross-entropy, summed over all answers (Teney et al. 2018).

    Args:
      logits: of the answers.
      target: what each answer scores, min(n / 3, 1) for one that n people gave.

    Returns:
      The mean over the batch, and {"accuracy": the mean score of the most probable answers}.
    """
    entropy = optax.sigmoid_binary_cross_entropy(logits, target).sum(-1).mean()
    best = jax.nn.one_hot(logits.argmax(-1), logits.shape[-1])
    return entropy, {"accuracy": (best * target).sum(-1).mean()}
