"""Equal and weighted accumulation over one stream, and the baselines."""

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import numpy as jnp

from jaxrel import attention
from jaxrel.attention import maps
from tests.paths import FIXTURES

CLIP = FIXTURES / "attention_clip.npz"

# The measures as defined, in NumPy.
MEASURES = {
    "grad_value": lambda value, grad: np.maximum(grad * value, 0).sum(-1),
    "norm": lambda value, grad: np.linalg.norm(value, axis=-1),
    "abs_grad_value": lambda value, grad: abs((grad * value).sum(-1)),
}


def random_maps(seed, layers=3, batch=2, heads=2, tokens=5, width=4, dtype=np.float64):
    rng = np.random.default_rng(seed)
    attn = rng.dirichlet(np.ones(tokens), (layers, batch, heads, tokens)).astype(dtype)
    grad = rng.normal(size=attn.shape).astype(dtype)
    names = ("before", "after", "value_grad")
    shape = (layers, batch, tokens, width)
    return attn, grad, {name: rng.normal(size=shape).astype(dtype) for name in names}


def one_head(*layers):
    """Maps [layers, 1, 1, T, T]; with a gradient of 1 they are their own head mean."""
    attn = np.array(layers, np.float32)[:, None, None]
    return attn, np.ones_like(attn)


# ---- the equations, by hand

FIRST, SECOND = [[1, 0], [0.5, 0.5]], [[0, 2], [1, 0]]


def test_eq_5_head_mean():
    attn = jnp.array([[[0.5, 0.25, 0.25], [0, 1, 0]], [[1, 0, 0], [0.5, 0, 0.5]]])
    grad = jnp.array([[[2.0, -4, 4], [8, 1, 0]], [[-1, 5, 2], [2, 0, 4]]])
    expected = [[0.5, 0, 0.5], [0.5, 0.5, 1]]
    np.testing.assert_array_equal(attention.head_mean(attn, grad), expected)


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


def test_weights_sum_to_two_and_stay_at_one_where_nothing_is_important():
    alpha, beta = attention.weights(jnp.array([3.0, 0, 0, 2]), jnp.array([1.0, 5, 0, 0]))
    np.testing.assert_array_equal(alpha, [1.5, 0, 1, 2])
    np.testing.assert_array_equal(beta, [0.5, 2, 1, 0])


def test_weights_do_not_hide_a_nan():
    alpha, beta = attention.weights(jnp.array([jnp.nan]), jnp.array([1.0]))
    assert np.isnan(alpha).all()
    assert np.isnan(beta).all()


@pytest.mark.parametrize(
    ("name", "expected"), [("grad_value", 8.0), ("norm", 5.0), ("abs_grad_value", 1.0)]
)
def test_measures_by_hand(name, expected):
    value, grad = jnp.array([[3.0, -4.0]]), jnp.array([[-3.0, -2.0]])
    np.testing.assert_array_equal(attention.measure(name)(value, grad), [expected])


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
    relevance = attention.no_aggregation(*one_head(FIRST, SECOND))
    np.testing.assert_array_equal(relevance, [[[1, 1], [1, 0]]])


# ---- the reference's numbers, on a small CLIP


@pytest.fixture(scope="module")
def clip():
    with np.load(CLIP, allow_pickle=False) as file:
        return dict(file)


def stack(clip, tower, kind):
    layers = sum(name.startswith(f"{tower}/attn/") for name in clip)
    return np.stack([clip[f"{tower}/{kind}/{layer}"] for layer in range(layers)])


LAYERS = {"start0": None, "last": slice(-1, None)}


# Relevance is about 1 on the diagonal, so 1e-6 is a few units of float32 rounding.
CLOSE = {"rtol": 0, "atol": 1e-6}


