"""Relevance of captions' words equals that of plain loops over the paper's equations."""

import numpy as np
import pytest
from jax import numpy as jnp

from jaxrel.explanations.words import word_relevance
from tests.zoo.captioners import TEXTS, captioner
from tests.zoo.images import random_images
from tests.zoo.plain_captioner import plain_word_relevance


@pytest.mark.parametrize("kind", ["gridtd", "aoa"])
def test_words_one_by_one_in_plain_loops(kind):
    model = captioner(kind)
    inputs = model.prepare(image=random_images(), text=TEXTS)
    # The first word, some words, and the word after which the caption ends, or the end itself.
    positions = np.array([[1, 3, 5], [1, 2, 4]])
    _, found = word_relevance(model, inputs, positions)
    for row, asked in enumerate(positions.tolist()):
        plain = plain_word_relevance(model, inputs["image"][row], inputs["text"][row], asked)
        for together, apart in zip(found["lrp"], plain, strict=True):
            assert_close_by_word(together[row], apart)


def assert_close_by_word(found, expected):
    """Both [words, ...]."""
    assert found.shape == expected.shape
    for one, two in zip(found, expected, strict=True):
        scale = jnp.abs(two).max()
        assert scale > 0
        # float32, up to ten layers and steps in another order of summation: 7e-7 was the most.
        np.testing.assert_allclose(one, two, rtol=0, atol=1e-5 * scale)
