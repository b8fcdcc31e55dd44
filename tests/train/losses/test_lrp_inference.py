"""LRP-inference: equal to the reference implementation, to loops over words, and to itself."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp

from jaxrel.metrics.words import STOP_WORDS
from jaxrel.models import decoding
from jaxrel.models.captioner import Captioner, reference_order
from jaxrel.models.captioner.cells import SentinelLSTM
from jaxrel.train.losses.captions import caption_loss
from jaxrel.train.losses.lrp_inference import (
    LRPInference,
    content_words,
    lrp_inference_loss,
    relevance_weights,
)
from tests.paths import FIXTURES
from tests.zoo.captioners import TEXTS, captioner, reference, reference_config, tensors
from tests.zoo.images import random_images

FIXTURE = FIXTURES / "lrp_inference.npz"
# The gate of the sentinel reads the hidden values before in the paper; where predictions are
# re-weighted, the reference implementation has those after.
CASES = [
    ("gridtd", "paper"),
    ("gridtd", "coded"),
    ("gridtd_regions", "paper"),
    ("gridtd_regions", "coded"),
    ("aoa", "paper"),
    ("aoa_regions", "paper"),
]
WITH_GRADIENTS = [case for case in CASES if case not in (CASES[0], CASES[2])]


class CodedSentinel(SentinelLSTM):
    """Its gate reads the hidden values after the step."""

    def __call__(self, state, x):
        state = self.lstm(state, x)
        gate = jax.nn.sigmoid(self.gate(jnp.concatenate([x, state[0]], axis=-1)))
        return state, gate * jnp.tanh(state[1])


@functools.cache
def golden(name, form):
    """What the reference implementation gives, with its vocabulary in the order of ours."""
    with np.load(FIXTURE, allow_pickle=False) as file:
        start = f"{name}/{form}/"
        found = {k.removeprefix(start): file[k] for k in file.files if k.startswith(start)}
    for key in ("predictions", "weighted_predictions"):
        found[key] = found[key][..., reference_order(20)]
    return found


@functools.cache
def case(name, form):
    """A model, the features of its images, whole captions, and what is re-weighted."""
    model, inputs = reference(name)
    if form == "coded":
        model, plain = nnx.clone(model), model.cell.lstm
        model.cell.lstm = CodedSentinel(1, 1, dtype=jnp.float32, rngs=nnx.Rngs(0))
        model.cell.lstm.lstm, model.cell.lstm.gate = plain.lstm, plain.gate
    features = jax.jit(lambda model, inputs: model._features(inputs))(model, inputs)
    # The last token, which is only predicted, is the longest caption's end.
    ends = np.array([[3], [0], [0]], np.int32)
    text = jnp.concatenate([inputs["text"], ends], axis=1)
    return model, features, text, LRPInference(content_words(model.processor.tokenizer))


@functools.partial(jax.jit, static_argnames="inference")
def predicted(model, features, text, *, inference):
    """Predictions, weights, re-weighted predictions, and the loss."""
    read = model.teacher_forced(features, text[:, :-1])
    values = (read.attended, read.hidden)
    return (
        model.word_logits(*values),
        inference.weights(model, *values),
        inference.logits(model, *values),
        lrp_inference_loss(model, features, text, inference),
    )


def gradients(loss, model):
    """The value of a loss, its metrics, and the gradient of the parameters."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    @jax.jit
    def run(params, rest):
        return jax.value_and_grad(lambda p: loss(nnx.merge(graph, p, rest)), has_aux=True)(params)

    return run(params, rest)


def close(actual, expected, least=0.0):
    """Within 1e-4 of the largest value, which is the parity that is asked for."""
    expected = np.asarray(expected)
    atol = 1e-4 * np.abs(expected).max() + least
    np.testing.assert_allclose(actual, expected, rtol=0, atol=atol)


