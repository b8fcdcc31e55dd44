"""The captions that captioners write."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from jaxrel.models import decoding
from jaxrel.models.captioner import Captioner
from tests.zoo.captioners import ENCODE, FORWARD, biased, reference
from tests.zoo.images import random_images


@pytest.fixture(scope="module", params=["adaptive", "gridtd", "aoa"])
def trained(request):
    """The weights of the reference implementation know a few captions, and when they end."""
    return reference(request.param)[0]


def greedy(model, image):
    """One word after the other; after the words lie tokens that are not padding."""
    text = np.full((len(image), 12), 7, np.int32)
    text[:, 0] = 2
    ended = np.zeros(len(image), bool)
    for i in range(1, 12):
        logits, _ = FORWARD(model, {"image": image, "text": jnp.asarray(text)})
        words = [token for token in range(20) if token not in (0, 2)]
        best = np.array(words)[np.asarray(logits)[:, i - 1, words].argmax(-1)]
        best[...] = 3 if i == 11 else best
        text[:, i] = np.where(ended, 0, best)
        ended |= best == 3
    return text


@pytest.mark.parametrize(("bias", "ends"), [(0.0, "early"), (-100.0, "never")])
def test_generate_is_greedy(trained, bias, ends):
    # Start and padding are tempting, and never written.
    model = biased(trained, end=bias, start=3.0, pad=3.0)
    generated = model.prepare(image=random_images(6))
    text = np.asarray(generated["text"])
    np.testing.assert_array_equal(text, greedy(model, generated["image"]))
    end = (text == 3).argmax(-1)
    assert (end == 11).all() if ends == "never" else (end < 11).any()
    words = [[token for token in row if token] for row in model.tokens(generated)]
    assert model.predict(generated) == [" ".join(row) for row in words]
    assert all(len(row) > 1 for row in words)


def test_beams(trained):
    """What a search says of a caption is what teacher forcing says: a sum, and not a mean."""
    image = trained.prepare(image=random_images(6), text=["a man"] * 6)["image"]
    features = ENCODE(trained, image)
    one, three = jax.jit(searched, static_argnums=2)(trained, features, 3)
    assert trained.predict({"image": image}, beams=3) == trained.sentences(three.ids)
    assert (three.ids != one.ids).any()
    assert (three.log_probability > one.log_probability - 1e-4).mean() > 0.7
    judge = jax.jit(Captioner.log_probability)
    for found in (one, three):
        count = (found.ids == 3).argmax(-1)
        mean = judge(trained, {"features": features, "text": found.ids})
        np.testing.assert_allclose(mean * count, found.log_probability, rtol=1e-4, atol=1e-4)
    assert trained.predict({"features": features}) == trained.sentences(one.ids)


def searched(model, features, beams):
    step, state = model.decoder(features)
    return (
        decoding.greedy(step, state, model.caption_format()),
        decoding.beam_search(step, state, model.caption_format(), beams=beams),
    )


def test_unknown_words_are_written_or_not(trained):
    model = biased(trained, unknown=30.0)
    image = model.prepare(image=random_images(3), text=["a man"] * 3)["image"]
    write = jax.jit(Captioner.generate, static_argnames="unknown")
    free = write(model, image)
    assert (free == 1).any()
    assert not (write(model, image, unknown=False) == 1).any()
    assert "unk" not in " ".join(model.sentences(free))
