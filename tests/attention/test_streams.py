"""Two streams found in models that nobody prepared, held to their tags and to the definitions."""

import functools

import jax
import numpy as np
import pytest

import jaxrel
from jaxrel import attention
from jaxrel.attention import BIMODAL_METHODS
from jaxrel.attention.methods import TABLE
from jaxrel.propagation import composites
from tests.attention.naive import rows_by_hand
from tests.zoo.bimodal import MODELS, detr, whisper


@pytest.fixture(autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("model", MODELS)
def test_all_methods_of_streams_that_are_found(model):
    """By hand from the layers that tags give, in the order that a schedule says."""
    args, schedule, token = MODELS[model]
    tags = sorted({tag for block in schedule for stage in block for _, tag in stage})
    by_tags = functools.partial(model, tagged=True)
    # More tags would stand between the sums and what LRP takes together with them.
    marked = functools.partial(model, tagged="maps")
    rules = composites.attn_lrp()

    def both(*data):
        explained = attention.value_and_bimodal_relevance(
            model, method=BIMODAL_METHODS, target_token=token
        )
        plain = attention.value_and_layers(by_tags, schedule)(*data)
        by_lrp = jaxrel.lrp(marked, rules, argnums=None, at=tags)(*data)
        return explained(*data), plain, by_lrp

    (out, got), (value, plain), by_lrp = jax.device_get(jax.jit(both)(*args))
    np.testing.assert_allclose(out, value, rtol=1e-12)
    stacked = lambda x: x if x.ndim == 5 else x[None]
    by_lrp = {tag: plain[tag]._replace(attn=stacked(by_lrp[tag])) for tag in tags}
    for name in BIMODAL_METHODS:
        layers = by_lrp if TABLE[name].by_lrp else plain
        for b in range(len(out)):
            # Which of s's tokens reach the output after the last attention across.
            seen = [token] if model in (detr, whisper) else slice(None)
            maps = rows_by_hand(name, schedule, layers, b, seen)
            for row, expected in zip(got[name], maps, strict=True):
                # float64 rounding of two orders of summation.
                np.testing.assert_allclose(
                    row[b], expected[token], rtol=1e-9, atol=1e-12, err_msg=name
                )
