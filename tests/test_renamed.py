"""Old names: each still works, warns, and is the new one."""

import importlib

import jax
import numpy as np
import pytest
from jax import numpy as jnp

import jaxrel
from jaxrel import attention
from tests.attention.naive import random_layers

OLD = {
    "jaxrel.attention.TWO_STREAM_METHODS": "jaxrel.attention.BIMODAL_METHODS",
    "jaxrel.attention.carrier": "jaxrel.attention.streaming",
    "jaxrel.attention.two_streams": "jaxrel.attention.bimodal_accumulation",
    "jaxrel.attention.value_and_two_stream_relevance": (
        "jaxrel.attention.value_and_bimodal_relevance"
    ),
    "jaxrel.pictures.read_picture": "jaxrel.images.read_image",
    "jaxrel.explainer.METHODS": "jaxrel.explanations.explain.METHODS",
    "jaxrel.explainer.SIGNED": "jaxrel.explanations.explain.SIGNED",
    "jaxrel.explainer.TWO_STREAM": "jaxrel.explanations.explain.BIMODAL_METHODS",
    "jaxrel.explanations.explain.TWO_STREAM": "jaxrel.explanations.explain.BIMODAL_METHODS",
    "jaxrel.explanation.Explanation": "jaxrel.explanations.result.Explanation",
    "jaxrel.verdict.Verdict": "jaxrel.flags.Flag",
    "jaxrel.word_relevance.SIGNED_WORDS": "jaxrel.explanations.words.SIGNED_WORDS",
    "jaxrel.word_relevance.WORD_METHODS": "jaxrel.explanations.words.WORD_METHODS",
    "jaxrel.models.processor.image_processing": "jaxrel.models.preprocessing.image_processing",
    "jaxrel.models.weights.PRETRAINED": "jaxrel.models.checkpoint.PRETRAINED",
    "jaxrel.metrics.hits": "jaxrel.metrics.localisation.pointing_game",
    "jaxrel.metrics.share_inside": "jaxrel.metrics.localisation.relevance_mass_accuracy",
    "jaxrel.metrics.perturbation.markdown": "jaxrel.train.evaluate.perturbation.markdown",
    "jaxrel.report.picture": "jaxrel.report.figure",
    "jaxrel.train.settings.FinetuneShapes": "jaxrel.train.recipes.finetune.FinetuneShapes",
}


def find(name):
    module, attribute = name.rsplit(".", 1)
    return getattr(importlib.import_module(module), attribute)


@pytest.mark.parametrize(("old", "new"), OLD.items())
def test_old_names_warn_and_work(old, new):
    with pytest.warns(DeprecationWarning, match=f"{old} is now {new}"):
        assert find(old) is find(new)


def test_other_names_are_missing():
    with pytest.raises(AttributeError, match="has no attribute 'photograph'"):
        find("jaxrel.report.photograph")
    with pytest.raises(AttributeError, match="has no attribute 'photograph'"):
        find("jaxrel.pictures.photograph")


# ---- arguments

TOKENS = np.random.default_rng(0).normal(size=(2, 3, 4)).astype(np.float32)


def attends(x, y):
    """One attention from x to y, added to x."""
    maps = jaxrel.tag(jax.nn.softmax(x @ y.swapaxes(1, 2))[:, None], "maps")
    return (x + (maps @ y[:, None])[:, 0])[:, 1].sum(-1)


def co_attention():
    return attention.CoAttention(*[random_layers(np.random.default_rng(0), 1, 3, 3)] * 4)


READOUT = {
    "row": lambda **token: attention.row(jnp.eye(3)[None], **token),
    "bimodal": lambda **token: attention.bimodal(None, None, co_attention(), **token),
    "relevance": lambda **token: attention.relevance(lambda x: attends(x, x), **token)(TOKENS),
    "value_and_relevance": lambda **token: attention.value_and_relevance(
        lambda x: attends(x, x), **token
    )(TOKENS),
    "value_and_bimodal_relevance": lambda **token: attention.value_and_bimodal_relevance(
        attends, [[[("sq", "maps")]]], method="equal", **token
    )(TOKENS, TOKENS[:, :2]),
}


@pytest.mark.parametrize(("name", "function"), READOUT.items(), ids=READOUT.keys())
def test_readout_is_now_target_token(name, function):
    with pytest.warns(DeprecationWarning, match=f"^{name}: the argument readout is now target"):
        old = function(readout=1)
    jax.tree.map(np.testing.assert_array_equal, old, function(target_token=1))
    with pytest.raises(TypeError, match=f"{name}: readout is now target_token; give only target"):
        function(readout=1, target_token=1)