@pytest.mark.parametrize("layers", LAYERS)
def test_equal_matches_the_reference(clip, layers):
    image = attention.equal(
        stack(clip, "vision", "attn"), stack(clip, "vision", "attn_grad"), layers=LAYERS[layers]
    )
    np.testing.assert_allclose(image, clip[f"relevance/image_full_{layers}"], **CLOSE)
    np.testing.assert_allclose(
        attention.row(image, 0)[:, 1:], clip[f"relevance/image_{layers}"], **CLOSE
    )
    text = attention.equal(
        stack(clip, "text", "attn"), stack(clip, "text", "attn_grad"), layers=LAYERS[layers]
    )
    np.testing.assert_allclose(text, clip[f"relevance/text_{layers}"], **CLOSE)
    rows = attention.row(text, clip["eot_index"])
    for row, end, expected in zip(
        rows, clip["eot_index"], clip[f"display/text_scores_{layers}"], strict=True
    ):
        np.testing.assert_allclose(row[1:end] / row[1:end].sum(), expected[1:end], **CLOSE)


@pytest.mark.parametrize(("tower", "name"), [("vision", "image"), ("text", "text")])
def test_baselines_match_the_reference(clip, tower, name):
    attn, grad = stack(clip, tower, "attn"), stack(clip, tower, "attn_grad")
    for key, layers in LAYERS.items():
        rollout = attention.rollout(attn, layers=layers)
        np.testing.assert_allclose(rollout, clip[f"rollout/{name}_{key}"], **CLOSE)
    np.testing.assert_allclose(attention.raw(attn), clip[f"raw/{name}"], **CLOSE)
    np.testing.assert_allclose(attention.grad_cam(attn, grad), clip[f"gradcam/{name}"], **CLOSE)
    # A softmax's rows sum to 1, so leaving out the normalisation of A + I only scales.
    unscaled = 2 ** len(attn) * attention.rollout(attn)
    np.testing.assert_allclose(
        unscaled, clip[f"rollout_norownorm/{name}_start0"], rtol=0, atol=1e-5
    )


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


METHODS = {
    "equal": lambda attn, grad, values, **kw: attention.equal(attn, grad, **kw),
    "weighted": lambda attn, grad, values, **kw: attention.weighted(attn, grad, **values, **kw),
    "raw": lambda attn, grad, values, **kw: attention.raw(attn, **kw),
    "rollout": lambda attn, grad, values, **kw: attention.rollout(attn, **kw),
    "grad_cam": lambda attn, grad, values, **kw: attention.grad_cam(attn, grad, **kw),
    "no_aggregation": lambda attn, grad, values, **kw: attention.no_aggregation(attn, grad, **kw),
}


@pytest.fixture(params=METHODS)
def method(request):
    return METHODS[request.param]


def test_jit_is_eager(method):
    inputs = random_maps(4, dtype=np.float32)
    # Fusion may change the last bits of a float32 sum.
    np.testing.assert_allclose(jax.jit(method)(*inputs), method(*inputs), rtol=1e-6, atol=1e-6)


def test_batch_is_one_by_one(method):
    inputs = random_maps(5, dtype=np.float32)
    together = method(*inputs)
    for b in range(2):
        alone = method(*jax.tree.map(lambda x, b=b: x[:, b : b + 1], inputs))
        # A product of matrices may sum in another order in a larger batch.
        np.testing.assert_allclose(together[b : b + 1], alone, rtol=1e-6, atol=1e-6)


