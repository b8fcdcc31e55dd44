"""`explain` by LRP: signed, by token, with an account of the relevance."""

import jax
import numpy as np
import pytest
from flax import nnx
from PIL import Image

import jaxrel
from jaxrel import composites
from jaxrel.models import CLIP

TAGS = ("vision/tokens", "text/tokens")


@pytest.fixture(scope="module")
def model():
    return CLIP.from_pretrained("clip-shapes")


@pytest.fixture(scope="module")
def scene():
    return Image.open("train/data/samples/red-circle.png")


def by_hand(model, scene, text, rules):
    inputs = model.pairs(model.prepare(image=scene, text=text))
    explain = jaxrel.lrp(lambda m, x: m.score(x), rules, argnums=None, at=TAGS)
    found = jax.jit(explain)(model, inputs)
    return [np.asarray(found[tag].sum(-1)) for tag in TAGS]


RULES = {
    "lrp": composites.attn_lrp(),
    "cp_lrp": composites.cp_lrp(),
    "input_x_gradient": jaxrel.rules.Gradient(),
}


@pytest.fixture(scope="module")
def explained(model, scene):
    """By rules and by attention, in one program."""
    methods = (*RULES, "weighted")
    found = jaxrel.explain(model, image=scene, text="a red circle", method=methods)
    return dict(zip(methods, found, strict=True))


@pytest.mark.parametrize(("method", "rules"), RULES.items())
def test_explanation_by_rules(model, scene, explained, method, rules):
    one = explained[method]
    image, text = by_hand(model, scene, "a red circle", rules)
    assert one.signed
    # float32: the report's measures are fused into the same program.
    np.testing.assert_allclose(one.image.reshape(1, -1), image, rtol=1e-4, atol=1e-5)
    words = [value for _, value in one.words(0)]
    np.testing.assert_allclose(words, text[0, 1:4], rtol=1e-4, atol=1e-5)
    account = one.report["relevance"]
    lost = account["bias"] + account["stabiliser"] + account["rule"]
    np.testing.assert_allclose(account["output"], one.score[0], rtol=1e-5)
    np.testing.assert_allclose(account["output"] - lost, account["input"], rtol=1e-4, atol=1e-4)
    assert sum(one.report["rules"].values()) > 40
    assert one.report["coverage"] == {"of": "operations", "share": 1.0}
    assert one.settings == "summed over the features of each token"


def test_lrp_finds_the_object(model, explained):
    maps = [explained["lrp"], explained["weighted"]]
    layers = model.config.vision.layers + model.config.text.layers
    assert maps[1].report["coverage"] == {
        "of": "layers of attention",
        "followed": layers,
        "layers": layers,
        "share": 1.0,
    }
    peaks = [np.unravel_index(one.image[0].argmax(), one.image[0].shape) for one in maps]
    # The circle lies over the middle of the scene, rows 4 and 5 of 8.
    assert all(row in (4, 5) for row, _ in peaks)


def test_other_rules(model, scene):
    mine = [(jaxrel.path("*mlp*") | jaxrel.path("*expand*"), jaxrel.rules.Gamma(0.5))]
    mine = jaxrel.Composite(mine) + composites.attn_lrp()
    one = jaxrel.explain(model, image=scene, text="a red circle", method="lrp", lrp=mine)
    image, _ = by_hand(model, scene, "a red circle", mine)
    np.testing.assert_allclose(one.image.reshape(1, -1), image, rtol=1e-3, atol=1e-4)
    assert "dense: Gamma(gamma=0.5)" in one.report["rules"]


def test_layers_are_for_attention(model, scene):
    with pytest.raises(ValueError, match=r"layers and heads choose attention maps; method lrp"):
        jaxrel.explain(model, image=scene, text="a red circle", method="lrp", layers=[0])


def test_unknown_method(model, scene):
    with pytest.raises(ValueError, match=r"unknown method 'lpr'; there are equal, .*cp_lrp"):
        jaxrel.explain(model, image=scene, text="a red circle", method="lpr")


def test_a_model_of_ones_own_is_shown_the_way():
    def score(x):
        return x.sum()

    ways = (
        r"jaxrel\.attention\.relevance\(score\)\(x\) .* jaxrel\.lrp\(model\)\(x\) .* "
        r"jaxrel\.Explanation\(target=, score="
    )
    for given, name in (
        (score, "the function score has no layout, prepare, pairs, score"),
        (nnx.Linear(2, 2, rngs=nnx.Rngs(0)), "the Linear given has no layout"),
        (np.zeros(3), "the ndarray given has no layout"),
    ):
        for arguments in ((given,), (given, np.zeros((1, 4)))):
            with pytest.raises(TypeError, match=f"{name}.*{ways}"):
                jaxrel.explain(*arguments)


def test_an_image_is_needed(model, scene):
    with pytest.raises(ValueError, match="no image: pass image="):
        jaxrel.explain(model, text="a red circle")
    options = {"text": "a red circle", "method": "raw"}
    named = jaxrel.explain(model, image=scene, **options)
    np.testing.assert_array_equal(jaxrel.explain(model, scene, **options).image, named.image)


def test_unknown_words_keep_their_spelling(model, scene):
    texts = ["a red astronaut", "a blue penguin"]
    with pytest.warns(UserWarning, match="does not know 'penguin', 'astronaut'"):
        one = jaxrel.explain(model, image=scene, text=texts, target=[1, 0], method="raw")
    assert one.target == ("a blue penguin (unknown)", "a red astronaut (unknown)")
    assert [word for word, _ in one.words(0)] == ["a", "blue", "penguin (unknown)"]