@pytest.mark.parametrize(("name", "form"), CASES)
def test_predictions_as_the_reference(name, form):
    """It has no dropout in this pass here, and so no masks that differ."""
    model, features, text, inference = case(name, form)
    want = golden(name, form)
    logits, weights, again, (value, metrics) = predicted(model, features, text, inference=inference)
    close(logits, want["predictions"])
    close(weights[0], want["weight_attended"])
    close(weights[1], want["weight_hidden"])
    close(again, want["weighted_predictions"])
    close(metrics["loss_plain"], want["loss_standard"])
    close(metrics["loss_reweighted"], want["loss_lrp"])
    # It adds the two losses, and a mixing of 0.5 takes their mean.
    close(2 * value, want["loss_standard"] + want["loss_lrp"])


@pytest.mark.parametrize(("name", "form"), WITH_GRADIENTS)
def test_gradients_as_the_reference(name, form):
    """Gradients have names and shapes of parameters, and are merged as these are."""
    model, features, text, inference = case(name, form)
    _, gradient = gradients(lambda m: lrp_inference_loss(m, features, text, inference), model)
    want = {k.removeprefix("grad/"): x for k, x in golden(name, form).items() if "grad/" in k}
    # Two biases that add up have the gradient of their sum each: one of them is it.
    want |= {
        k: np.zeros_like(x)
        for k, x in want.items()
        if k.endswith(("_hh", "h_gate.bias")) and x.ndim == 1
    }
    encoder = {k: x for k, x in tensors(name).items() if k.startswith("img_encoder")}
    expected = Captioner.from_reference(reference_config(name), want | encoder)
    expected = dict(nnx.to_flat_state(nnx.state(expected, nnx.Param)))
    # Features are given: the encoder has no gradient.
    found = [(path, x) for path, x in nnx.to_flat_state(gradient) if path[0] != "encoder"]
    assert len(found) > 10
    for path, x in found:
        # Of the bias of keys it is 0, and float32 rounds sums of values near 1.
        close(2 * x[...], expected[path][...], least=1e-7)


@pytest.mark.parametrize("name", ["gridtd", "gridtd_regions", "aoa", "aoa_regions"])
def test_captions_from_reweighted_predictions_as_the_reference(name):
    model, features, _, inference = case(name, "paper")
    want = golden(name, "paper")

    @jax.jit
    def write(model, features):
        step, state = inference.decoder(model, features)
        return decoding.greedy(step, state, model.caption_format())

    found = write(model, features)
    theirs = np.argsort(reference_order(20))[want["greedy_seq"]]
    for row, ids in zip(np.asarray(found.ids)[:, 1:], theirs, strict=True):
        words = row[row > 3].tolist()
        assert words == ids[ids > 0].tolist()
    # The end is the first 0 there, with its own log-probability; what follows does not count.
    counted = np.cumsum(theirs == 0, axis=1) - (theirs == 0) == 0
    total = (want["greedy_logprobs"] * counted).sum(-1)
    np.testing.assert_allclose(found.log_probability, total, rtol=1e-4)


# ---- loops


def stabilised(z):
    return z + np.where(z >= 0, 0.01, -0.01)


def naive_weights(kernel, bias, attended, hidden, explained, temperature):
    """Of one word, in float64: the equations of Sun et al. 2022 with epsilon 0.01."""
    summed = attended + hidden
    logits = summed @ kernel + bias
    word = logits.argmax()
    weights = []
    for part in (attended, hidden):
        relevance = np.zeros(len(part))
        if explained[word]:
            for j in range(len(part)):
                message = summed[j] * kernel[j, word] * logits[word] / stabilised(logits[word])
                relevance[j] = part[j] * message / stabilised(summed[j])
        largest = np.abs(relevance).max() or 1.0
        weights.append(temperature * relevance / largest + max(temperature, 1.0))
    return weights


@functools.partial(jax.jit, static_argnames="inference")
def weights_of(model, attended, hidden, *, inference):
    return inference.weights(model, attended, hidden)


@functools.cache
def values():
    """Attended and hidden values of seven words of each of two images."""
    rng = np.random.default_rng(2)
    return tuple(rng.normal(size=(2, 7, 8)).astype(np.float32) for _ in range(2))


