"""Two streams found in models that nobody prepared, held to their tags and to the definitions."""

import functools

import jax
import numpy as np
import pytest
from flax import nnx
from jax import numpy as jnp

import jaxrel
from jaxrel import attention
from jaxrel.attention import BIMODAL_METHODS
from jaxrel.attention.methods import TABLE
from jaxrel.propagation import composites
from tests.attention.naive import rows_by_hand
from tests.zoo.bimodal import (
    IMAGE,
    LATENTS,
    MODELS,
    QUERIES,
    SOUND,
    TOKENS,
    WIDTH,
    attend,
    detr,
    perceiver,
    whisper,
)


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


def equal(fun, *args, **options):
    explain = attention.value_and_bimodal_relevance(fun, method="equal", **options)
    return jax.jit(explain)(*args)[1]


def test_tokens_may_be_constants():
    """A decoder's tokens that the function closes over are a stream like those it is given."""
    got = equal(lambda sound: whisper(sound, TOKENS), SOUND, target_token=-1)
    want = equal(whisper, SOUND, TOKENS, target_token=-1)
    for one, other in zip(got, want, strict=True):
        # float64 rounding.
        np.testing.assert_allclose(one, other, rtol=1e-9, atol=1e-12)


class Decoder(nnx.Module):
    """Flax's own attention modules, and queries that are a parameter."""

    def __init__(self, rngs):
        def attention():
            return nnx.MultiHeadAttention(2, WIDTH, decode=False, rngs=rngs, param_dtype=float)

        self.queries = nnx.Param(jnp.asarray(QUERIES))
        self.encoder, self.decoder, self.cross = (attention() for _ in range(3))

    def __call__(self, image):
        x = image.reshape(len(image), 16, WIDTH)
        x = x + self.encoder(x)
        q = jnp.broadcast_to(self.queries[...], (len(image), *QUERIES.shape))
        q = q + self.decoder(q)
        q = q + self.cross(q, x)
        return q[:, 0].sum(-1)


@pytest.mark.parametrize("module", ["function", "argument"])
def test_modules_of_flax(module):
    model = Decoder(nnx.Rngs(0))
    if module == "function":
        of_s, of_q = equal(model, IMAGE, target_token=0)
    else:
        of_s, of_q = equal(lambda model, image: model(image), model, IMAGE, target_token=0)
    assert of_s.shape == (2, 4)
    assert of_q.shape == (2, 16)
    # Its queries are constants, and so are the maps between them.
    assert (np.asarray(of_s) > 0).any()


def refused(fun, *args, match, kind=ValueError):
    with pytest.raises(kind, match=match):
        equal(fun, *args, target_token=0)


def test_what_is_no_pair_of_streams_is_refused():
    data = IMAGE.reshape(2, 16, WIDTH)
    one = lambda x: (x + add(x, x, 0))[:, 0].sum(-1)
    refused(one, data, match=r"expected two streams .*found 1 .*attention.relevance")

    def both(x):
        q = jnp.broadcast_to(LATENTS, (2, *LATENTS.shape))
        q = q + add(q, x, 0)
        x = x + add(x, x, 4)
        return q[:, 0].sum(-1) + x[:, 0].sum(-1)

    refused(both, data, match="the output must be read from one of the two streams, .*both")

    def beside(x):
        q = jnp.broadcast_to(LATENTS, (2, *LATENTS.shape)) + x.mean(1, keepdims=True)
        q = q + add(q, q, 0) + add(q, x, 4)
        return q[:, 0].sum(-1)

    refused(beside, data, match="beside another, not after it", kind=NotImplementedError)


def add(q, k, i):
    attn, out = attend(q, k, k, i)
    return out(attn)


def test_an_error_says_how_streams_are_followed():
    """`relevance` is of one stream; what it says of two is right."""
    args, _, token = MODELS[perceiver]
    with pytest.raises(ValueError, match=r"attention\.value_and_bimodal_relevance\(fun, method="):
        jax.jit(attention.relevance(perceiver, attention="attention"))(*args)
    of_s, of_q = equal(perceiver, *args, target_token=token)
    assert (of_s.shape, of_q.shape) == ((2, 3), (2, 16))
