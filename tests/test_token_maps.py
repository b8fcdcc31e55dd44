"""Token activation maps by plain loops in float64, and on a decoder that reads an image."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

import jaxrel
from jaxrel.token_maps import rank_gaussian, token_activation

# Four words of a prompt around an image of 2 x 3 tokens, and three words after them.
PROMPT, IMAGE, WORDS, GRID = (0, 1, 8, 9), tuple(range(2, 8)), (10, 11, 12), (2, 3)
TOKENS, VOCABULARY = 13, 5


def random_texts(seed=0):
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(2, TOKENS, VOCABULARY))
    ids = rng.integers(0, VOCABULARY, (2, TOKENS))
    ids[0, 12] = ids[0, 10]  # a word that is said twice
    return logits, ids


def plain_filter(map_, window):
    rows, columns = map_.shape
    half = window // 2
    padded = np.pad(map_, half, mode="reflect")
    out = np.zeros_like(map_)
    for i in range(rows):
        for j in range(columns):
            values = sorted(padded[i + k, j + m] for k in range(window) for m in range(window))
            mean = sum(values) / len(values)
            deviation = (sum((v - mean) ** 2 for v in values) / len(values)) ** 0.5
            if not mean or not deviation:
                out[i, j] = mean
                continue
            sigma, middle = deviation / mean, len(values) // 2
            gauss = [np.exp(-((r - middle) ** 2) / (2 * sigma**2)) for r in range(len(values))]
            out[i, j] = sum(v * g for v, g in zip(values, gauss, strict=True)) / sum(gauss)
    return out


def plain_map(logits, ids, k, window):
    """The map of word k of one text."""
    texts = [*PROMPT, *WORDS]
    read = [*PROMPT, *(word - 1 for word in WORDS)]
    said = texts.index(WORDS[k])

    def image_of(t):
        return np.array([max(logits[i, ids[texts[t]]], 0) for i in IMAGE])

    mine, total, interference = image_of(said), 0.0, np.zeros(len(IMAGE))
    for j in range(said):
        if ids[texts[j]] != ids[texts[said]]:
            weight = max(logits[read[j], ids[texts[said]]], 0)
            total += weight
            interference += weight * image_of(j)
    if total:
        interference /= total
    norm = interference @ interference
    scale = mine @ interference / norm if norm else 0.0
    return plain_filter(np.maximum(mine - scale * interference, 0).reshape(GRID), window)


@pytest.mark.parametrize("window", [1, 3])
def test_maps_by_hand(window, x64):
    logits, ids = random_texts()
    found = jax.jit(
        lambda x, i: token_activation(
            x, i, image=IMAGE, words=WORDS, prompt=PROMPT, grid=GRID, window=window
        )
    )(logits, ids)
    assert found.shape == (2, len(WORDS), *GRID)
    for b in range(2):
        for k in range(len(WORDS)):
            wanted = plain_map(logits[b], ids[b], k, window)
            np.testing.assert_allclose(found[b, k], wanted, rtol=1e-12, atol=1e-15)


def test_what_preceding_words_explain_goes(x64):
    """A map that is a multiple of the interference leaves nothing; the same word does not count."""
    logits, ids = np.full((1, 4, 3), 1.0), np.array([[0, 0, 1, 2]])
    logits[0, :2, 1], logits[0, :2, 2] = (1, 3), (2, 6)
    options = {"image": (0, 1), "words": (2, 3), "grid": (1, 2), "window": 1}
    found = token_activation(logits, ids, **options)
    np.testing.assert_array_equal(found[0, :, 0], [[1, 3], [0, 0]])
    again = token_activation(logits, np.array([[0, 0, 2, 2]]), **options)
    np.testing.assert_array_equal(again[0, :, 0], [[2, 6], [2, 6]])


def test_the_filter_of_flat_and_empty_maps(x64):
    for value in (0.0, 2.5):
        np.testing.assert_array_equal(rank_gaussian(jnp.full((3, 4), value)), value)
    alone = np.zeros((5, 5))
    alone[2, 2] = 9.0
    assert float(rank_gaussian(alone).max()) < 1


def test_on_a_decoder(x64):
    """The image's token that says the word is where its map is."""
    head = np.eye(4)
    x = np.zeros((1, 7, 4))
    x[0, 2, 3], x[0, 5, 3] = 5, 1
    ids = np.array([[0, 0, 0, 0, 1, 2, 3]])
    found = token_activation(x @ head, ids, image=range(4), words=(5, 6), grid=(2, 2), window=1)
    assert found[0, 1].argmax() == 2
    assert jaxrel.token_activation is token_activation


BAD = {
    "ids": ({"ids": np.zeros((2, 5), int)}, r"ids of shape \[2, 5\] and logits of \[2, 13, 5\]"),
    "grid": ({"grid": (2, 2)}, "6 tokens of the image, and a grid of 2 x 2"),
    "before": ({"words": (7,), "prompt": ()}, r"words come after the image; got .* image to 7"),
    "outside": ({"words": (10, 13)}, r"must ascend below 13, .* words \[10, 13\]"),
    "order": ({"words": (11, 10)}, r"must ascend below 13, .* words \[11, 10\]"),
    "none": ({"words": ()}, r"words \[\]"),
    "even": ({"window": 2}, "window must be odd, .* got 2 for 2 x 3"),
    "wide": ({"window": 5}, "less than twice a side of the grid; got 5 for 2 x 3"),
}


@pytest.mark.parametrize(("options", "text"), BAD.values(), ids=BAD.keys())
def test_errors(options, text):
    logits, ids = random_texts()
    known = {"ids": ids, "image": IMAGE, "words": WORDS, "prompt": PROMPT, "grid": GRID}
    with pytest.raises(ValueError, match=text):
        token_activation(logits, **{**known, **options})