def test_vmap_is_one_by_one(method):
    inputs = [random_maps(seed, dtype=np.float32) for seed in (6, 7)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *inputs)
    together = jax.vmap(method)(*stacked)
    for result, alone in zip(together, inputs, strict=True):
        np.testing.assert_allclose(result, method(*alone), rtol=1e-6, atol=1e-6)  # as above


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_relevance_is_float32(method, dtype):
    inputs = jax.tree.map(lambda x: jnp.asarray(x, dtype), random_maps(8))
    relevance = method(*inputs)
    assert relevance.dtype == jnp.float32
    # The inputs are rounded, the accumulation is not: exact inputs give the same.
    exact = method(*jax.tree.map(lambda x: x.astype(jnp.float32), inputs))
    np.testing.assert_allclose(relevance, exact, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("x64")
def test_relevance_of_float64_stays_float64(method):
    assert method(*random_maps(9)).dtype == jnp.float64


def test_masked_keys_get_no_relevance():
    attn, grad, values = random_maps(10, dtype=np.float32)
    attn[..., -1] = 0
    for relevance in (attention.equal(attn, grad), attention.weighted(attn, grad, **values)):
        assert not relevance[:, :-1, -1].any()


def test_finite_even_when_nothing_is_relevant(method):
    inputs = jax.tree.map(np.zeros_like, random_maps(11, dtype=np.float32))
    assert np.isfinite(method(*inputs)).all()


# ---- selections


@pytest.mark.parametrize(
    ("selection", "chosen"),
    [
        (slice(-1, None), (2,)),
        (slice(1, 3), (1, 2)),
        (slice(None, None, 2), (0, 2)),
        (slice(None, None, -1), (0, 1, 2)),
        ([-1, 0], (0, 2)),
        ((1, 1), (1,)),
        (range(3), (0, 1, 2)),
        (np.array([2]), (2,)),
        (None, (0, 1, 2)),
    ],
)
def test_selection(selection, chosen):
    assert maps.indices(selection, 3, "layers") == chosen


def test_layers(method):
    attn, grad, values = random_maps(12, dtype=np.float32)
    chosen = [0, 2]
    expected = method(attn[chosen], grad[chosen], {k: v[chosen] for k, v in values.items()})
    np.testing.assert_array_equal(method(attn, grad, values, layers=[-1, 0]), expected)


def test_heads(method):
    attn, grad, values = random_maps(13, heads=3, dtype=np.float32)
    expected = method(attn[:, :, [0, 2]], grad[:, :, [0, 2]], values)
    np.testing.assert_array_equal(method(attn, grad, values, heads=[0, -1]), expected)


@pytest.mark.parametrize("target_token", [2, -3, np.int64(2), np.array([2, 2]), jnp.array([2, -3])])
def test_row(target_token):
    relevance = np.arange(50, dtype=np.float32).reshape(2, 5, 5)
    np.testing.assert_array_equal(attention.row(relevance, target_token), relevance[:, 2])
    np.testing.assert_array_equal(jax.jit(attention.row)(relevance, target_token), relevance[:, 2])


def test_row_of_a_missing_token_under_jit_is_nan():
    assert np.isnan(jax.jit(attention.row)(jnp.ones((1, 3, 3)), 3)).all()


# ---- errors


@pytest.mark.parametrize(
    ("selection", "text"),
    [
        ([12], "layers: 12 does not exist; there are 3 layers, 0 to 2 (or -3 to -1 from the end)"),
        ([0, -4], "layers: -4 does not exist; there are 3 layers"),
        (slice(0, 5), "layers: 5 does not exist; there are 3 layers"),
        (slice(-5, None), "layers: -5 does not exist; there are 3 layers"),
        (slice(2, 2), "selects none; there are 3 layers"),
        ([], "layers: [] selects none; there are 3 layers"),
    ],
)
def test_missing_layers(selection, text):
    with pytest.raises(ValueError, match="layers") as error:
        maps.indices(selection, 3, "layers")
    assert text in str(error.value)


def test_missing_layer(method):
    with pytest.raises(ValueError, match=r"layers: 3 does not exist; there are 3 layers, 0 to 2"):
        method(*random_maps(14, dtype=np.float32), layers=[3])


def test_missing_head(method):
    with pytest.raises(ValueError, match=r"heads: 2 does not exist; there are 2 heads, 0 to 1"):
        method(*random_maps(15, dtype=np.float32), heads=[2])


@pytest.mark.parametrize("selection", [-1, 1.5, "12", [0.5]])
def test_selection_of_another_type(selection):
    with pytest.raises(TypeError, match=r"expected None, a slice .* layers=slice\(-2, None\)"):
        maps.indices(selection, 3, "layers")


@pytest.mark.parametrize(
    ("target_token", "error", "text"),
    [
        (5, ValueError, "target_token: 5 does not exist; there are 5 tokens, 0 to 4"),
        (np.array([0, -6]), ValueError, "target_token: -6 does not exist; there are 5 tokens"),
        (np.array([0, 1, 2]), ValueError, "one for each of 2 examples, got shape (3,)"),
        (0.5, TypeError, "target_token: expected integers, got float"),
    ],
)
def test_target_token_that_does_not_fit(target_token, error, text):
    with pytest.raises(error, match="target_token") as caught:
        maps.token_index(target_token, batch=2, tokens=5)
    assert text in str(caught.value)


def test_row_of_a_missing_token():
    with pytest.raises(ValueError, match="target_token: 3 does not exist; there are 3 tokens"):
        attention.row(np.ones((1, 3, 3), np.float32), 3)


def test_rank_that_does_not_fit(method):
    attn, grad, values = random_maps(16, dtype=np.float32)
    with pytest.raises(ValueError, match=r"expected maps \[layers, batch, heads, query, key\]"):
        method(attn[0], grad[0], values)


def test_maps_of_two_shapes():
    attn, grad, _ = random_maps(17, dtype=np.float32)
    with pytest.raises(ValueError, match=r"one shape, got attn \(3, .*\), grad \(2, .*\)"):
        attention.equal(attn, grad[:2])


def test_maps_between_two_streams():
    attn, grad, _ = random_maps(18, dtype=np.float32)
    with pytest.raises(ValueError, match=r"as many queries as keys, got .*see bimodal"):
        attention.equal(attn[..., :3], grad[..., :3])


@pytest.mark.parametrize("name", ["before", "after", "value_grad"])
def test_values_of_another_shape(name):
    attn, grad, values = random_maps(19, dtype=np.float32)
    values[name] = values[name][:, :, :-1]
    expected = rf"one shape \(3, 2, 5, width\), got .*{name} \(3, 2, 4, 4\)"
    with pytest.raises(ValueError, match=expected):
        attention.weighted(attn, grad, **values)


def test_unknown_measure():
    with pytest.raises(ValueError, match=r"'size' is unknown; expected one of grad_value, norm"):
        attention.measure("size")


def test_measure_of_another_shape():
    attn, grad, values = random_maps(20, dtype=np.float32)
    expected = r"expected one number per token, \(2, 5\), .* got \(2, 5, 4\)"
    with pytest.raises(ValueError, match=expected):
        attention.weighted(attn, grad, **values, importance=lambda value, grad: value)


@pytest.mark.parametrize("broken", ["attn", "grad"])
def test_nan_is_reported_with_its_layer(broken):
    given_maps = dict(zip(("attn", "grad"), random_maps(21, dtype=np.float32)[:2], strict=True))
    given_maps[broken][1, 0, 0, 2, 2] = np.nan
    expected = rf"{broken}: NaN or infinity in layer 1 of 3"
    with pytest.raises(ValueError, match=expected):
        attention.check_finite(**given_maps)
    with pytest.raises(ValueError, match=rf"equal: {expected}"):
        attention.equal(**given_maps)
    attention.check_finite(**given_maps, layers=[-1])
    attention.equal(**given_maps, layers=[-1])
    # Under jit it cannot be reported, and must not be hidden.
    assert np.isnan(jax.jit(attention.equal)(**given_maps)).any()


def test_nan_in_the_values_is_reported_with_its_layer():
    attn, grad, values = random_maps(22, dtype=np.float32)
    values["after"][2, 1, 0, 0] = np.inf
    with pytest.raises(ValueError, match="weighted: after: NaN or infinity in layer 2 of 3"):
        attention.weighted(attn, grad, **values)


def test_constant_maps_are_checked_while_another_function_is_traced():
    attn, grad, _ = random_maps(23, dtype=np.float32)
    scaled = jax.jit(lambda scale: scale * attention.equal(attn, grad))(2.0)
    np.testing.assert_allclose(scaled, 2 * attention.equal(attn, grad), rtol=1e-6)  # fusion
    attn[0] = np.nan
    with pytest.raises(ValueError, match="attn: NaN or infinity in layer 0 of 3"):
        jax.jit(lambda scale: scale * attention.equal(attn, grad))(2.0)