@pytest.mark.parametrize("temperature", [1.0, 0.5, 2.0])
def test_weights_are_those_of_loops(temperature):
    model, (attended, hidden) = captioner("aoa"), values()
    explained = np.arange(11) % 3 > 0
    inference = LRPInference(explained, temperature)
    found = weights_of(model, attended, hidden, inference=inference)
    kernel, bias = (np.asarray(x[...], np.float64) for x in (model.head.kernel, model.head.bias))
    words = ((attended + hidden) @ kernel + bias).argmax(-1)
    assert 0 < explained[words].sum() < words.size
    for i in np.ndindex(2, 7):
        expected = naive_weights(kernel, bias, attended[i], hidden[i], explained, temperature)
        for x, want in zip(found, expected, strict=True):
            # float32, and sums near 0 that relevance is divided by.
            np.testing.assert_allclose(x[i], want, rtol=0, atol=1e-4)
            if not explained[words[i]]:
                np.testing.assert_array_equal(x[i], max(temperature, 1.0))


@pytest.mark.parametrize("weighed", ["attended", "hidden"])
def test_one_part_alone_is_weighed(weighed):
    model, (attended, hidden) = captioner("aoa"), values()
    both = weights_of(model, attended, hidden, inference=LRPInference(np.ones(11, bool)))
    one = LRPInference(np.ones(11, bool), weighed=weighed)
    found = weights_of(model, attended, hidden, inference=one)
    for part, x, usual in zip(("attended", "hidden"), found, both, strict=True):
        assert np.ptp(usual) > 0.5
        np.testing.assert_array_equal(x, usual if part == weighed else 1)


def test_unknown_parts():
    with pytest.raises(ValueError, match="weighed must be one of both, attended, hidden, got 'x'"):
        LRPInference(np.ones(11, bool), weighed="x")


def test_weights_of_relevance():
    relevance = jnp.array([[2.0, -4.0, 0.0], [0.0, 0.0, 0.0], [-1e-30, 0.0, 1e-30]])
    found = relevance_weights(relevance)
    np.testing.assert_array_equal(found, [[1.5, 0, 1], [1, 1, 1], [0, 1, 2]])
    np.testing.assert_array_equal(relevance_weights(relevance[:1], temperature=3.0), [[4.5, 0, 3]])
    np.testing.assert_array_equal(
        relevance_weights(relevance[:1], temperature=0.5), [[1.25, 0.5, 1]]
    )


def test_a_batch_is_one_by_one_and_compiled_is_not():
    model, (attended, hidden) = captioner("aoa"), values()
    inference = LRPInference(np.ones(11, bool))
    found = weights_of(model, attended, hidden, inference=inference)
    eager = inference.weights(model, jnp.asarray(attended), jnp.asarray(hidden))
    one = weights_of(model, attended[1, 3], hidden[1, 3], inference=inference)
    for x, other, alone in zip(found, eager, one, strict=True):
        # The same float32 arithmetic, in products of another shape.
        np.testing.assert_allclose(x, other, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(x[1, 3], alone, rtol=1e-5, atol=1e-5)


def test_bfloat16():
    full = captioner("gridtd")
    config = full.config.__class__(**{**vars(full.config), "dtype": "bfloat16"})
    half = nnx.merge(
        nnx.graphdef(nnx.eval_shape(lambda: Captioner(config, rngs=nnx.Rngs(0)))), nnx.state(full)
    )
    inference = LRPInference(np.ones(11, bool))
    kept = tuple(jnp.asarray(x, jnp.bfloat16) for x in values())
    exact = tuple(x.astype(jnp.float32) for x in kept)
    found = weights_of(half, *kept, inference=inference)
    expected = weights_of(full, *exact, inference=inference)
    words = [np.asarray(m.word_logits(*x).argmax(-1)) for m, x in ((half, kept), (full, exact))]
    same = words[0] == words[1]
    assert same.mean() > 0.9
    for x, want in zip(found, expected, strict=True):
        assert x.dtype == jnp.float32
        # 8 bits of precision in sums near 0, which relevance is divided by; weights are 0 to 2.
        error = np.abs(x - want)[same]
        assert error.max() < 0.1
        assert 1e-5 < error.mean() < 0.01


# ---- the loss


@functools.cache
def example():
    """A model, features and captions."""
    model = captioner("aoa")
    inputs = model.prepare(image=random_images(), text=TEXTS)
    features = jax.jit(Captioner.encode)(model, inputs["image"])
    return model, features, inputs["text"]


def test_mixing_of_one_is_the_plain_loss(key):
    """With the same dropout, of the values and of the attention."""
    model, features, text = example()
    inference = LRPInference(np.ones(11, bool))

    def mixed(model):
        return lrp_inference_loss(model, features, text, inference, key, mixing=1.0)

    (value, metrics), gradient = gradients(mixed, model)
    (plain, _), expected = gradients(lambda m: caption_loss(m, features, text, key), model)
    # The same float32 sums, in another program.
    np.testing.assert_allclose(value, plain, rtol=1e-6)
    np.testing.assert_allclose(metrics["loss_plain"], plain, rtol=1e-6)
    # float32 sums, in another order.
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), gradient, expected)
    assert abs(metrics["loss_reweighted"] - plain) > 1e-3


