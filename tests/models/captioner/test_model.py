"""What captioners compute: logits, scores, attention maps, rows to explain."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp

import jaxrel
from jaxrel.models.captioner import Captioner
from tests.zoo.captioners import (
    ENCODE,
    FORWARD,
    REGIONS,
    ROUNDING,
    TEXTS,
    captioner,
    flat,
    random_regions,
)
from tests.zoo.images import random_images

# ---- the forms of adaptive attention


@pytest.mark.parametrize("form", ["paper", "as coded"])
def test_forms_of_attention(form):
    """Against loops over positions (Lu et al. 2017, eq. 6 to 13)."""
    attention = captioner("adaptive", attention=form).cell.attention
    rng = np.random.default_rng(1)
    values, hidden, sentinel = (rng.normal(size=shape) for shape in ((2, 16, 8), (2, 8), (2, 8)))
    context = captioner("adaptive").cell.start(jnp.asarray(values), jnp.zeros((2, 6)))[0]
    context = context._replace(keys=attention.image(jnp.asarray(values)))
    found, maps = attention(context, jnp.asarray(hidden), jnp.asarray(sentinel))
    p = {n: np.float64(x[...]) for n, x in flat(attention).items()}
    w = p["score.kernel"][:, 0]
    for b in range(2):
        u = hidden[b] @ p["hidden.kernel"]
        keys = values[b] @ p["image.kernel"] + p["image.bias"]
        added = [u if form == "paper" else u[k] for k in range(16)]
        scores = np.array([np.tanh(keys[k] + added[k]) @ w for k in range(16)])
        last = np.tanh(sentinel[b] @ p["sentinel.kernel"] + p["sentinel.bias"] + u) @ w
        alpha = np.exp(scores) / np.exp(scores).sum()
        beta = np.exp(last) / (np.exp(scores).sum() + np.exp(last))
        np.testing.assert_allclose(maps["attention"][b, 0], alpha, rtol=1e-4)
        np.testing.assert_allclose(maps["sentinel"][b], beta, rtol=1e-4)
        mixed = beta * sentinel[b] + (1 - beta) * alpha @ values[b]
        np.testing.assert_allclose(found[b], mixed, rtol=1e-4, atol=1e-5)


# ---- logits, scores and maps


def test_batch_is_one_by_one_and_padding_does_not_matter(model, inputs):
    logits, maps = FORWARD(model, inputs)
    assert (logits.shape, logits.dtype) == ((2, 9, 11), jnp.float32)
    for i in range(2):
        one = {"image": inputs["image"][i : i + 1], "text": inputs["text"][i : i + 1, :7]}
        alone, of_one = FORWARD(model, one)
        np.testing.assert_allclose(alone[0], logits[i, :7], **ROUNDING)
        for name, x in of_one.items():
            np.testing.assert_allclose(x[0], maps[name][i, :7], **ROUNDING)


def test_later_words_change_no_earlier_logit(model, inputs):
    logits, _ = FORWARD(model, inputs)
    other, _ = FORWARD(model, {**inputs, "text": inputs["text"].at[:, 4].set(9)})
    np.testing.assert_array_equal(other[:, :4], logits[:, :4])
    assert np.abs(other[:, 4] - logits[:, 4]).min() > 0


def test_steps_are_the_scan(model, inputs):
    """The pieces, one by one and compiled, give what the whole gives."""
    logits, maps = FORWARD(model, inputs)
    context, state = model.start(ENCODE(model, inputs["image"]))
    step = jax.jit(lambda model, *args: model.step(*args))
    for place in range(4):
        word = model.embed(inputs["text"][:, place])
        state, found, at = step(model, context, state, word)
        np.testing.assert_allclose(found, logits[:, place], **ROUNDING)
        for name, x in at.items():
            np.testing.assert_allclose(x, maps[name][:, place], **ROUNDING)


def test_scores_are_the_logits_of_words(model, inputs, monkeypatch):
    logits, maps = FORWARD(model, inputs)
    text = np.asarray(inputs["text"])
    scores = jax.jit(Captioner.word_scores)(model, inputs)
    expected = np.zeros((2, 9))
    for b in range(2):
        for i in range(1, 9):
            expected[b, i] = logits[b, i - 1, text[b, i]]
    np.testing.assert_allclose(scores, expected, **ROUNDING)
    pairs = model.pairs(inputs)
    of_rows = jax.jit(Captioner.score)(model, pairs)
    example, position = pairs["example"], pairs["position"]
    np.testing.assert_allclose(of_rows, expected[example, position], **ROUNDING)
    one = jax.jit(Captioner.score)(model, inputs, np.array([5, 3]))
    np.testing.assert_allclose(one, expected[[0, 1], [5, 3]], **ROUNDING)
    aligned = jax.jit(Captioner.attention_maps)(model, inputs)
    for name, x in aligned.items():
        np.testing.assert_array_equal(x[:, 0], 0)
        np.testing.assert_allclose(x[:, 1:], maps[name][:, :-1], **ROUNDING)
    monkeypatch.setattr(Captioner, "__call__", lambda *_: logits)
    log_p = np.asarray(jax.nn.log_softmax(logits))
    mean = [
        np.mean([log_p[b, i - 1, text[b, i]] for i in range(1, length)])
        for b, length in enumerate((7, 5))
    ]
    np.testing.assert_allclose(model.log_probability(inputs), mean, rtol=1e-5)


def test_tags(model, inputs):
    names = ("features", "features/tokens", "text/tokens", "attention")
    names += () if model.config.kind == "aoa" else ("sentinel",)
    _, tagged = jax.jit(jaxrel.capture(lambda m, x: m(x), names))(model, inputs)
    features = ENCODE(model, inputs["image"])
    np.testing.assert_allclose(tagged["features"].reshape(features.shape), features, **ROUNDING)
    assert tagged["features"].shape == (2, 4, 4, 6)
    np.testing.assert_allclose(tagged["features/tokens"], features, **ROUNDING)
    np.testing.assert_array_equal(tagged["text/tokens"], model.embed(inputs["text"]))
    assert tagged["attention"].shape[0] == 9


def test_relevance_reaches_pixels_and_words(model, inputs):
    """Every operation has a rule, and the attention maps and gates are constants."""
    rows = jax.tree.map(lambda x: x[:2], model.pairs(inputs, [3]))

    def score(image, model, rest):
        return model.score({**rest, "image": image})

    explain = jaxrel.lrp(score, jaxrel.composites.captioning(), at=("text/tokens",))
    rest = {name: x for name, x in rows.items() if name != "image"}
    pixels, places = jax.jit(explain)(rows["image"], model, rest)
    words = places["text/tokens"].sum(-1)
    assert np.isfinite(pixels).all()
    assert (np.abs(pixels).sum((1, 2, 3)) > 0).all()
    assert (np.abs(words[:, :3]).sum(-1) > 0).all()
    np.testing.assert_array_equal(words[:, 3:], 0)


def test_heads_are_explained_apart():
    """The output is the same, and the gradients of the heads' values add up."""
    model = captioner("aoa")
    inputs = model.prepare(image=random_images(), text=TEXTS)
    features = ENCODE(model, inputs["image"])
    # The image also counts as a whole, and as keys: that gradient is in each of the sums.
    choices = jnp.array([[True, True], [True, False], [False, True], [False, False]])

    @jax.jit
    def gradients(model, features, text):
        def total(features, heads):
            given = {"features": features, "text": text, "heads": jnp.stack([heads] * 2)}
            scores = model.word_scores(given)
            return scores.sum(), scores

        return jax.vmap(jax.grad(total, has_aux=True), in_axes=(None, 0))(features, choices)

    (both, first, second, none), scores = gradients(model, features, inputs["text"])
    np.testing.assert_allclose(both - none, first + second - 2 * none, **ROUNDING)
    assert np.abs(first - none).max() > 1e-3
    assert np.abs(second - none).max() > 1e-3
    np.testing.assert_allclose(scores[3], model.word_scores(inputs), **ROUNDING)


