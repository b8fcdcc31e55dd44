"""Equal and weighted accumulation: the equations by hand, the reference, and the loop."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import numpy as jnp

from jaxrel import attention
from jaxrel.attention.accumulate import (
    Stream,
    cross_attention,
    normalised,
    own,
    self_attention,
    start,
)
from tests.attention.golden import clip_maps, load
from tests.attention.naive import MEASURES, one_head, random_maps

# ---- one stream, by hand


FIRST, SECOND = [[1, 0], [0.5, 0.5]], [[0, 2], [1, 0]]


def test_eq_6_equal():
    relevance = attention.equal(*one_head(FIRST, SECOND))
    np.testing.assert_array_equal(relevance, [[[3, 3], [2.5, 1.5]]])


def test_weighted_by_hand():
    before = np.array([[3, -1], [0, 1]], np.float32)[:, None, :, None]
    after = np.array([[-1, 1], [0, 3]], np.float32)[:, None, :, None]
    # alpha = (1.5, 1) and (1, 0.5), beta = (0.5, 1) and (1, 1.5): 0/0 gives 1 and 1.
    relevance = attention.weighted(
        *one_head(FIRST, SECOND),
        before=before,
        after=after,
        value_grad=np.ones_like(after),
        importance="norm",
    )
    np.testing.assert_array_equal(relevance, [[[3, 3], [3.25, 0.75]]])


# ---- two streams, by hand: two tokens in s, three in q


def array(rows):
    """One example."""
    return jnp.array([rows], jnp.float32)


def stream(moved, other, kept=(1.0, 1.0)):
    return Stream(kept=array(kept), moved=array(moved), other=array(other))


def test_eq_6_self_attention():
    before = stream([[1, 0], [0.5, 0.5]], np.zeros((2, 3)))
    after = self_attention(before, array([[0, 2], [1, 0]]))
    np.testing.assert_array_equal(own(after), [[[3, 3], [2.5, 1.5]]])


def test_eq_7_self_attention_on_the_other_stream():
    before = stream(np.zeros((2, 2)), [[1, 2, 0], [0, 1, 1]])
    after = self_attention(before, array([[1, 0], [0.5, 0.5]]))
    np.testing.assert_array_equal(after.other, [[[2, 4, 0], [0.5, 2.5, 1.5]]])


def test_eq_8_and_9_normalised():
    s = stream([[1, 3], [0, 0]], np.zeros((2, 3)))
    np.testing.assert_array_equal(normalised(s), [[[1.25, 0.75], [0, 1]]])


def test_eq_10_and_11_cross_attention():
    s = stream([[1, 3], [0, 0]], np.zeros((2, 3)))
    q = Stream(
        kept=jnp.ones((1, 3)), moved=jnp.zeros((1, 3, 3)), other=array([[1, 0], [0, 1], [2, 0]])
    )
    after = cross_attention(s, q, array([[1, 0, 2], [0, 4, 0]]))
    np.testing.assert_array_equal(after.other, [[[1.25, 0, 2.5], [0.75, 4, 1.5]]])  # eq. 10
    np.testing.assert_array_equal(own(after), [[[1 + 1 + 5, 3], [0, 1 + 4]]])  # eq. 11


def test_weights_multiply_both_maps_of_the_query_stream():
    s = stream([[1, 3], [0, 0]], [[1, 2, 0], [0, 1, 1]])
    alpha, beta = array([0.5, 2]), array([1.5, 0])
    abar = array([[1, 0], [0.5, 0.5]])
    after = self_attention(s, abar, alpha, beta)
    for old, new in ((own(s), own(after)), (s.other, after.other)):
        expected = alpha[..., None] * old + beta[..., None] * (abar @ old)
        np.testing.assert_array_equal(new, expected)
    q = start(1, 3, 2)
    plain, weighed = (
        cross_attention(s, q, array(np.ones((2, 3))), *w) for w in ((), (alpha, beta))
    )
    expected = alpha[..., None] * s.other + beta[..., None] * (plain.other - s.other)
    np.testing.assert_allclose(weighed.other, expected, rtol=1e-6)  # float32 subtraction


# ---- the reference's numbers, on a small CLIP


LAYERS = {"start0": None, "last": slice(-1, None)}


# Relevance is about 1 on the diagonal, so 1e-6 is a few units of float32 rounding.
CLOSE = {"rtol": 0, "atol": 1e-6}


@pytest.mark.parametrize("layers", LAYERS)
def test_equal_matches_the_reference(layers):
    clip = load("clip")
    image = attention.equal(
        clip_maps("vision", "attn"), clip_maps("vision", "attn_grad"), layers=LAYERS[layers]
    )
    np.testing.assert_allclose(image, clip[f"relevance/image_full_{layers}"], **CLOSE)
    np.testing.assert_allclose(
        attention.row(image, 0)[:, 1:], clip[f"relevance/image_{layers}"], **CLOSE
    )
    text = attention.equal(
        clip_maps("text", "attn"), clip_maps("text", "attn_grad"), layers=LAYERS[layers]
    )
    np.testing.assert_allclose(text, clip[f"relevance/text_{layers}"], **CLOSE)
    rows = attention.row(text, clip["eot_index"])
    for row, end, expected in zip(
        rows, clip["eot_index"], clip[f"display/text_scores_{layers}"], strict=True
    ):
        np.testing.assert_allclose(row[1:end] / row[1:end].sum(), expected[1:end], **CLOSE)


# ---- one meaning in every form


def by_loop(attn, grad, values=None, measure=None):
    """The definition, one example and one layer at a time."""
    result = []
    for b in range(attn.shape[1]):
        relevance = np.eye(attn.shape[-1])
        for layer in range(len(attn)):
            abar = np.maximum(grad[layer, b] * attn[layer, b], 0).mean(0)
            alpha, beta = np.ones((2, len(relevance)))
            if measure is not None:
                before, after, g = (values[k][layer, b] for k in ("before", "after", "value_grad"))
                u, v = measure(before, g), measure(after, g)
                alpha, beta = 2 * u / (u + v), 2 * v / (u + v)
            relevance = alpha[:, None] * relevance + beta[:, None] * (abar @ relevance)
        result.append(relevance)
    return np.stack(result)


@pytest.mark.usefixtures("x64")
@settings(max_examples=5, deadline=None, database=None)
@given(
    seed=st.integers(0, 2**16),
    layers=st.integers(1, 3),
    batch=st.integers(1, 2),
    heads=st.integers(1, 3),
    tokens=st.integers(1, 6),
)
def test_scan_is_the_loop(seed, layers, batch, heads, tokens):
    sizes = {"layers": layers, "batch": batch, "heads": heads, "tokens": tokens}
    attn, grad, values = random_maps(seed, **sizes)
    # float64: only the order of sums differs.
    close = {"rtol": 1e-12, "atol": 1e-12}
    np.testing.assert_allclose(attention.equal(attn, grad), by_loop(attn, grad), **close)
    np.testing.assert_allclose(
        attention.weighted(attn, grad, **values, importance="norm"),
        by_loop(attn, grad, values, MEASURES["norm"]),
        **close,
    )


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("name", MEASURES)
def test_weighted_is_the_loop(name):
    attn, grad, values = random_maps(1)
    relevance = attention.weighted(attn, grad, **values, importance=name)
    expected = by_loop(attn, grad, values, MEASURES[name])
    # float64: only the order of sums differs.
    np.testing.assert_allclose(relevance, expected, rtol=1e-12, atol=1e-12)


def test_equal_importance_is_equal_accumulation():
    attn, grad, values = random_maps(2, dtype=np.float32)
    values["after"] = values["before"]
    for name in MEASURES:
        relevance = attention.weighted(attn, grad, **values, importance=name)
        # The weights are exactly 1; only fusion of float32 sums may differ.
        np.testing.assert_allclose(relevance, attention.equal(attn, grad), rtol=1e-6, atol=1e-6)


def test_own_measure():
    attn, grad, values = random_maps(3, dtype=np.float32)

    def widest(value, grad):
        return jnp.abs(value).max(axis=-1)

    relevance = attention.weighted(attn, grad, **values, importance=widest)
    expected = by_loop(attn, grad, values, lambda value, _: np.abs(value).max(-1))
    np.testing.assert_allclose(relevance, expected, rtol=1e-5, atol=1e-6)  # float32 sums


def test_masked_keys_get_no_relevance():
    attn, grad, values = random_maps(10, dtype=np.float32)
    attn[..., -1] = 0
    for relevance in (attention.equal(attn, grad), attention.weighted(attn, grad, **values)):
        assert not relevance[:, :-1, -1].any()
