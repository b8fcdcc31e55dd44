"""LRP-inference: each word is predicted again from values that are weighted by their relevance.

It is the fine-tuning of Sun et al. 2022, "Explain and improve: LRP-inference fine-tuning for image
captioning models". A word is predicted from the attended values and the hidden values. Their
relevance for the most probable word weighs them: values that support it count up to twice, values
against it down to nothing. The word is predicted once more from the weighted values, and both
predictions are trained.
"""

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float, Integer, PRNGKeyArray

from jaxrel.metrics.words import STOP_WORDS
from jaxrel.models import decoding
from jaxrel.models.captioner import Captioner
from jaxrel.models.captions import end_of_caption, special_ids
from jaxrel.propagation import composites
from jaxrel.propagation.composites import Composite
from jaxrel.propagation.lrp import lrp_vjp
from jaxrel.train.losses.captions import word_loss

WEIGHED = ("both", "attended", "hidden")


def content_words(
    tokenizer: Any, stop_words: Collection[str] = STOP_WORDS
) -> Bool[np.ndarray, " tokens"]:
    """Which tokens stand for something: all but stop words and special tokens.

    Args:
      tokenizer: of the model.
      stop_words: in lower case; the default is NLTK's English list.
    """
    tokens = tokenizer.convert_ids_to_tokens(range(len(tokenizer)))
    found = np.array([token.lower() not in stop_words for token in tokens])
    found[tokenizer.all_special_ids] = False
    return found


def relevance_weights(
    relevance: Float[Array, "*batch hidden"], *, temperature: float = 1.0
) -> Float[Array, "*batch hidden"]:
    """Weights from relevance, 1 + R / max|R| (Sun et al. 2022).

    Where all relevance is 0 the weights are those of no relevance: 1.

    Args:
      relevance: R; the maximum is over its last axis.
      temperature: t in t * R / max|R| + max(t, 1).

    Returns:
      Weights from 0 to 2 at temperature 1.
    """
    largest = jnp.abs(relevance).max(-1, keepdims=True)
    scaled = relevance / jnp.where(largest == 0, 1, largest)
    return temperature * scaled + max(temperature, 1.0)


@dataclass(frozen=True, eq=False)
class LRPInference:
    """How predictions are re-weighted.

    Args:
      explained: by token, whether a prediction of it is re-weighted; see `content_words`.
      temperature: see `relevance_weights`.
      weighed: which values are weighed, "both" as in the paper, "attended" or "hidden"; the
        weights of the others are 1.
      rules: of LRP, for the output layer, from attended and hidden values to logits.

    Raises:
      ValueError: another `weighed`.
    """

    explained: Bool[np.ndarray, " tokens"]
    temperature: float = 1.0
    weighed: str = "both"
    rules: Composite = field(default_factory=composites.captioning)

    def __post_init__(self) -> None:
        if self.weighed not in WEIGHED:
            raise ValueError(f"weighed must be one of {', '.join(WEIGHED)}, got {self.weighed!r}")

    def weights(
        self,
        model: Captioner,
        attended: Float[Array, "*batch hidden"],
        hidden: Float[Array, "*batch hidden"],
    ) -> tuple[Float[Array, "*batch hidden"], Float[Array, "*batch hidden"]]:
        """Return the weights of what attention found, and of the hidden values.

        What is explained is the most probable word, without dropout; the two have relevance
        apart. No gradient goes through the weights.

        Args:
          model: a captioner.
          attended, hidden: as `Captioner.read` gives them, for any number of words.
        """
        inputs = jax.lax.stop_gradient((model, attended, hidden))
        logits, explain = lrp_vjp(Captioner.word_logits, self.rules, argnums=(1, 2))(*inputs)
        word = logits.argmax(-1)
        chosen = jax.nn.one_hot(word, logits.shape[-1]) * jnp.asarray(self.explained)[word, None]
        of_attended, of_hidden = explain(chosen * logits)
        by_part = {"attended": of_attended, "hidden": of_hidden}
        attended, hidden = (
            relevance_weights(relevance, temperature=self.temperature)
            if self.weighed in ("both", part)
            else jnp.ones_like(relevance)
            for part, relevance in by_part.items()
        )
        return attended, hidden

    def logits(
        self,
        model: Captioner,
        attended: Float[Array, "*batch hidden"],
        hidden: Float[Array, "*batch hidden"],
        *,
        dropout_key: PRNGKeyArray | None = None,
    ) -> Float[Array, "*batch vocabulary"]:
        """Return the logits of the next word from the weighted values, float32.

        Args:
          model, attended, hidden: see `weights`.
          dropout_key: as of `Captioner.word_logits`, which drops the same values with it.
        """
        weights = self.weights(model, attended, hidden)
        attended, hidden = (
            (weight * x).astype(x.dtype)
            for weight, x in zip(weights, (attended, hidden), strict=True)
        )
        return model.word_logits(attended, hidden, dropout_key=dropout_key)

    def decoder(
        self, model: Captioner, features: Float[Array, "batch positions features"]
    ) -> tuple[decoding.Step, Any]:
        """Return `Captioner.decoder` of the re-weighted predictions, one caption per image."""
        context, first = model.start(features)

        def step(state: Any, words: Array) -> tuple[Any, Array]:
            state, read = model.read(context, state, model.embed(words))
            return state, self.logits(model, read.attended, read.hidden)

        return step, first


def lrp_inference_loss(
    model: Captioner,
    features: Float[Array, "batch positions features"],
    text: Integer[Array, "batch tokens"],
    inference: LRPInference,
    key: PRNGKeyArray | None = None,
    *,
    mixing: float = 0.5,
) -> tuple[Array, dict[str, Array]]:
    """The cross-entropy of the prediction, mixed with that of the re-weighted one.

    `mixing * CE(p) + (1 - mixing) * CE(p_hat)`, as in the paper; the reference implementation
    adds the two, which is twice this loss at a mixing of 0.5. States are not re-weighted: one
    pass over the captions gives both predictions. Both have the same dropout.

    Args:
      model: a captioner.
      features: of the images, as `encode` returns them, or of regions.
      text: one caption per image.
      inference: how predictions are re-weighted.
      key: for dropout; None: no dropout.
      mixing: weight of the plain prediction, from 0 to 1.

    Returns:
      The loss, and {"accuracy": the share of words that are predicted, "accuracy_reweighted",
      "loss_plain", "loss_reweighted"}.
    """
    text = text.astype(jnp.int32)
    _, end, _ = special_ids(model.processor.tokenizer)
    last = end_of_caption(text, end)
    # As `Captioner.__call__` divides the key: with a mixing of 1 this is the plain loss.
    inside, before_head = (None, None) if key is None else tuple(jax.random.split(key))
    read = model.teacher_forced(features, text[:, :-1], dropout_key=inside)
    values = (read.attended, read.hidden)
    plain, metrics = word_loss(model.word_logits(*values, dropout_key=before_head), text, last)
    again = inference.logits(model, *values, dropout_key=before_head)
    reweighted, of_again = word_loss(again, text, last)
    return mixing * plain + (1 - mixing) * reweighted, {
        **metrics,
        "accuracy_reweighted": of_again["accuracy"],
        "loss_plain": plain,
        "loss_reweighted": reweighted,
    }
