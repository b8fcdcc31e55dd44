"""`explain` on CLIPmapper: questions, and the words of captions."""

import jax
import numpy as np
import pytest

import jaxrel
from jaxrel import attention
from jaxrel.attention.methods import BIMODAL_METHODS, TABLE
from tests.zoo.clipmappers import TEXTS, answered, random_mapper
from tests.zoo.images import random_images


@pytest.fixture(scope="module")
def vqa():
    return random_mapper("vqa", layers=3)


@pytest.fixture(scope="module")
def caption():
    return random_mapper("caption", layers=2)


WITHOUT_LRP = tuple(name for name in BIMODAL_METHODS if not TABLE[name].by_lrp)


def error(match):
    return pytest.raises(ValueError, match=match)


def assert_close(one, text, image):
    """The relevance of an explanation, of the words and of the patches."""
    for found, expected in ((one.text, text), (one.image, image)):
        scale = np.abs(expected).max()
        # float32, fused in another program or over other zeros.
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * scale, err_msg=one.method)


def test_explain_questions(vqa):
    questions = answered(vqa.prepare(image=random_images(), text=TEXTS))
    explain = attention.value_and_bimodal_relevance(
        lambda model, inputs: model.score(inputs),
        vqa.layout.schedule,
        method="weighted",
        target_token=vqa.target_tokens(questions)["text"],
    )
    score, rows = jax.jit(explain)(vqa, questions)
    one = jaxrel.explain(
        vqa, image=random_images(), text=TEXTS, target=["two", "red"], method="weighted"
    )
    text, image = (np.asarray(x) for x in rows)
    words = np.asarray(vqa.content(questions)["text"])
    assert_close(one, np.where(words, text, 0), image[:, 1:].reshape(2, 2, 2))
    np.testing.assert_allclose(one.score, score, rtol=1e-4)
    assert [target.split(" (")[0] for target in one.target] == ["two", "red"]
    assert one.settings == "all layers, all heads, importance grad_value"
    assert one.report["text"]["tokens"] == [5, 3]
    coverage = one.report["coverage"]
    assert coverage["share"] == 1
    assert coverage["followed"] == coverage["layers"] > 10
    assert [word for word, _ in one.words(1)] == ["a", "blue", "square"]
    assert not one.signed


def test_explain_the_words_of_captions(caption):
    """Each word as if it were alone: later words and other captions change nothing."""
    images = random_images(3)

    def explain(images, text):
        return jaxrel.explain(caption, image=images, text=text, method=WITHOUT_LRP)

    maps = explain(images[:2], TEXTS)
    others = explain(images[:2], ["what is a red square", "a red square"])
    beside = explain([images[2], images[1]], ["is a circle above what", TEXTS[1]])
    for one, other, another in zip(maps, others, beside, strict=True):
        assert (one.image.shape, one.text.shape) == ((8, 2, 2), (8, 9))
        assert one.report["example"] == [0, 0, 0, 0, 0, 1, 1, 1]
        assert one.target[4] == "what is a red [circle]"
        np.testing.assert_array_equal(one.pixels[7], caption.seen(images[1]))
        for i in (0, 1, 2, 3, 5):
            assert_close(other[i], one[i].text, one[i].image)
            # A word has the relevance of those before it.
            before = int(one.target[i].count(" "))
            assert not one.text[i, before + 1 :].any()
        assert_close(another[5:], one[5:].text, one[5:].image)
    equal = maps[WITHOUT_LRP.index("equal")]
    assert (equal.text[4] > 0).tolist() == [False, *[True] * 4, *[False] * 4]
    assert np.ptp(equal.image[4]) > 0


def test_what_explain_refuses():
    model, image = random_mapper("vqa", layers=1), random_images(1)[0]
    known = "equal, weighted, raw, rollout, grad_cam, transformer_attribution, equal_lrp"
    with error(rf"unknown method 'no_aggregation'; there are {known}"):
        jaxrel.explain(model, image=image, text="what is red", method="no_aggregation")
    for choice in ({"layers": [-1]}, {"heads": [0]}):
        with error(r"layers and heads choose .* in CLIPMapperVQA they attend to each other"):
            jaxrel.explain(model, image=image, text="what is red", **choice)
    with error(r"this model has no answer 'purple'; it has 4 answers: red, blue, two, yes"):
        jaxrel.explain(model, image=image, text="what is red", target="purple")


def test_explain_whole_captions():
    """The mean of the words' logits, and of what is linear in them."""
    caption = random_mapper("caption", layers=1)
    images = random_images()
    words = jaxrel.explain(caption, image=images, text=TEXTS, method=["raw", "lrp"])
    whole = jaxrel.explain(
        caption, image=images, text=TEXTS, target="caption", method=["raw", "lrp"]
    )
    for one, by_word in zip(whole, words, strict=True):
        assert one.target == tuple(TEXTS)
        assert one.report["example"] == [0, 1]
        of = np.asarray(by_word.report["example"])
        image = np.stack([by_word.image[of == i].mean(0) for i in (0, 1)])
        score = [by_word.score[of == i].mean() for i in (0, 1)]
        np.testing.assert_allclose(one.score, score, rtol=1e-5)
        np.testing.assert_allclose(one.image, image, rtol=0, atol=1e-4 * np.abs(image).max())
