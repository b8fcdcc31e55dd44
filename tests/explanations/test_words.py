"""Relevance of captions' words: equal to the reference implementation's, and its properties."""

import dataclasses

import jax
import numpy as np
import pytest
from jax import numpy as jnp

import jaxrel
import jaxrel.explanations.words as word_relevance_module
from jaxrel import composites, everything, path, rules
from jaxrel.explanations.words import WORD_METHODS, word_relevance
from jaxrel.models.captioner import reference_order
from tests.paths import FIXTURES
from tests.zoo.captioners import TEXTS, captioner, reference
from tests.zoo.images import random_images

FIXTURE = FIXTURES / "word_relevance.npz"
KINDS = ("gridtd", "adaptive", "aoa")


@pytest.fixture(scope="module")
def golden():
    with np.load(FIXTURE, allow_pickle=False) as file:
        return dict(file)


def explained(kind, golden):
    """The model, and the caption of the first image that was explained."""
    model, inputs = reference(kind)

    ids = np.argsort(reference_order(20))[golden[f"{kind}/ids"]]
    return model, {"image": jnp.asarray(inputs["image"][:1]), "text": jnp.asarray(ids)[None]}


def every_word(inputs):
    return jnp.broadcast_to(jnp.arange(1, inputs["text"].shape[1]), (len(inputs["text"]), 6))


# ---- the reference implementation, without its defects


def assert_close(found, expected, name=""):
    # float32 through a CNN, 12 LSTM steps and denominators of at least 0.01.
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * scale, err_msg=name)


def assert_same_words(found, expected):
    """Each row divided by its largest value; a row is as long as the caption before its word."""
    found = np.asarray(found)[:, : expected.shape[1]]
    assert_close(found / np.abs(found).max(1, keepdims=True), expected)


# Where the reference of "adaptive" leaves the bias out of the denominator.
WITHOUT_BIAS = jaxrel.Composite(
    [(path("project") | path("cell/image"), rules.Epsilon(0.01, bias="ignored"))]
)


def heads_of(kind):
    return (0, 1) if kind == "aoa" else (None,)


@pytest.mark.parametrize("kind", KINDS)
def test_lrp(kind, golden):
    model, inputs = explained(kind, golden)
    lrp = composites.captioning()
    lrp = WITHOUT_BIAS + lrp if kind == "adaptive" else lrp
    for head in heads_of(kind):
        chosen = {} if head is None else {"heads": jnp.arange(2)[None] == head}
        where = f"{kind}/lrp/" if head is None else f"{kind}/lrp/head{head}/"
        score, found = word_relevance(
            model, inputs | chosen, every_word(inputs), method=("lrp",), lrp=lrp
        )
        image, words = found["lrp"]
        assert_close(image[0], golden[f"{where}r_img"].sum(1), where)
        if f"{where}r_words" in golden:
            assert_same_words(words[0], golden[f"{where}r_words"])
        np.testing.assert_allclose(score[0], model.word_scores(inputs)[0, 1:], rtol=1e-5)


@pytest.mark.parametrize("kind", ["gridtd", "aoa"])
def test_lrp_of_the_features(kind, golden):
    model, inputs = explained(kind, golden)

    def scores(model, inputs):
        return model.word_scores(inputs)[:, 1:]

    value, explain = jaxrel.lrp_vjp(scores, composites.captioning(), argnums=None, at="features")(
        model, inputs | ({"heads": jnp.array([[True, False]])} if kind == "aoa" else {})
    )
    found = jax.vmap(explain)(jnp.eye(6)[:, None] * value)["features"][:, 0]
    where = "head0/" if kind == "aoa" else ""
    assert_close(found.transpose(0, 3, 1, 2), golden[f"{kind}/lrp/{where}r_img_feature"])


@dataclasses.dataclass(frozen=True)
class Unchanged(rules.ActivationRule):
    """The cotangent itself: as if the ReLU were not there."""

    def elementwise(self, f, x, c):
        return c


def is_relu(operation):
    return getattr(operation, "is_relu", False)


