"""Accumulation over two streams: co-attention and encoder-decoder."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from jaxrel import attention
from jaxrel.attention.schedules import (
    Stream,
    cross_attention,
    normalised,
    own,
    self_attention,
    start,
)
from tests.paths import FIXTURES


def array(rows):
    """One example."""
    return jnp.array([rows], jnp.float32)


def stream(moved, other, kept=(1.0, 1.0)):
    return Stream(kept=array(kept), moved=array(moved), other=array(other))


# ---- the equations, by hand: two tokens in s, three in q


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


# ---- the reference's numbers


def load(name):
    with np.load(FIXTURES / f"attention_{name}.npz", allow_pickle=False) as file:
        return dict(file)


@pytest.fixture(scope="module")
def lxmert():
    return load("bimodal")


@pytest.fixture(scope="module")
def detr():
    return load("encdec")


def stack(data, prefix, modules, attn="attn", grads=None):
    """Layers from the stored maps [heads, query, key], with a batch of one."""
    maps = [data[f"{prefix}maps/{m}/{attn}"] for m in modules]
    grads = [(grads or {}).get(m, data.get(f"{prefix}maps/{m}/grad")) for m in modules]
    return attention.Layers(np.stack(maps)[:, None], np.stack(grads)[:, None])


def lxmert_layers(data, prefix="", attn="attn", cross_layers=None, grads=None):
    """What `bimodal` takes, from the stored maps of an LXMERT; s is the text."""
    count = cross_layers or int(data[f"{prefix}config/cross_layers"])

    def kind(name, layers):
        return stack(data, prefix, [name.format(i) for i in range(layers)], attn, grads)

    return (
        kind("lang_self/{}", int(data[f"{prefix}config/lang_layers"])),
        kind("image_self/{}", int(data[f"{prefix}config/image_layers"])),
        attention.CoAttention(
            s_cross=kind("cross/{}/lang_cross", count),
            s_self=kind("cross/{}/lang_self", count),
            q_cross=kind("cross/{}/image_cross", count),
            q_self=kind("cross/{}/image_self", count),
        ),
    )


NAMES = {"ss": "R_t_t", "sq": "R_t_i", "qq": "R_i_i", "qs": "R_i_t"}


def assert_maps(maps, data, prefix, names=NAMES):
    """Every stored map equals ours."""
    for ours, theirs in names.items():
        expected = data[f"{prefix}/{theirs}"]
        # The reference's numbers are float64 rounded to float32; ours are float32 sums.
        np.testing.assert_allclose(
            getattr(maps, ours)[0], expected, rtol=1e-5, atol=1e-6 * np.abs(expected).max()
        )


@pytest.mark.parametrize("prefix", ["", "syn/"])
@pytest.mark.parametrize("lrp", [False, True])
@pytest.mark.parametrize("normalise", [False, True])
def test_bimodal_matches_the_reference(lxmert, prefix, lrp, normalise):
    layers = lxmert_layers(lxmert, prefix, attn="cam" if lrp else "attn")
    name = ("ours_with_lrp" if lrp else "ours_no_lrp") + ("" if normalise else "_no_norm")
    maps = attention.bimodal(*layers, normalise=normalise, target_token=0)
    assert_maps(maps, lxmert, f"{prefix}out/{name}")


@pytest.mark.parametrize("prefix", ["", "syn/"])
def test_bimodal_baselines_match_the_reference(lxmert, prefix):
    s, q, cross = lxmert_layers(lxmert, prefix)
    _, _, lrp = lxmert_layers(lxmert, prefix, attn="cam")
    maps = {
        "raw_attn": (attention.raw(cross.s_self.attn), attention.raw(cross.s_cross.attn)),
        "attn_gradcam": (
            attention.grad_cam(*cross.s_self[:2]),
            attention.grad_cam(*cross.s_cross[:2]),
        ),
        "partial_lrp": [scaled(attention.raw(x.attn)) for x in (lrp.s_self, lrp.s_cross)],
    }
    text, image = (
        np.concatenate([x.attn, y.attn[:-1]]) for x, y in ((s, cross.s_self), (q, cross.q_self))
    )
    maps["rollout"] = (
        attention.rollout(np.concatenate([s.attn, cross.s_self.attn])),
        attention.cross_rollout(text, cross.s_cross.attn, image),
    )
    for method, (ss, sq) in maps.items():
        ss = ss.at[:, 0, 0].set(0)
        both = attention.Maps(ss=ss, sq=sq, qq=None, qs=None)
        names = {"ss": "R_t_t", "sq": "R_t_i"}
        assert_maps(both, lxmert, f"{prefix}out/{method}", names)


def scaled(x):
    return (x - x.min()) / (x.max() - x.min())


@pytest.mark.parametrize("prefix", ["", "syn/"])
def test_transformer_attribution_matches_the_reference(lxmert, prefix):
    s, q, cross = lxmert_layers(lxmert, prefix, attn="cam")
    text, image = (
        [np.concatenate([a, b]) for a, b in zip(x[:2], y[:2], strict=True)]
        for x, y in ((s, cross.s_self), (q, jax.tree.map(lambda x: x[:-1], cross.q_self)))
    )
    maps = attention.Maps(
        ss=attention.equal(*text).at[:, 0, 0].set(0),
        sq=attention.head_mean(*(x[-1] for x in cross.s_cross[:2])),
        qq=attention.equal(*image),
        qs=None,
    )
    names = {name: NAMES[name] for name in ("ss", "sq", "qq")}
    assert_maps(maps, lxmert, f"{prefix}out/transformer_attr", names)


def test_last_layer_of_the_other_stream_is_not_used(lxmert):
    s, q, cross = lxmert_layers(lxmert, "syn/")
    shorter = cross._replace(
        q_cross=jax.tree.map(lambda x: x[:-1], cross.q_cross),
        q_self=jax.tree.map(lambda x: x[:-1], cross.q_self),
    )
    for one, other in zip(
        attention.bimodal(s, q, cross), attention.bimodal(s, q, shorter), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_row_without_positive_gradient_stays_zero_where_the_reference_has_nan(lxmert):
    grads = {
        f"lang_self/{i}": lxmert[f"edge/maps/lang_self/{i}/grad"]
        for i in range(int(lxmert["config/lang_layers"]))
    }
    layers = lxmert_layers(lxmert, cross_layers=1, grads=grads)
    plain = attention.bimodal(*layers, normalise=False, target_token=0)
    names = {"ss": "R_t_t", "sq": "R_t_i"}
    assert_maps(plain, lxmert, "edge/out/ours_no_lrp_no_norm", names)
    maps = attention.bimodal(*layers, target_token=0)
    assert_maps(maps, lxmert, "edge/out/ours_no_lrp", {"ss": "R_t_t"})
    # The reference divides that row, 0, by its sum, 0, and every entry turns NaN.
    assert np.isnan(lxmert["edge/out/ours_no_lrp/R_t_i"]).all()
    assert np.isfinite(maps.sq).all()
    # Text token 1 got nothing moved: it stays as relevant for itself as it was.
    s, q, cross = layers
    # In float64, as R - I cancels.
    moved = []
    for layers in (s, q):
        relevance = np.eye(layers.attn.shape[-1])
        for i in range(len(layers.attn)):
            relevance = relevance + abar(layers, i, 0).astype(np.float64) @ relevance
        moved.append(relevance - np.eye(len(relevance)))
    assert not moved[0][1].any()
    totals = [x.sum(-1, keepdims=True) for x in moved]
    totals[0][1] = 1
    rbar = [x / total + np.eye(len(x)) for x, total in zip(moved, totals, strict=True)]
    expected = rbar[0].T @ abar(cross.s_cross, 0, 0) @ rbar[1]
    expected = expected + abar(cross.s_self, 0, 0) @ expected
    # float32 sums
    np.testing.assert_allclose(maps.sq[0], expected, rtol=1e-5, atol=1e-6 * expected.max())


def detr_layers(data, prefix="", target="", attn="attn", grads=None):
    """What `encoder_decoder` takes, from the stored maps of a DETR."""
    maps = dict(data)
    # attn does not depend on the target, the gradients and the LRP relevance do.
    for name in data:
        if target and name.startswith(f"{target}maps/"):
            maps[name.removeprefix(target)] = data[name]

    def kind(name, count):
        modules = [f"{name}/{i}" for i in range(int(data[f"{prefix}config/{count}"]))]
        return stack(maps, prefix, modules, attn, grads)

    return (
        kind("enc_self", "enc_layers"),
        kind("dec_self", "dec_layers"),
        kind("dec_cross", "dec_layers"),
    )


DETR_NAMES = {"ss": "R_q_q", "sq": "R_q_i", "qq": "R_i_i"}
CASES = [("", 0), ("", 2), ("", 4), ("syn/", 1)]


@pytest.mark.parametrize(("prefix", "target"), CASES)
@pytest.mark.parametrize("name", ["ours_no_lrp", "ours_no_lrp_no_norm", "ours_with_lrp"])
def test_encoder_decoder_matches_the_reference(detr, prefix, target, name):
    folder = "" if prefix else f"target/{target}/"
    layers = detr_layers(detr, prefix, folder, "cam" if "with_lrp" in name else "attn")
    maps = attention.encoder_decoder(*layers, normalise="no_norm" not in name)
    assert_maps(maps, detr, f"{prefix}{folder}out/{name}", DETR_NAMES)
    aggregated = detr[f"{prefix}{folder}out/{name}/aggregated"]
    np.testing.assert_allclose(
        attention.row(maps.sq, target)[0], aggregated, rtol=1e-5, atol=1e-6 * aggregated.max()
    )
    assert not maps.qs.any()


@pytest.mark.parametrize(("prefix", "target"), CASES)
def test_encoder_decoder_baselines_match_the_reference(detr, prefix, target):
    folder = "" if prefix else f"target/{target}/"
    encoder, decoder, cross = detr_layers(detr, prefix, folder)
    _, _, lrp = detr_layers(detr, prefix, folder, "cam")
    maps = {
        "raw_attn": attention.raw(cross.attn),
        "attn_gradcam": attention.grad_cam(*cross[:2]),
        "rollout": attention.cross_rollout(decoder.attn, cross.attn, encoder.attn),
        "partial_lrp": scaled(attention.raw(lrp.attn)),
        "transformer_att": attention.head_mean(lrp.attn[-1], lrp.grad[-1]),
    }
    for method, sq in maps.items():
        both = attention.Maps(ss=None, sq=sq, qq=None, qs=None)
        assert_maps(both, detr, f"{prefix}{folder}out/{method}", {"sq": "R_q_i"})


def test_row_without_positive_gradient_keeps_the_layer_that_the_reference_drops(detr):
    grads = {"dec_self/0": detr["edge/maps/dec_self/0/grad"]}
    encoder, decoder, cross = detr_layers(detr, "syn/", grads=grads)
    plain = attention.encoder_decoder(encoder, decoder, cross, normalise=False)
    assert_maps(plain, detr, "edge/out/ours_no_lrp_no_norm", DETR_NAMES)
    maps = attention.encoder_decoder(encoder, decoder, cross)
    assert_maps(maps, detr, "edge/out/ours_no_lrp", {"ss": "R_q_q", "qq": "R_i_i"})
    # The reference sets an addition with a NaN to 0: as if layer 0 had no cross-attention.
    without = cross._replace(grad=np.concatenate([0 * cross.grad[:1], cross.grad[1:]]))
    dropped = attention.encoder_decoder(encoder, decoder, without)
    assert_maps(dropped, detr, "edge/out/ours_no_lrp", DETR_NAMES)
    assert np.abs(maps.sq - dropped.sq).max() > 0.1 * np.abs(maps.sq).max()


# ---- weighted, and one meaning in every form


def random_layers(rng, count, query, key, batch=2, heads=2, width=3, dtype=np.float64):
    attn = rng.dirichlet(np.ones(key), (count, batch, heads, query)).astype(dtype)
    values = (rng.normal(size=(count, batch, query, width)).astype(dtype) for _ in range(3))
    return attention.Layers(attn, rng.normal(size=attn.shape).astype(dtype), *values)


def random_models(seed=0, s=3, q=4, **sizes):
    rng = np.random.default_rng(seed)
    co_attention = attention.CoAttention(
        s_cross=random_layers(rng, 3, s, q, **sizes),
        s_self=random_layers(rng, 3, s, s, **sizes),
        q_cross=random_layers(rng, 3, q, s, **sizes),
        q_self=random_layers(rng, 3, q, q, **sizes),
    )
    of_s, of_q = random_layers(rng, 2, s, s, **sizes), random_layers(rng, 1, q, q, **sizes)
    decoder, cross = random_layers(rng, 2, s, s, **sizes), random_layers(rng, 2, s, q, **sizes)
    return {
        "bimodal": (of_s, of_q, co_attention),
        "encoder_decoder": (of_q, decoder, cross),
    }


def weight(layers, i, b, measure):
    before, after, grad = (np.asarray(x[i, b]) for x in layers[2:])
    u, v = (np.asarray(measure(jnp.asarray(x), jnp.asarray(grad))) for x in (before, after))
    nothing = (u + v == 0)[:, None]
    total = np.where(u + v == 0, 1, u + v)
    return [np.where(nothing, 1, (2 * x / total)[:, None]) for x in (u, v)]


def abar(layers, i, b):
    return np.maximum(layers.attn[i, b] * layers.grad[i, b], 0).mean(0)


class ByLoop:
    """The weighted rules written out, for one example; `kept` is what residuals carry."""

    def __init__(self, s, q, b, measure):
        self.r = {"ss": np.eye(s), "qq": np.eye(q), "sq": np.zeros((s, q)), "qs": np.zeros((q, s))}
        self.kept = {"s": np.eye(s), "q": np.eye(q)}
        self.b, self.measure = b, measure

    def rbar(self, x):
        moved = self.r[x + x] - self.kept[x]
        total = moved.sum(-1, keepdims=True)
        return np.divide(moved, total, out=np.zeros_like(moved), where=total > 1e-12) + np.eye(
            len(moved)
        )

    def to_itself(self, x, layers, i):
        other = "q" if x == "s" else "s"
        a = abar(layers, i, self.b)
        self.add(x, layers, i, {x + x: a @ self.r[x + x], x + other: a @ self.r[x + other]})

    def crossed(self, x, layers, i):
        y = "q" if x == "s" else "s"
        a = abar(layers, i, self.b)
        return {x + y: self.rbar(x).T @ a @ self.rbar(y), x + x: a @ self.r[y + x]}

    def add(self, x, layers, i, added):
        alpha, beta = weight(layers, i, self.b, self.measure)
        self.kept[x] = alpha * self.kept[x]
        for name, new in added.items():
            self.r[name] = alpha * self.r[name] + beta * new


def bimodal_by_loop(of_s, of_q, co, b, measure):
    run = ByLoop(of_s.attn.shape[-1], of_q.attn.shape[-1], b, measure)
    for x, layers in (("s", of_s), ("q", of_q)):
        for i in range(len(layers.attn)):
            run.to_itself(x, layers, i)
    for i in range(len(co.s_cross.attn)):
        of_s, of_q = run.crossed("s", co.s_cross, i), run.crossed("q", co.q_cross, i)
        run.add("s", co.s_cross, i, of_s)
        if i < len(co.s_cross.attn) - 1:
            run.add("q", co.q_cross, i, of_q)
            run.to_itself("q", co.q_self, i)
        run.to_itself("s", co.s_self, i)
    return run.r


def encoder_decoder_by_loop(encoder, decoder, cross, b, measure):
    run = ByLoop(decoder.attn.shape[-1], encoder.attn.shape[-1], b, measure)
    for i in range(len(encoder.attn)):
        run.to_itself("q", encoder, i)
    for i in range(len(decoder.attn)):
        run.to_itself("s", decoder, i)
        run.add("s", cross, i, run.crossed("s", cross, i))
    return run.r


DRIVERS = {
    "bimodal": (attention.bimodal, bimodal_by_loop),
    "encoder_decoder": (attention.encoder_decoder, encoder_decoder_by_loop),
}


@pytest.fixture(params=DRIVERS)
def model(request):
    return request.param


@pytest.mark.usefixtures("x64")
def test_weighted_is_the_loop(model):
    function, by_loop = DRIVERS[model]
    layers = random_models()[model]
    maps = function(*layers, importance="grad_value")
    for b in range(2):
        expected = by_loop(*layers, b, attention.measure("grad_value"))
        for key, value in expected.items():
            # float64: sums in another order, and R - kept cancels in the loop.
            np.testing.assert_allclose(getattr(maps, key)[b], value, rtol=1e-10, atol=1e-10)


def even(layers):
    """The same layers with equally important branches."""
    return layers._replace(after=layers.before)


def test_equal_importance_is_equal_accumulation(model):
    function, _ = DRIVERS[model]
    layers = random_models(1, dtype=np.float32)[model]
    is_layers = {"is_leaf": lambda x: isinstance(x, attention.Layers)}
    same = jax.tree.map(even, layers, **is_layers)
    for one, other in zip(function(*same, importance="norm"), function(*layers), strict=True):
        # The weights are exactly 1; only fusion of float32 sums may differ.
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


def test_jit_batch_and_dtype(model):
    function, _ = DRIVERS[model]
    layers = random_models(2, dtype=np.float32)[model]

    def run(*layers):
        return function(*layers, importance="norm")

    together = run(*layers)
    compiled = jax.jit(run)(*layers)
    alone = [run(*jax.tree.map(lambda x, b=b: x[:, b : b + 1], layers)) for b in range(2)]
    for one, two, *rows in zip(together, compiled, *alone, strict=True):
        # Fusion and batching may change the order of float32 sums.
        np.testing.assert_allclose(two, one, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(np.concatenate(rows), one, rtol=1e-5, atol=1e-6)
    half = run(*jax.tree.map(lambda x: jnp.asarray(x, jnp.bfloat16), layers))
    assert {x.dtype for x in half} == {jnp.dtype(jnp.float32)}
    assert all(np.isfinite(x).all() for x in half)


def test_a_stream_without_layers_of_its_own():
    s, q, cross = random_models(3, dtype=np.float32)["bimodal"]
    nothing = jax.tree.map(lambda x: 0 * x, (s, q))
    for one, other in zip(
        attention.bimodal(None, None, cross), attention.bimodal(*nothing, cross), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_target_token_of_each_example():
    layers = random_models(4, dtype=np.float32)["bimodal"]
    plain = attention.bimodal(*layers)
    maps = attention.bimodal(*layers, target_token=np.array([2, 0]))
    np.testing.assert_array_equal(maps.ss, plain.ss.at[0, 2, 2].set(0).at[1, 0, 0].set(0))
    np.testing.assert_array_equal(maps.sq, plain.sq)


# ---- errors


def test_target_token_that_does_not_exist():
    with pytest.raises(
        ValueError, match="target_token: 3 does not exist; there are 3 tokens, 0 to 2"
    ):
        attention.bimodal(*random_models(5, dtype=np.float32)["bimodal"], target_token=3)


def test_layers_that_do_not_fit():
    s, q, cross = random_models(6, dtype=np.float32)["bimodal"]
    expected = r"bimodal: s: expected maps \(layers, 2, heads, 3, 3\) .* got \(1, 2, 2, 4, 4\)"
    with pytest.raises(ValueError, match=expected):
        attention.bimodal(q, s, cross)
    short = cross._replace(q_self=jax.tree.map(lambda x: x[:1], cross.q_self))
    with pytest.raises(ValueError, match=r"cross.q_self: expected maps \(3 or 2, 2, heads, 4, 4\)"):
        attention.bimodal(s, q, short)
    encoder, decoder, between = random_models(6, dtype=np.float32)["encoder_decoder"]
    expected = r"encoder_decoder: decoder: expected maps \(2, .* got \(1, "
    with pytest.raises(ValueError, match=expected):
        attention.encoder_decoder(encoder, jax.tree.map(lambda x: x[:1], decoder), between)
    with pytest.raises(ValueError, match=r"cross: expected maps .* at least one layer, got \(0, "):
        attention.encoder_decoder(encoder, decoder, jax.tree.map(lambda x: x[:0], between))


def test_weighted_without_values():
    s, q, cross = random_models(7, dtype=np.float32)["bimodal"]
    with pytest.raises(ValueError, match="bimodal: s: weighted accumulation needs after; give it"):
        attention.bimodal(s._replace(after=None), q, cross, importance="norm")


def test_nan_is_reported_with_its_layer():
    encoder, decoder, cross = random_models(8, dtype=np.float32)["encoder_decoder"]
    cross.grad[1, 0, 0, 0, 0] = np.nan
    with pytest.raises(ValueError, match=r"encoder_decoder: cross: grad: NaN .* layer 1 of 2"):
        attention.encoder_decoder(encoder, decoder, cross)


def test_cross_rollout_of_streams_that_do_not_fit():
    encoder, decoder, cross = random_models(9, dtype=np.float32)["encoder_decoder"]
    with pytest.raises(ValueError, match=r"with s queries and q keys in cross, got s_self \(1, "):
        attention.cross_rollout(encoder.attn, cross.attn, decoder.attn)
