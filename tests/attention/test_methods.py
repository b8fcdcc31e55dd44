"""The table of methods, and what holds for all of them."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from jaxrel import attention
from jaxrel.attention.methods import TABLE
from tests.attention.naive import random_inputs
from tests.paths import ROOT

SIGNED, BY_LRP = {"partial_lrp"}, {"transformer_attribution", "equal_lrp", "partial_lrp"}


def test_the_table_is_what_users_choose_from():
    assert (
        *("equal", "weighted", "raw", "rollout", "grad_cam", "no_aggregation"),
        *("equal_lrp", "partial_lrp", "token_tm"),
    ) == attention.METHODS
    assert attention.ENCODER_METHODS == ("legrad", "grad_eclip")
    assert (
        *("equal", "weighted", "raw", "rollout", "grad_cam", "transformer_attribution"),
        *("equal_lrp", "partial_lrp"),
    ) == attention.BIMODAL_METHODS
    assert {name for name, method in TABLE.items() if method.signed} == SIGNED
    assert {name for name, method in TABLE.items() if method.by_lrp} == BY_LRP
    assert all(method.cost and method.source for method in TABLE.values())


def test_the_readme_lists_the_table():
    where = {"one": "one stream", "bimodal": "two streams", "encoder": "CLIP"}
    page = (ROOT / "jaxrel/attention/README.md").read_text(encoding="utf-8")
    for m in TABLE.values():
        name = f"`{m.name}`" + (" (signed)" if m.signed else "")
        of, needs = ", ".join(where[s] for s in m.streams), ", ".join(m.needs)
        row = f"| {name} | {of} | {needs} | {m.layers} | {m.cost} | {m.source} |"
        assert row in page.splitlines(), row


@pytest.mark.parametrize("name", TABLE)
def test_signs_and_layers_are_what_the_table_says(name):
    rng = np.random.default_rng(0)
    attn, grad, values = random_inputs(0, dtype=np.float32)
    if TABLE[name].by_lrp:
        attn = rng.normal(size=attn.shape).astype(np.float32)
    matrix = TABLE[name].relevance_matrix(attn, grad, values)
    assert (matrix < 0).any() == TABLE[name].signed
    attn[0], grad[0] = attn[0, :, :, ::-1, ::-1], 2 * grad[0]
    changed = TABLE[name].relevance_matrix(attn, grad, values)
    assert np.array_equal(matrix, changed) == (TABLE[name].layers == "last")


FROM_MAPS = [name for name, method in TABLE.items() if not method.by_lrp]


@pytest.fixture(params=FROM_MAPS)
def method(request):
    return TABLE[request.param].relevance_matrix


def test_jit_is_eager(method):
    inputs = random_inputs(4, dtype=np.float32)
    # Fusion may change the last bits of a float32 sum.
    np.testing.assert_allclose(jax.jit(method)(*inputs), method(*inputs), rtol=1e-6, atol=1e-6)


def test_batch_is_one_by_one(method):
    inputs = random_inputs(5, dtype=np.float32)
    together = method(*inputs)
    for b in range(2):
        alone = method(*jax.tree.map(lambda x, b=b: x[:, b : b + 1], inputs))
        # A product of matrices may sum in another order in a larger batch.
        np.testing.assert_allclose(together[b : b + 1], alone, rtol=1e-6, atol=1e-6)


def test_vmap_is_one_by_one(method):
    inputs = [random_inputs(seed, dtype=np.float32) for seed in (6, 7)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *inputs)
    together = jax.vmap(method)(*stacked)
    for result, alone in zip(together, inputs, strict=True):
        np.testing.assert_allclose(result, method(*alone), rtol=1e-6, atol=1e-6)  # as above


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_relevance_is_float32(method, dtype):
    inputs = jax.tree.map(lambda x: jnp.asarray(x, dtype), random_inputs(8))
    relevance = method(*inputs)
    assert relevance.dtype == jnp.float32
    # The inputs are rounded, the accumulation is not: exact inputs give the same.
    exact = method(*jax.tree.map(lambda x: x.astype(jnp.float32), inputs))
    np.testing.assert_allclose(relevance, exact, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("x64")
def test_relevance_of_float64_stays_float64(method):
    assert method(*random_inputs(9)).dtype == jnp.float64


def test_finite_even_when_nothing_is_relevant(method):
    inputs = jax.tree.map(np.zeros_like, random_inputs(11, dtype=np.float32))
    assert np.isfinite(method(*inputs)).all()


# ---- selections


def test_layers(method):
    attn, grad, values = random_inputs(12, dtype=np.float32)
    chosen = [0, 2]
    expected = method(attn[chosen], grad[chosen], {k: v[chosen] for k, v in values.items()})
    np.testing.assert_array_equal(method(attn, grad, values, layers=[-1, 0]), expected)


def test_heads(method):
    attn, grad, values = random_inputs(13, heads=3, dtype=np.float32)
    by_head = {k: v[:, :, :, [0, 2]] if v.ndim == 5 else v for k, v in values.items()}
    expected = method(attn[:, :, [0, 2]], grad[:, :, [0, 2]], by_head)
    np.testing.assert_array_equal(method(attn, grad, values, heads=[0, -1]), expected)


def test_missing_layer(method):
    with pytest.raises(ValueError, match=r"layers: 3 does not exist; there are 3 layers, 0 to 2"):
        method(*random_inputs(14, dtype=np.float32), layers=[3])


def test_missing_head(method):
    with pytest.raises(ValueError, match=r"heads: 2 does not exist; there are 2 heads, 0 to 1"):
        method(*random_inputs(15, dtype=np.float32), heads=[2])


def test_rank_that_does_not_fit(method):
    attn, grad, values = random_inputs(16, dtype=np.float32)
    with pytest.raises(ValueError, match=r"expected maps \[layers, batch, heads, query, key\]"):
        method(attn[0], grad[0], values)