def test_features_in_the_place_of_images(model, inputs):
    features = ENCODE(model, inputs["image"])
    found, _ = FORWARD(model, {"features": features, "text": inputs["text"]})
    np.testing.assert_allclose(found, FORWARD(model, inputs)[0], **ROUNDING)


def test_dropout_only_with_a_key(model, inputs):
    logits, _ = FORWARD(model, inputs)
    dropped = jax.jit(lambda model, x, key: model(x, dropout_key=key))
    first = dropped(model, inputs, jax.random.key(0))
    np.testing.assert_array_equal(first, dropped(model, inputs, jax.random.key(0)))
    assert np.abs(first - dropped(model, inputs, jax.random.key(1))).max() > 1e-3
    still = nnx.clone(model)
    still.config = replace(model.config, dropout=0.0)
    only_maps = dropped(still, inputs, jax.random.key(0))
    # What is left is the dropout of the attention maps, and only "aoa" has it.
    if model.config.kind == "aoa":
        assert np.abs(only_maps - logits).max() > 1e-3
    else:
        np.testing.assert_allclose(only_maps, logits, **ROUNDING)


def test_dropout_keeps_the_mean():
    """Half of the values are doubled, and half are 0."""
    read = jnp.ones((20000, 8)), jnp.zeros((20000, 8))
    model = nnx.clone(captioner("aoa"))
    model.head.kernel.set_value(jnp.zeros((8, 11)).at[:, 0].set(1))
    model.head.bias.set_value(jnp.zeros(11))
    sums = model.word_logits(*read, dropout_key=jax.random.key(0))[:, 0]
    assert set(np.unique(sums)) <= set(range(0, 17, 2))
    # Five standard deviations of a mean of 20000; each sum varies by 8.
    assert abs(float(sums.mean()) - 8) < 5 * (8 / 20000) ** 0.5