# The reference's gradients: attention weights and the sentinel's gate are constants, and the ReLUs
# of the two projections are left out.
AS_CODED = jaxrel.Composite(
    [
        (jaxrel.op("softmax"), rules.Stop()),
        (lambda operation: "cell/lstm/gate/kernel" in operation.paths, rules.Stop()),
        (is_relu, Unchanged()),
        (everything(), rules.Gradient()),
    ]
)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_as_coded(kind, golden):
    model, inputs = explained(kind, golden)
    features = model.encode(inputs["image"])

    def scores(model, features, rest):
        return model.word_scores({"features": features, **rest})[:, 1:]

    for head in heads_of(kind):
        rest = {"text": inputs["text"]}
        where = "" if head is None else f"head{head}/"
        rest |= {} if head is None else {"heads": jnp.arange(2)[None] == head}
        value, explain = jaxrel.lrp_vjp(
            scores, AS_CODED, argnums=1, at="text/tokens", gradient=True
        )(model, features, rest)
        found, words = jax.vmap(explain)(jnp.eye(value.shape[1])[:, None])
        expected = golden[f"{kind}/gradient/{where}d_img_feature"]
        assert_close(found[:, 0].swapaxes(1, 2).reshape(expected.shape), expected, where)
        assert_same_words(
            words["text/tokens"][:, 0].sum(-1), golden[f"{kind}/gradient/{where}r_words"]
        )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("method", ["gradient", "guided_backprop"])
def test_from_the_features_to_the_pixels(kind, method, golden):
    model, inputs = explained(kind, golden)
    where = "head0/" if kind == "aoa" else ""
    given = jnp.asarray(golden[f"{kind}/{method}/{where}d_img_feature"]).transpose(0, 2, 3, 1)
    rule = rules.Guided() if method == "guided_backprop" else rules.Gradient()
    _, explain = jaxrel.lrp_vjp(
        lambda encoder, image: encoder(image),
        [(is_relu, rule), (everything(), rules.Gradient())],
        argnums=1,
        gradient=True,
    )(model.encoder, inputs["image"])
    found = jax.vmap(explain)(given[:, None])[:, 0]
    assert_close(found.transpose(0, 3, 1, 2), golden[f"{kind}/{method}/{where}img"])


# ---- properties, on a small model of each kind


@pytest.fixture(scope="module", params=KINDS)
def small(request):
    model = captioner(request.param)
    inputs = model.prepare(image=random_images(), text=TEXTS)
    positions = jnp.array([[5, 2, 1], [3, 1, 0]])
    return model, inputs, positions


@pytest.fixture(scope="module")
def relevance(small):
    return word_relevance(*small, method=WORD_METHODS)


def test_shapes_and_what_is_not_asked(small, relevance):
    model, inputs, positions = small
    score, found = relevance
    assert list(found) == list(WORD_METHODS)
    of_word = np.take_along_axis(np.asarray(model.word_scores(inputs)), np.asarray(positions), 1)
    np.testing.assert_allclose(score[0], of_word[0], rtol=1e-5, atol=1e-6)
    for name, (image, words) in found.items():
        grid = model.config.grid if name in ("grad_cam", "attention") else (16, 16)
        assert image.shape == (2, 3, *grid)
        assert words.shape == (2, 3, inputs["text"].shape[1])
        assert image.dtype == words.dtype == jnp.float32
        # Position 0 asks for nothing, and what comes after a word has nothing to do with it.
        assert not image[1, 2].any()
        assert not words[1, 2].any()
        assert not words[0, 1, 2:].any()
        assert image[0].any()


def close(found, expected):
    for one, two in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        scale = float(jnp.abs(two).max()) or 1.0
        # float32, in a program of another batch.
        np.testing.assert_allclose(one, two, rtol=0, atol=2e-5 * scale)


def test_one_by_one_and_some_at_once(small, relevance):
    model, inputs, positions = small
    _, found = relevance
    _, apart = word_relevance(model, inputs, positions, method=WORD_METHODS, at_once=2)
    close(apart, found)
    for i in range(2):
        alone = {name: value[i : i + 1] for name, value in inputs.items()}
        _, one = word_relevance(model, alone, positions[i : i + 1], method=WORD_METHODS)
        close(one, jax.tree.map(lambda x, i=i: x[i : i + 1], found))


def test_gradients_are_those_of_jax(small, relevance):
    model, inputs, positions = small
    _, found = relevance

    def logit(image):
        by_token = model.word_scores({**inputs, "image": image})
        return by_token[jnp.arange(2), positions[:, 0]].sum()

    gradient = jax.jit(jax.grad(logit))(inputs["image"])
    close(found["gradient"][0][:, 0], gradient.sum(-1))
    close(found["input_x_gradient"][0][:, 0], (gradient * inputs["image"]).sum(-1))


