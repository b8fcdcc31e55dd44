"""CLIPmapper that answers questions."""

from dataclasses import replace

import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp

from jaxrel.models import CLIPMapperVQA
from tests.errors import error
from tests.zoo.clipmappers import ANSWERS, FORWARD, STAGE1, answered
from tests.zoo.images import random_images


def test_score_and_predict(vqa, inputs, monkeypatch):
    logits, _ = FORWARD(vqa, inputs)
    monkeypatch.setattr(CLIPMapperVQA, "__call__", lambda *_: logits)
    np.testing.assert_array_equal(vqa.score(inputs), logits.max(-1))
    np.testing.assert_array_equal(vqa.score(answered(inputs)), logits[[0, 1], [2, 0]])
    np.testing.assert_array_equal(vqa.score(answered(inputs), 1), logits[:, 1])
    np.testing.assert_allclose(vqa.predict(inputs).sum(-1), 1, rtol=1e-6)
    several = nnx.clone(vqa)
    several.config = replace(vqa.config, several=True)
    np.testing.assert_array_equal(several.predict(inputs), jax.nn.sigmoid(logits))


def test_pairs_of_questions(vqa, inputs):
    best = np.asarray(FORWARD(vqa, inputs)[0]).argmax(-1)
    pairs = vqa.pairs(inputs)
    assert pairs["answer"].tolist() == best.tolist()
    probability = np.asarray(jax.nn.softmax(FORWARD(vqa, inputs)[0]))[[0, 1], best]
    named = [f"{ANSWERS[i]} ({p:.0%})" for i, p in zip(best, probability, strict=True)]
    assert vqa.describe(pairs) == named
    assert vqa.target_tokens(pairs)["text"].tolist() == [6, 4]
    content = vqa.content(pairs)
    assert content["vision"].tolist() == [[False] + [True] * 4] * 2
    assert [np.flatnonzero(row).tolist() for row in content["text"]] == [
        [1, 2, 3, 4, 5],
        [1, 2, 3],
    ]
    assert vqa.tokens(pairs)[1] == ["", "a", "blue", "square", "", "", "", "", ""]


@pytest.mark.parametrize(
    ("target", "answers"),
    [("two", [2, 2]), (3, [3, 3]), (["yes", 0], [3, 0]), (jnp.array([1, 2]), [1, 2])],
)
def test_answers_in_words_or_as_indices(vqa, inputs, target, answers):
    one = {"image": inputs["image"][:1], "image_keep": jnp.ones((1, 5), bool)}
    pairs = vqa.pairs({**one, "text": inputs["text"]}, target)
    assert pairs["answer"].tolist() == answers
    np.testing.assert_array_equal(pairs["image"], np.repeat(inputs["image"][:1], 2, axis=0))
    assert pairs["image_keep"].shape == (2, 5)


def test_questions_that_do_not_fit(vqa, inputs):
    three = jnp.concatenate([inputs["text"], inputs["text"][:1]])
    with error(r"2 images and 3 questions make no pairs: give as many"):
        vqa.pairs({**inputs, "text": three})
    for target in ("purple", -1, 4, 1.5, None.__class__):
        with error(r"this model has no answer .*; it has 4 answers: red, blue, two, yes"):
            vqa.pairs(inputs, target)
    with error(r"3 answers for 2 questions; give one for each"):
        vqa.pairs(inputs, ["yes", "two", "red"])
    with error(r"has 10 tokens with its start and end token, .* at most 9: shorten it by 1"):
        vqa.prepare(image=random_images(), text=["what is above a red circle is it"] * 2)
    with error(r"the text is empty"):
        vqa.prepare(image=random_images(1), text="")
    with error(r"no image: pass image="):
        vqa.prepare(text="what is above")
    other = nnx.clone(vqa)
    text = replace(STAGE1.text, eos_token_id=5)
    other.config = replace(vqa.config, clip=replace(STAGE1, text=text))
    with error(r"ends a text with the id 3, and the model looks for the id 5"):
        other.prepare(image=random_images(1), text="what is above")
