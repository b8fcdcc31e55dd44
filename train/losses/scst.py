"""Self-critical sequence training (Rennie et al. 2017), with CIDEr-D as the reward.

A caption is drawn from the model, and its reward is how much better it is than the greedy one.
The captions are written on the device and judged on the host, all inside the one compiled step
(`jax.pure_callback`). A step then depends on nothing but its parameters, batch and key, so that a
stopped training resumes bit by bit, and no caption comes from older parameters. The device waits
while the host judges: on one core 20 ms for two captions of 64 images of Shapes, five references
each. The host reads the next examples while the device computes.
"""

from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax import numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Integer, PRNGKeyArray

from jaxrel.metrics.caption_scores import CiderD, TfIdf, Tokens
from jaxrel.models import decoding
from jaxrel.models.captioner import Captioner
from jaxrel.models.captions import end_of_caption, logit_by_token
from jaxrel.models.tokenizer import END
from jaxrel.train.losses.lrp_inference import LRPInference

IDFS = ("corpus", "batch")
ENDS = ("both", "references", "neither")

# (sampled ids, greedy ids, indices of images) -> the scores of both, [2, batch], float32.
Reward = Callable[[np.ndarray, np.ndarray, np.ndarray], np.ndarray]


class CiderReward:
    """CIDEr-D of captions that are given as ids: what the host computes.

    Words are weighed by their frequency in all references ("corpus"). The reference
    implementation of Sun et al. 2022 has only those of the batch, each image counted twice
    ("batch"): there a word's weight depends on what else is in the batch.

    The end of a caption counts as a word, so that a caption that stops too early or never is
    worse. A caption that was cut off has none. In the reference implementation only the
    references have it ("references"), and their last n-grams can never be met.

    A token that no reference has, such as that of unknown words, is a wrong word.

    Args:
      references: of each image, split into words, without an end.
      tokens: by id.
      form: how captions are written.
      idf: "corpus" or "batch".
      ends: who has the end: "both", "references" or "neither".

    Raises:
      ValueError: another `idf` or `ends`; what `CiderD.from_references` says of the references.
    """

    def __init__(
        self,
        references: Sequence[Sequence[Tokens]],
        tokens: Sequence[str],
        form: decoding.Format,
        *,
        idf: str = "corpus",
        ends: str = "both",
    ) -> None:
        for name, value, known in (("idf", idf, IDFS), ("ends", ends, ENDS)):
            if value not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, got {value!r}")
        last = [] if ends == "neither" else [END]
        self._references = [[[*words, *last] for words in image] for image in references]
        self._tokens, self._form = np.asarray(tokens), form
        self._last = [END] if ends == "both" else []
        self._corpus = CiderD.from_references(self._references) if idf == "corpus" else None

    def words(self, ids: Integer[np.ndarray, " context"]) -> list[str]:
        """Return the words of a caption, and its end if that counts and the model wrote it."""
        places = np.flatnonzero(ids[1:] == self._form.end)
        end = 1 + places[0] if places.size else len(ids)
        # At the last place there is no choice: see `jaxrel.models.decoding`.
        cut = end >= self._form.context - 1
        return [*self._tokens[ids[1:end]].tolist(), *([] if cut else self._last)]

    def __call__(
        self,
        sampled: Integer[np.ndarray, "batch context"],
        greedy: Integer[np.ndarray, "batch context"],
        images: Integer[np.ndarray, " batch"],
    ) -> Float[np.ndarray, "2 batch"]:
        """Return the scores of sampled and of greedy captions, from 0 to 10.

        Args:
          sampled, greedy: captions with start, end and padding.
          images: the index of each caption's image in the references.
        """
        references = [self._references[i] for i in images]
        cider = self._corpus or CiderD.from_references([*references, *references])
        # Once for both captions of an image.
        weighed: list[list[TfIdf]] = [[cider.weigh(r) for r in several] for several in references]
        captions = [[self.words(row) for row in ids] for ids in (sampled, greedy)]
        return np.array([cider.score(words, weighed) for words in captions], np.float32)


def self_critical_loss(
    log_probability: Float[Array, "batch tokens"],
    reward: Float[Array, " batch"],
    counted: Bool[Array, "batch tokens"],
) -> Float[Array, ""]:
    """Minus the mean over words of log p times the caption's reward (Rennie et al. 2017, eq. 8).

    Its gradient is an estimate of that of minus the expected reward.

    Args:
      log_probability: of each token of the sampled captions.
      reward: of each caption: its score less that of the greedy caption.
      counted: the tokens that the model has drawn: words and end.
    """
    weighed = jnp.where(counted, log_probability * reward[:, None], 0)
    return -weighed.sum() / jnp.maximum(counted.sum(), 1)


def drawn(text: Int[Array, "batch context"], form: decoding.Format) -> Bool[Array, "batch context"]:
    """Which tokens of captions the model has chosen: all words, and an end that it wrote itself.

    The start is given, and at the last place of the context there is no choice.
    """
    place = jnp.arange(text.shape[1])
    last = end_of_caption(text, form.end)[:, None]
    return (place >= 1) & (place <= last) & (place < form.context - 1)


def scst_loss(
    model: Captioner,
    features: Float[Array, "batch positions features"],
    images: Integer[Array, " batch"],
    reward: Reward,
    key: PRNGKeyArray,
    *,
    inference: LRPInference | None = None,
) -> tuple[Array, dict[str, Array]]:
    """Draw a caption for each image, judge it, and return the loss that makes it as likely.

    There is no dropout: the probabilities that captions are drawn with are those that are
    trained. (The reference implementation samples with dropout.)

    With `inference` the caption is drawn from the re-weighted predictions, whose probabilities
    are trained then; the greedy caption that it is compared with is the plain model's, as in
    Sun et al. 2022.

    Args:
      model: a captioner.
      features: of the images, as `encode` returns them, or of regions.
      images: the index of each image in the references of the reward.
      reward: what the host computes, such as a `CiderReward`.
      key: for the captions.
      inference: how predictions are re-weighted; None: not at all.

    Returns:
      The loss, and {"accuracy": the share of drawn tokens that were the most probable, "cider"
      and "cider_greedy": the mean scores of drawn and of greedy captions}.
    """
    form = model.caption_format()
    still, seen = jax.lax.stop_gradient((model, features))
    greedy = decoding.greedy(*still.decoder(seen), form).ids
    decoder = still.decoder(seen) if inference is None else inference.decoder(still, seen)
    sampled = decoding.sample(*decoder, form, key).ids
    scores = jax.ShapeDtypeStruct((2, len(images)), jnp.float32)
    of_sampled, of_greedy = jax.pure_callback(
        # A callback is given arrays of JAX's; inside it, their operations could wait for it.
        lambda *ids: reward(*map(np.asarray, ids)),
        scores,
        sampled,
        greedy,
        images,
    )

    read = model.teacher_forced(features, sampled)
    values = (read.attended, read.hidden)
    logits = model.word_logits(*values) if inference is None else inference.logits(model, *values)
    counted = drawn(sampled, form)
    log_probability = logit_by_token(jax.nn.log_softmax(logits), sampled)
    value = self_critical_loss(log_probability, of_sampled - of_greedy, counted)
    predicted = (jnp.roll(logits.argmax(-1), 1, axis=1) == sampled) & counted
    return value, {
        "accuracy": predicted.sum() / counted.sum(),
        "cider": of_sampled.mean(),
        "cider_greedy": of_greedy.mean(),
    }