def test_attention_is_the_mean_of_heads(small, relevance):
    model, inputs, positions = small
    maps = model.attention_maps(inputs)["attention"].mean(2)
    expected = maps[0, positions[0, 0]].reshape(model.config.grid)
    np.testing.assert_allclose(relevance[1]["attention"][0][0, 0], expected, rtol=1e-5)


def test_guided_grad_cam_is_a_product(small, relevance):
    _, found = relevance
    cam = jax.image.resize(found["grad_cam"][0], (2, 3, 16, 16), "bilinear")
    close(found["guided_grad_cam"][0], found["guided_backprop"][0] * cam)


def test_the_same_question_is_compiled_once(small, relevance):
    model, inputs, positions = small
    compiled = word_relevance_module._word_relevance._cache_size()
    word_relevance(model, inputs, positions, method=WORD_METHODS)
    assert word_relevance_module._word_relevance._cache_size() == compiled


def test_other_rules(small, relevance):
    model, inputs, positions = small
    everywhere = rules.Gradient()
    _, found = word_relevance(model, inputs, positions, method=("lrp",), lrp=everywhere)
    # x * gradient, computed as relevance or as a product.
    close(found["lrp"], relevance[1]["input_x_gradient"])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"method": ("magic",)}, r"unknown method 'magic'; known are lrp, gradient"),
        ({"method": ()}, r"unknown method \(none given\)"),
        ({"at_once": 0}, r"at_once must be 1 or more, got 0"),
    ],
)
def test_options_that_do_not_fit(small, options, match):
    with pytest.raises(ValueError, match=match):
        word_relevance(*small, **options)


def test_positions_that_do_not_fit(small):
    model, inputs, _ = small
    with pytest.raises(ValueError, match=r"positions must be \[batch, words\] with batch 2, got"):
        word_relevance(model, inputs, jnp.array([1, 2]))


# ---- explain


def test_explain_captions(small, relevance):
    model = small[0]
    found = relevance[1]
    asked = {"image": random_images(), "text": TEXTS, "target": [2, 1]}
    maps = [jaxrel.explain(model, **asked, method=method) for method in ("lrp", "attention")]
    for one in maps:
        assert one.report["example"] == [0, 0, 1, 1]
        assert one.target[:2] == ("a [small]", "[a]")
        image, words = found[one.method]
        close(one.image[:2], image[0, 1:])
        close(one.image[3], image[1, 1])
        # The start token has relevance too, and is not shown.
        close(one.text[0, 1], words[0, 1, 1])
        assert not one.text[:, 0].any()
        assert one.signed == (one.method == "lrp")
    texts = ["a small circle", "a blue square"]  # as short as what is asked above
    whole = jaxrel.explain(model, image=random_images(), text=texts)
    assert (whole.method, len(whole)) == ("lrp", 6)


def test_explain_what_the_model_writes(small):
    model, _, _ = small
    one = jaxrel.explain(model, image=random_images(1)[0], method="grad_cam")
    assert one.image.shape[1:] == model.config.grid
    assert (
        one.target[-1].replace("[", "").replace("]", "")
        == model.predict(model.prepare(image=random_images(1)[0]))[0]
    )


def test_explain_with_some_heads():
    model = captioner("aoa")
    asked = {"image": random_images(), "text": TEXTS, "target": 2}
    every, first, both = (
        jaxrel.explain(model, **asked, heads=heads) for heads in (None, [0], [0, 1])
    )
    assert first.settings.endswith("heads 0")
    np.testing.assert_allclose(both.image, every.image, rtol=1e-5)
    assert np.abs(first.image - every.image).max() > 0
    with pytest.raises(ValueError, match=r"there is no head 2; the model has heads 0 to 1"):
        jaxrel.explain(model, **asked, heads=[2])
    with pytest.raises(ValueError, match=r"heads to choose"):
        jaxrel.explain(captioner("gridtd"), **asked, heads=[0])


def test_explain_what_cannot_be():
    asked = {"image": random_images(), "text": TEXTS}
    with pytest.raises(ValueError, match=r"unknown method 'weighted'"):
        jaxrel.explain(captioner("gridtd"), **asked, method="weighted")
    with pytest.raises(ValueError, match=r"Captioner has one layer of attention"):
        jaxrel.explain(captioner("gridtd"), **asked, layers=[0])
    regions = captioner("gridtd", encoder=None, regions=(4, 6))
    with pytest.raises(ValueError, match=r"features of regions and not images"):
        jaxrel.explain(regions, **asked)