def test_bfloat16(model, inputs):
    half = nnx.merge(
        nnx.graphdef(
            nnx.eval_shape(
                lambda: Captioner(replace(model.config, dtype="bfloat16"), rngs=nnx.Rngs(0))
            )
        ),
        nnx.state(model),
    )
    logits, maps = FORWARD(half, inputs)
    expected, _ = FORWARD(model, inputs)
    assert {x.dtype for x in (logits, *maps.values())} == {jnp.dtype("float32")}
    # 8 bits of precision, through up to nine steps.
    np.testing.assert_allclose(logits, expected, atol=0.1 * np.abs(expected).max())
    assert np.abs(logits - expected).max() > 1e-5


# ---- regions


@pytest.fixture(scope="module", params=["adaptive", "gridtd", "aoa"])
def of_regions(request):
    return captioner(request.param, **REGIONS)


def test_captions_of_regions(of_regions):
    features = random_regions()
    features[1, 3] = 0
    inputs = of_regions.prepare(image=features, text=TEXTS)
    for given in (list(features), [features[0], features[1].astype(np.float64)]):
        again = of_regions.prepare(image=given, text=TEXTS)
        jax.tree.map(np.testing.assert_array_equal, again, inputs)
    assert of_regions.prepare(image=features[0], text=TEXTS[0])["features"].shape == (1, 4, 6)
    pairs = of_regions.pairs(inputs)
    assert pairs["features"].shape == (8, 4, 6)
    content = of_regions.content(pairs)
    assert content["features"][0].tolist() == [True] * 4
    assert content["features"][7].tolist() == [True, True, True, False]
    stream = of_regions.layout["features"]
    assert (stream.tokens, stream.grid, stream.prefix) == (4, None, 0)
    written = of_regions.prepare(image=features)
    assert of_regions.predict({"features": features}) == of_regions.sentences(written["text"])
    np.testing.assert_array_equal(of_regions.seen(features[0]), features[0])
    capture = jaxrel.capture(lambda m, x: m(x), ("features/tokens",))
    _, tagged = jax.jit(capture)(of_regions, inputs)
    np.testing.assert_array_equal(tagged["features/tokens"], features)


def test_pairs_of_words(model, inputs):
    pairs = model.pairs(inputs)
    assert pairs["position"].tolist() == [1, 2, 3, 4, 5, 1, 2, 3]
    assert pairs["example"].tolist() == [0, 0, 0, 0, 0, 1, 1, 1]
    np.testing.assert_array_equal(pairs["text"], inputs["text"][pairs["example"]])
    np.testing.assert_array_equal(pairs["image"], inputs["image"][pairs["example"]])
    assert model.target_tokens(pairs)["text"].tolist() == [0, 1, 2, 3, 4, 0, 1, 2]
    assert model.describe(pairs)[3:] == [
        "a small red [circle]",
        "a small red circle [above]",
        "[a]",
        "a [blue]",
        "a blue [square]",
    ]
    content = model.content(pairs)
    before = [np.flatnonzero(row).tolist() for row in content["text"]]
    assert before[3:7] == [[1, 2, 3], [1, 2, 3, 4], [], [1]]
    assert content["features"].all()
    assert content["features"].shape == (8, 16)
    assert model.pairs(inputs, [3, 1])["position"].tolist() == [3, 1, 3, 1]
    # Rows can be brought to other rows.
    assert model.pairs(pairs, 2)["position"].tolist() == [2] * 8
    unknown = inputs["text"].at[0, 2].set(1)
    assert model.pairs({**inputs, "text": unknown})["position"].tolist()[:4] == [1, 3, 4, 5]
    stream = model.layout["features"]
    assert (stream.modality, stream.tokens, stream.grid, stream.prefix) == ("image", 16, (4, 4), 0)
    assert model.layout["text"].tokens == 9
    image = model.seen(random_images(1)[0])
    assert image.size == (16, 16)
