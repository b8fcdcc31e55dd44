"""The baselines: by hand, and against the reference's numbers on a small CLIP."""

import numpy as np
import pytest

from jaxrel import attention
from tests.attention.golden import clip_maps, load
from tests.attention.naive import float32, one_head, random_layers


def test_rollout_by_hand():
    attn, _ = one_head([[0.5, 0.5], [0, 1]], [[0, 1], [1, 0]])
    # rows of A + I made to sum to 1: [[.75, .25], [0, 1]] and then [[.5, .5], [.5, .5]]
    expected = [[[0.375, 0.625], [0.375, 0.625]]]
    np.testing.assert_array_equal(attention.rollout(attn), expected)


def test_grad_cam_by_hand():
    attn = np.array([[[1, 0], [0.5, 0.5]], [[0, 1], [0.5, 0.5]]], np.float32)[None, None]
    grad = np.array([[[4, 2], [1, 1]], [[-3, -1], [0, 0]]], np.float32)[None, None]
    # Head weights 2 and -1; the mean over the heads is clipped, not each head.
    expected = [[[1, 0], [0.25, 0.25]]]
    np.testing.assert_array_equal(attention.grad_cam(attn, grad), expected)


def test_no_aggregation_by_hand():
    relevance = attention.no_aggregation(*one_head([[1, 0], [0.5, 0.5]], [[0, 2], [1, 0]]))
    np.testing.assert_array_equal(relevance, [[[1, 1], [1, 0]]])


# Rollout is about 1 on the diagonal, so 1e-6 is a few units of float32 rounding.
CLOSE = {"rtol": 0, "atol": 1e-6}


@pytest.mark.parametrize(("tower", "name"), [("vision", "image"), ("text", "text")])
def test_baselines_match_the_reference(tower, name):
    clip = load("clip")
    attn, grad = clip_maps(tower, "attn"), clip_maps(tower, "attn_grad")
    for key, layers in (("start0", None), ("last", slice(-1, None))):
        rollout = attention.rollout(attn, layers=layers)
        np.testing.assert_allclose(rollout, clip[f"rollout/{name}_{key}"], **CLOSE)
    np.testing.assert_allclose(attention.raw(attn), clip[f"raw/{name}"], **CLOSE)
    np.testing.assert_allclose(attention.grad_cam(attn, grad), clip[f"gradcam/{name}"], **CLOSE)
    # A softmax's rows sum to 1, so leaving out the normalisation of A + I only scales.
    unscaled = 2 ** len(attn) * attention.rollout(attn)
    np.testing.assert_allclose(
        unscaled, clip[f"rollout_norownorm/{name}_start0"], rtol=0, atol=1e-5
    )


def test_cross_rollout_of_streams_that_do_not_fit():
    rng = np.random.default_rng(9)
    sizes = ((1, 4, 4), (2, 3, 3), (2, 3, 4))
    encoder, decoder, cross = (float32(random_layers(rng, *size)) for size in sizes)
    with pytest.raises(ValueError, match=r"with s queries and q keys in cross, got s_self \(1, "):
        attention.cross_rollout(encoder.attn, cross.attn, decoder.attn)
