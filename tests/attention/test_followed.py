"""Coverage: what share of a model's attention a relevance follows, and what it leaves out."""

import jax
import pytest
from jax import numpy as jnp

from jaxrel import attention
from jaxrel.attention.bimodal_relevance import covered_bimodal_relevance
from tests.attention.small_models import MODEL, WEIGHTS, X, attend
from tests.zoo.bimodal import MODELS, detr


def encoder_decoder(x):
    for i in range(3):
        x = x + attend(x, i)
    q = jnp.broadcast_to(WEIGHTS[0, :4], (len(x), 4, x.shape[-1])) + x.mean(1, keepdims=True)
    q = q + attend(q, 3)
    return (q + attend(q, 4, x))[:, 0].sum(-1)


def followed(fun, **options):
    coverage = attention.layers_followed(fun, **options)(X)
    return coverage.followed, coverage.layers


def test_all_layers_of_one_stream():
    coverage = attention.layers_followed(MODEL)(X)
    assert coverage == attention.Coverage(2, 2)
    assert coverage.share == 1
    assert str(coverage) == "2 of 2 layers of attention"


def test_what_is_left_out_is_counted_and_named():
    coverage = attention.layers_followed(encoder_decoder, method="equal", attention="attention")(X)
    assert (coverage.followed, coverage.layers, coverage.share) == (3, 5, 0.6)
    own, across = coverage.left_out
    assert "'attention_1': self-attention, layers 1" in own
    assert "'attention_2': cross-attention, layers 1" in across
    assert "small_models.py" in across
    both = ("attention", "attention_1")
    assert followed(encoder_decoder, method="equal", attention=both) == (4, 5)


def test_a_choice_of_layers_and_methods_of_the_last_follow_less():
    options = {"attention": "attention"}
    assert followed(encoder_decoder, method="equal", layers=[0, 1], **options) == (2, 5)
    coverage = attention.layers_followed(encoder_decoder, method=("raw", "rollout"), **options)(X)
    assert {name: one.followed for name, one in coverage.items()} == {"raw": 1, "rollout": 3}
    assert coverage["raw"].left_out[0].startswith("2 layers of 'attention'")


@pytest.mark.parametrize(
    ("method", "count"), [("equal", 5), ("raw", 2), ("rollout", 4), ("partial_lrp", 2)]
)
def test_two_streams(method, count):
    args, schedule, _ = MODELS[detr]

    def coverage(fun, schedule=None):
        found = []

        def explained(*args):
            explain = covered_bimodal_relevance(fun, schedule, method=method, target_token=0)
            found.append(explain(*args)[2][method])
            return 0

        jax.eval_shape(explained, *args)
        return found[0]

    assert coverage(detr)[:2] == (count, 5)
    tagged = lambda image: detr(image, tagged=True)
    assert coverage(tagged, schedule)[:2] == (count, 5)


def test_tags_of_a_part_follow_a_part():
    args, _, _ = MODELS[detr]
    part = (((("sq", "cross"),),),)
    found = []

    def explained(*args):
        tagged = lambda image: detr(image, tagged=True)
        explain = covered_bimodal_relevance(tagged, part, method="equal", target_token=0)
        found.append(explain(*args)[2]["equal"])
        return 0

    jax.eval_shape(explained, *args)
    assert found[0][:2] == (2, 4)
    assert all("bimodal.py" in line for line in found[0].left_out)
