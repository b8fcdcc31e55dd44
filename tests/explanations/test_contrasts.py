"""`explain` of one text, answer or word against another, and without the columns of sinks."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp
from PIL import Image

import jaxrel
from jaxrel.models import CLIP
from tests.zoo.captioners import captioner
from tests.zoo.clipmappers import random_mapper

SOME = ("token_tm", "legrad", "grad_eclip", "no_aggregation", "equal_lrp", "cp_lrp")
# float32, and programs that are fused otherwise.
CLOSE = {"rtol": 5e-4, "atol": 1e-6}
FORWARD = jax.jit(lambda model, inputs: model(inputs))


@pytest.fixture(scope="module")
def model():
    return CLIP.from_pretrained("clip-shapes")


@pytest.fixture(scope="module")
def scene():
    return Image.open("train/data/samples/red-circle.png")


def test_one_text_against_another(model, scene):
    methods = ("input_x_gradient", "lrp", "equal")
    options = {"image": scene, "method": methods}
    red, blue = (
        jaxrel.explain(model, text=text, **options) for text in ("a red circle", "a blue square")
    )
    both = jaxrel.explain(model, text="a red circle", against="a blue square", **options)
    want = red[0].score - blue[0].score
    np.testing.assert_allclose(both[0].score, want, atol=2e-6 * red[0].score[0])  # float32
    for i in range(2):
        # What is linear in the gradient is the difference of the two; words are the text's own.
        np.testing.assert_allclose(
            both[i].image, red[i].image - blue[i].image, rtol=5e-3, atol=2e-4
        )
        np.testing.assert_allclose(both[i].text, red[i].text, **CLOSE)
    assert not np.allclose(both[2].image, red[2].image)
    assert both[0].settings.endswith(", against a blue square")
    assert both[0].target == ("a red circle",)
    assert both[0].column().panels[0].target == "a red circle, against a blue square"


def test_every_method_explains_a_contrast(model, scene):
    options = {"image": scene, "text": "a red circle", "method": SOME}
    found = jaxrel.explain(model, against=("a blue square", "a green ring"), **options)
    texts = ["a red circle", "a blue square", "a green ring"]
    scores = FORWARD(model, model.prepare(image=scene, text=texts))
    logits = np.asarray(scores["logits_per_image"])[0].astype(float)
    want = logits[0] - np.log(np.exp(logits[1:]).sum())
    for one in found:
        np.testing.assert_allclose(one.score, want, atol=2e-6 * logits[0])  # float32
        assert np.isfinite(one.image).all()
        assert one.image.any()
        told = one.column().panels[0].target
        assert told == "a red circle, against a blue square, a green ring"


def test_one_of_each_example(model, scene):
    texts = ["a red circle", "a small blue square", "a ring"]
    others = ["a blue square", "a red circle", "a star"]
    options = {"image": scene, "method": "weighted", "batch_size": 2}
    together = jaxrel.explain(model, text=texts, against=others, **options)
    for i, (text, other) in enumerate(zip(texts, others, strict=True)):
        alone = jaxrel.explain(model, text=text, against=other, **options)
        np.testing.assert_allclose(together.image[i], alone.image[0], **CLOSE)
        assert together.column().panels[i].target == f"{text}, against {other}"


def test_answers(scene):
    vqa = random_mapper("vqa", layers=1)
    options = {"image": scene, "text": "what is a circle", "target": "two"}
    inputs = vqa.prepare(image=scene, text=options["text"])
    logits = np.asarray(FORWARD(vqa, inputs))[0].astype(float)
    answers = list(vqa.config.answers)
    two, blue = answers.index("two"), answers.index("blue")
    one = jaxrel.explain(vqa, against="blue", method="raw", **options)
    np.testing.assert_allclose(one.score, logits[two] - logits[blue], rtol=1e-5)
    rest = jaxrel.explain(vqa, against="*", method="lrp", **options)
    others = np.delete(logits, two)
    np.testing.assert_allclose(rest.score, logits[two] - np.log(np.exp(others).sum()), rtol=1e-5)
    assert rest.image.any()
    assert rest.column().panels[0].target == f"{rest.target[0]}, against all others"
    with pytest.raises(ValueError, match="the answer 'two' is explained, and cannot be contrasted"):
        jaxrel.explain(vqa, against="two", **options)


def test_words(scene):
    writer = random_mapper("caption", layers=1)
    options = {"image": scene, "text": "a red circle", "target": [2], "method": "equal"}
    plain = jaxrel.explain(writer, **options)
    one = jaxrel.explain(writer, against="blue", **options)
    other = jaxrel.explain(writer, **options | {"text": "a blue circle"})
    np.testing.assert_allclose(one.score, plain.score - other.score, rtol=1e-4)
    rest = jaxrel.explain(writer, against="*", **options)
    assert rest.score[0] < plain.score[0]
    assert one.column().panels[0].target.endswith("[red], against blue")
    with pytest.raises(ValueError, match="'nonsense' is no single token of this model"):
        jaxrel.explain(writer, against="nonsense", **options)
    with pytest.raises(ValueError, match="a word cannot be contrasted with itself"):
        jaxrel.explain(writer, against="red", **options)


def test_what_cannot_be_contrasted(model, scene):
    with pytest.raises(
        ValueError, match=r"a list has one for each of the 1 examples, got 2; a tup"
    ):
        jaxrel.explain(model, image=scene, text="a red circle", against=["a", "b"])
    with pytest.raises(ValueError, match=r"against must be a text, or a tuple of texts, for all 1"):
        jaxrel.explain(model, image=scene, text="a red circle", against=())
    with pytest.raises(ValueError, match=r"and Captioner has no contrasted\(rows, against\)"):
        jaxrel.explain(captioner("gridtd"), image=scene, against="blue")


# ---- sinks


def test_sinks(model, scene):
    options = {"image": scene, "text": "a red circle", "method": ("equal", "weighted", "rollout")}
    usual = jaxrel.explain(model, **options)
    found = jaxrel.explain(model, sinks={"text": [0]}, **options)
    inputs = model.pairs(model.prepare(image=scene, text="a red circle"))
    explain = jaxrel.attention.relevance(
        lambda model, inputs: model.score(inputs),
        method="equal",
        attention=("vision", "text"),
        target_token=model.target_tokens(inputs),
        sinks={"text": jnp.arange(model.config.text.context) == 0},
    )
    want = jax.jit(explain)(model, inputs)["text"]
    content = np.asarray(model.content(inputs)["text"])
    np.testing.assert_allclose(found[0].text, np.where(content, want, 0), **CLOSE)
    for one, plain in zip(found, usual, strict=True):
        np.testing.assert_allclose(one.image, plain.image, **CLOSE)
        assert one.settings.endswith("without the sinks {'text': [0]}")
    assert not np.allclose(found[2].text, usual[2].text)
    every = jaxrel.explain(model, sinks=[1], **options | {"method": "raw"})
    assert not every.image[0, 0, 0]
    assert every.image.any()


def test_sinks_that_do_not_exist(model, scene):
    options = {"image": scene, "text": "a red circle"}
    with pytest.raises(
        ValueError, match=r"sinks: there is no stream 'words'; there are vision, te"
    ):
        jaxrel.explain(model, sinks={"words": [0]}, **options)
    with pytest.raises(ValueError, match=r"tokens of 'text': 99 does not exist"):
        jaxrel.explain(model, sinks={"text": [99]}, **options)
    with pytest.raises(
        ValueError, match=r"layers, heads and sinks choose attention maps; method l"
    ):
        jaxrel.explain(model, sinks=[0], method="lrp", **options)
    with pytest.raises(
        ValueError, match=r"sinks are tokens whose columns are left out of the maps"
    ):
        jaxrel.explain(captioner("gridtd"), image=scene, sinks=[0])
