"""From the pixels to the relevance: CLIP explained by the transformation, against stored values."""

import jax
import numpy as np
import pytest

from jaxrel import attention

LAST = slice(-1, None)
# The stored values are float64 results rounded to float32; ours run the model in float32.
TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


def relevance(model, inputs, **options):
    explain = attention.relevance(
        lambda model, inputs: model.score(model.pairs(inputs)),
        attention=("vision", "text"),
        **options,
    )
    return jax.jit(explain)(model, inputs)


@pytest.mark.parametrize(("layers", "name"), [(None, "start0"), (LAST, "last")])
def test_whole_matrices(reference, reference_inputs, golden, layers, name):
    found = relevance(
        reference,
        reference_inputs,
        method=("equal", "rollout", "raw", "grad_cam"),
        layers=layers,
        target_token=None,
    )
    want = golden[f"relevance/image_full_{name}"]
    np.testing.assert_allclose(found["equal"]["vision"], want, **TOLERANCE)
    np.testing.assert_allclose(
        found["equal"]["text"], golden[f"relevance/text_{name}"], **TOLERANCE
    )
    np.testing.assert_allclose(
        found["rollout"]["vision"], golden[f"rollout/image_{name}"], **TOLERANCE
    )
    np.testing.assert_allclose(
        found["rollout"]["text"], golden[f"rollout/text_{name}"], **TOLERANCE
    )
    if layers is None:
        for method, stored in (("raw", "raw"), ("grad_cam", "gradcam")):
            for stream, modality in (("vision", "image"), ("text", "text")):
                want = golden[f"{stored}/{modality}"]
                np.testing.assert_allclose(found[method][stream], want, **TOLERANCE)


def test_streamed_rows(reference, reference_inputs, golden):
    target_token = reference.target_tokens(reference_inputs)
    found = relevance(reference, reference_inputs, method="equal", target_token=target_token)
    image = golden["relevance/image_start0"]
    np.testing.assert_allclose(found["vision"][:, 1:], image, **TOLERANCE)
    rows = golden["relevance/text_start0"][np.arange(3), golden["eot_index"]]
    np.testing.assert_allclose(found["text"], rows, **TOLERANCE)


def test_scores_of_the_text_as_displayed(reference, reference_inputs, golden):
    found = relevance(
        reference,
        reference_inputs,
        method="equal",
        target_token=reference.target_tokens(reference_inputs),
    )["text"]
    content = np.where(reference.content(reference_inputs)["text"], found, 0)
    shown = content / content.sum(-1, keepdims=True)
    np.testing.assert_allclose(shown, golden["display/text_scores_start0"], **TOLERANCE)


@pytest.mark.parametrize(("layers", "name"), [(None, "start0"), (LAST, "last")])
def test_one_image_with_all_texts(reference, reference_inputs, golden, layers, name):
    shared = {**reference_inputs, "image": reference_inputs["image"][:1]}
    found = relevance(reference, shared, method="equal", layers=layers, target_token=None)
    image = golden[f"shared/relevance_image_{name}"]
    np.testing.assert_allclose(found["vision"][:, 0, 1:], image, **TOLERANCE)
    text = golden[f"shared/relevance_text_{name}"]
    np.testing.assert_allclose(found["text"], text, **TOLERANCE)


def test_the_maps_are_found_without_their_tags(reference, reference_inputs):
    """Structure alone finds both towers, and the residual stream around each attention."""
    found = attention.sites(lambda model, inputs: model.score(inputs))(reference, reference_inputs)
    assert [(s.name, s.layers, s.is_self, s.has_residual) for s in found] == [
        ("vision", 3, True, True),
        ("text", 2, True, True),
    ]
