"""Self-critical training: the reference implementation's numbers, loops, and what is learnt."""

import collections
import functools
import math

import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp

from jaxrel.models import decoding
from jaxrel.models.captioner import Captioner
from jaxrel.train.losses.lrp_inference import LRPInference
from jaxrel.train.losses.scst import CiderReward, drawn, scst_loss, self_critical_loss
from tests.paths import FIXTURES
from tests.zoo.captioners import biased, captioner
from tests.zoo.images import random_images

FIXTURE = FIXTURES / "scst.npz"
FORM = decoding.Format(start=2, end=3, pad=0, context=7)
TOKENS = ["<pad>", "<unk>", "<start>", "<end>", "a", "red", "blue", "circle", "square"]
REFERENCES = [
    [["a", "red", "circle"], ["a", "circle"]],
    [["a", "blue", "square"], ["blue", "square"], ["a", "large", "square"]],
    [["red", "square"]],
]


@functools.cache
def golden():
    with np.load(FIXTURE, allow_pickle=False) as file:
        return {key: file[key] for key in file.files}


def whole(rows, end, pad, start):
    """Captions with their start and, where there is room before the last place, their end."""
    ids = np.full((len(rows), rows.shape[1] + 2), pad, np.int32)
    ids[:, 0] = start
    for row, words in zip(ids, rows, strict=True):
        length = int((words > 0).sum())
        row[1 : length + 1], row[length + 1] = words[:length], end
    return ids


# ---- the reward


def test_reward_as_the_reference():
    """There words are weighed in the batch, and the references alone have ends."""
    want = golden()
    words, (start, end) = want["word_list"], (18, 19)
    form = decoding.Format(start, end, 0, 11)
    references = [
        [words[row[(row > 0) & (row < 18)]].tolist() for row in image] for image in want["refs"]
    ]
    reward = CiderReward(references, words.tolist(), form, idf="batch", ends="references")
    captions = [whole(want[name], end, 0, start) for name in ("sampled", "greedy")]
    scores = reward(*captions, np.arange(4))
    # Scores are passed on in float32.
    np.testing.assert_allclose(
        scores.ravel(), want["cider_scores_sampled_then_greedy"], rtol=1e-6, atol=1e-6
    )
    np.testing.assert_allclose(scores[0] - scores[1], want["reward"][:, 0], rtol=1e-5)


def test_loss_and_gradient_as_the_reference():
    want = golden()
    text = whole(want["sampled"], 19, 0, 18)
    counted = drawn(jnp.asarray(text), decoding.Format(18, 19, 0, 11))[:, 1:-1]
    assert counted.sum(-1).tolist() == [9, 5, 5, 4]
    logs, reward = (
        jnp.asarray(want["sample_logprobs"]),
        jnp.asarray(want["reward"][:, 0], "float32"),
    )
    value, gradient = jax.value_and_grad(self_critical_loss)(logs, reward, counted)
    np.testing.assert_allclose(value, want["loss"], rtol=1e-5)
    np.testing.assert_allclose(gradient, want["grad_logprobs"], rtol=1e-5, atol=1e-7)


def naive_cider(candidate, references, corpus):
    """CIDEr-D (Vedantam et al. 2015) of one caption, in loops over n-grams."""

    def grams(words, n):
        return collections.Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))

    def weights(words, n):
        found = {}
        for gram, count in grams(words, n).items():
            df = sum(any(gram in grams(r, n) for r in image) for image in corpus)
            found[gram] = count * (math.log(len(corpus)) - math.log(max(df, 1)))
        return found

    total = 0.0
    for reference in references:
        for n in range(1, 5):
            c, r = weights(candidate, n), weights(reference, n)
            norm = math.sqrt(sum(x * x for x in c.values()) * sum(x * x for x in r.values()))
            dot = sum(min(c[g], r.get(g, 0)) * r.get(g, 0) for g in c)
            if norm:
                difference = len(candidate) - len(reference)
                total += dot / norm * math.exp(-(difference**2) / 72)
    return 10 * total / 4 / len(references)