def test_both_predictions_have_the_same_dropout(key):
    """Where nothing is re-weighted they are equal."""
    model, features, text = example()
    inference = LRPInference(np.zeros(11, bool))
    run = jax.jit(lambda model, key: lrp_inference_loss(model, features, text, inference, key))
    value, metrics = run(model, key)
    assert value == metrics["loss_plain"] == metrics["loss_reweighted"]
    assert metrics["accuracy"] == metrics["accuracy_reweighted"]
    assert run(model, jax.random.key(1))[0] != value


def test_weights_are_constants():
    """The gradient of the values is that of a linear map of the weighted values."""
    model, read = captioner("aoa"), tuple(map(jnp.asarray, values()))
    inference = LRPInference(np.ones(11, bool))
    direction = np.random.default_rng(3).normal(size=(2, 7, 11)).astype(np.float32)

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1, 2))
    def gradient(attended, hidden, kernel):
        still = nnx.clone(model)
        still.head.kernel.set_value(kernel)
        return (inference.logits(still, attended, hidden) * direction).sum()

    kernel = model.head.kernel[...]
    found = gradient(*read, kernel)
    weights = weights_of(model, *read, inference=inference)
    weighted = sum(weight * x for weight, x in zip(weights, read, strict=True))
    # float32 products of eager and compiled programs.
    for x, weight in zip(found, weights, strict=False):
        np.testing.assert_allclose(x, weight * (direction @ kernel.T), rtol=1e-4, atol=1e-4)
    of_kernel = np.einsum("bth,btv->hv", weighted, direction)
    np.testing.assert_allclose(found[2], of_kernel, rtol=1e-4, atol=1e-4)


# ---- words


def test_stop_words_and_special_tokens_are_not_explained():
    tokenizer = captioner("aoa").processor.tokenizer
    tokens = tokenizer.convert_ids_to_tokens(range(11))
    found = dict(zip(tokens, content_words(tokenizer).tolist(), strict=True))
    not_explained = {word for word, explained in found.items() if not explained}
    assert not_explained == {"<pad>", "<unk>", "<start>", "<end>", "a", "above"}
    own = content_words(tokenizer, {"red", "circle"})
    assert [t for t, explained in zip(tokens, own, strict=True) if not explained][4:] == [
        "red",
        "circle",
    ]


def test_the_list_of_stop_words():
    assert all(word == word.lower().strip() for word in STOP_WORDS)
    assert {"a", "the", "of", "with", "is", "and", "it"} <= STOP_WORDS
    # Words that are seen in an image are explained.
    assert not STOP_WORDS & {"one", "two", "left", "right", "red", "man", "people", "top", "can't"}