@pytest.mark.parametrize("ends", ["both", "references", "neither"])
@pytest.mark.parametrize("idf", ["corpus", "batch"])
def test_reward_is_that_of_loops(idf, ends):
    reward = CiderReward(REFERENCES, TOKENS, FORM, idf=idf, ends=ends)
    captions = np.array(
        [
            [2, 4, 5, 7, 3, 0, 0],
            [2, 4, 6, 6, 8, 1, 3],  # cut off, with a word that is unknown
            [2, 3, 0, 0, 0, 0, 0],  # without words
        ]
    )
    images = np.array([0, 1, 1])
    scores = reward(captions, captions[::-1], images)
    assert (scores.shape, scores.dtype) == ((2, 3), np.float32)
    mine, its = ([["<end>"] if who else []][0] for who in (ends == "both", ends != "neither"))
    words = [["a", "red", "circle", *mine], ["a", "blue", "blue", "square", "<unk>"], mine]
    references = [[[*r, *its] for r in image] for image in REFERENCES]
    corpus = references if idf == "corpus" else [references[i] for i in (0, 1, 1) * 2]
    for found, rows in zip(scores, (words, words[::-1]), strict=True):
        expected = [
            naive_cider(row, references[i], corpus) for row, i in zip(rows, images, strict=True)
        ]
        # Scores are passed on in float32.
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)
    assert scores[0, 0] > 1


def test_stopping_too_early_is_worse():
    """As a caption without its last words, and as one that goes on for ever."""
    reward = CiderReward(REFERENCES, TOKENS, FORM)
    good, short, cut = [2, 4, 5, 7, 3, 0, 0], [2, 4, 5, 3, 0, 0, 0], [2, 4, 5, 7, 7, 7, 3]
    scores, _ = reward(*[np.array([good, short, cut])] * 2, np.zeros(3, int))
    assert scores[0] > max(scores[1:])


def test_bad_rewards():
    with pytest.raises(ValueError, match="idf must be one of corpus, batch, got 'val'"):
        CiderReward(REFERENCES, TOKENS, FORM, idf="val")
    with pytest.raises(ValueError, match="ends must be one of both, references, neither, got 'no'"):
        CiderReward(REFERENCES, TOKENS, FORM, ends="no")
    with pytest.raises(ValueError, match="the references of image 1 are"):
        CiderReward([*REFERENCES[:1], []], TOKENS, FORM)


# ---- the loss


def test_drawn_words():
    text = jnp.array([[2, 4, 5, 3, 0, 0, 0], [2, 4, 5, 7, 6, 5, 3], [2, 4, 5, 7, 6, 3, 0]])
    assert drawn(text, FORM).astype(int).tolist() == [
        [0, 1, 1, 1, 0, 0, 0],
        [0, 1, 1, 1, 1, 1, 0],
        [0, 1, 1, 1, 1, 1, 0],
    ]


class Recorded:
    """A reward of one's own that keeps what it was given."""

    def __init__(self):
        self.calls = []

    def __call__(self, sampled, greedy, images):
        self.calls.append((sampled, greedy, images))
        assert all(isinstance(ids, np.ndarray) for ids in self.calls[-1])
        return np.array([(ids == 5).sum(-1) for ids in (sampled, greedy)], np.float32)


INFERENCE = LRPInference(np.arange(11) != 4)


@functools.cache
def example(kind="aoa"):
    """A model, the features of eight images, and the images' indices."""
    # Logits as of a model that is unsure: those of the random values reach 46.
    model = biased(captioner(kind))
    model.head.kernel.set_value(0.1 * model.head.kernel[...])
    images = jnp.asarray(model.processor.image(random_images(8)))
    return model, jax.jit(Captioner.encode)(model, images), jnp.arange(8) + 3


@pytest.mark.parametrize("inference", [None, INFERENCE], ids=["scst", "lrp-scst"])
def test_the_loss_is_that_of_loops(inference, key):
    model, features, images = example()
    reward = Recorded()
    run = jax.jit(lambda m, x, key: scst_loss(m, x, images, reward, key, inference=inference))
    value, metrics = run(model, features, key)
    ((sampled, greedy, indices),) = reward.calls
    np.testing.assert_array_equal(indices, images)
    np.testing.assert_array_equal(greedy, jax.jit(Captioner.generate)(model, features))
    assert len({tuple(row) for row in sampled}) > 2

    @jax.jit
    def forced(model, features, text):
        read = model.teacher_forced(features, text)
        if inference is None:
            return model.word_logits(read.attended, read.hidden)
        return inference.logits(model, read.attended, read.hidden)

    logits = np.asarray(forced(model, features, sampled), np.float64)
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    total, count, right = 0.0, 0, 0
    for row, ids, baseline in zip(logs, sampled, greedy, strict=True):
        advantage = (ids == 5).sum() - (baseline == 5).sum()
        for place in range(1, len(ids) - 1):
            total += advantage * row[place - 1, ids[place]]
            right += row[place - 1].argmax() == ids[place]
            count += 1
            if ids[place] == 3:
                break
    # float32 logits in another program.
    np.testing.assert_allclose(value, -total / count, rtol=1e-4)
    np.testing.assert_allclose(metrics["accuracy"], right / count, rtol=1e-6)
    np.testing.assert_allclose(metrics["cider"], (sampled == 5).sum() / 8, rtol=1e-6)
    np.testing.assert_allclose(metrics["cider_greedy"], (greedy == 5).sum() / 8, rtol=1e-6)


@pytest.mark.parametrize("inference", [None, INFERENCE], ids=["scst", "lrp-scst"])
def test_captions_are_drawn_with_the_probabilities_that_are_trained(inference, key):
    """The log-probability while drawing is that of the pass that has the gradient."""
    model, features, _ = example("gridtd")

    @jax.jit
    def both(model, features, key):
        decoder = (inference or model).decoder(*((model,) if inference else ()), features)
        found = decoding.sample(*decoder, model.caption_format(), key)
        read = model.teacher_forced(features, found.ids)
        values = (read.attended, read.hidden)
        logits = inference.logits(model, *values) if inference else model.word_logits(*values)
        return found, jax.nn.log_softmax(logits)

    found, logs = both(model, features, key)
    logs, ids = np.asarray(logs, np.float64), np.asarray(found.ids)
    ends = (ids == 3).argmax(1)
    assert (ends < 8).sum() > 4
    for row, words, end, total in zip(logs, ids, ends, found.log_probability, strict=True):
        of_words = [row[i - 1, words[i]] for i in range(1, end + 1)]
        # float32 logits in another program.
        np.testing.assert_allclose(total, sum(of_words), rtol=1e-4)


def test_compiled_is_eager(key):
    model, features, images = example()
    compiled = jax.jit(lambda m, x: scst_loss(m, x, images, Recorded(), key))(model, features)
    eager = scst_loss(model, features, images, Recorded(), key)
    # float32 logits in another program; the captions are the same.
    for x, want in zip(jax.tree.leaves(compiled), jax.tree.leaves(eager), strict=True):
        np.testing.assert_allclose(x, want, rtol=1e-4, atol=1e-5)


def test_bfloat16(key):
    full, features, _ = example()
    text = jnp.asarray(full.generate(features))
    config = full.config.__class__(**{**vars(full.config), "dtype": "bfloat16"})
    half = nnx.merge(
        nnx.graphdef(nnx.eval_shape(lambda: Captioner(config, rngs=nnx.Rngs(0)))), nnx.state(full)
    )

    def loss(model):
        read = model.teacher_forced(features.astype(model.config.dtype), text)
        logs = jax.nn.log_softmax(INFERENCE.logits(model, read.attended, read.hidden))
        chosen = jnp.take_along_axis(logs[:, :-1], text[:, 1:, None], axis=-1)[..., 0]
        counted = drawn(text, full.caption_format())[:, 1:]
        return jnp.stack([self_critical_loss(chosen, row, counted) for row in jnp.eye(8)])

    # By caption: over all, rewards of both signs add up to almost nothing.
    values = [jax.jit(loss)(model) for model in (half, full)]
    # 8 bits of precision in the values, and weights from 0 to 2 that follow them.
    np.testing.assert_allclose(values[0], values[1], rtol=0.1)
    assert (values[0] != values[1]).any()


@pytest.mark.parametrize("inference", [None, INFERENCE], ids=["scst", "lrp-scst"])
def test_what_is_rewarded_is_learnt(inference):
    """The word 5 becomes frequent."""
    model, features, images = example()
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def step(params, key):
        def loss(params):
            now = nnx.merge(graph, params, rest)
            return scst_loss(now, features, images, Recorded(), key, inference=inference)

        (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params)
        return jax.tree.map(lambda p, g: p - 0.002 * g, params, grads), metrics["cider"]

    found = []
    for i in range(30):
        params, mean = step(params, jax.random.key(i))
        found.append(float(mean))
    assert np.mean(found[-5:]) > np.mean(found[:5]) + 1
