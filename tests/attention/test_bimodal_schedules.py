"""Accumulation over two streams: any schedule, co-attention and encoder-decoder."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from jaxrel import attention
from jaxrel.attention import Layers, bimodal_accumulation
from tests.attention.golden import detr_layers, load, lxmert_layers
from tests.attention.naive import abar, by_loop, float32, random_layers

# ---- the reference's numbers


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
def test_bimodal_matches_the_reference(prefix, lrp, normalise):
    lxmert = load("bimodal")
    layers = lxmert_layers(prefix, attn="cam" if lrp else "attn")
    name = ("ours_with_lrp" if lrp else "ours_no_lrp") + ("" if normalise else "_no_norm")
    maps = attention.bimodal(*layers, normalise=normalise, target_token=0)
    assert_maps(maps, lxmert, f"{prefix}out/{name}")


@pytest.mark.parametrize("prefix", ["", "syn/"])
def test_bimodal_baselines_match_the_reference(prefix):
    lxmert = load("bimodal")
    s, q, cross = lxmert_layers(prefix)
    _, _, lrp = lxmert_layers(prefix, attn="cam")
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
def test_transformer_attribution_matches_the_reference(prefix):
    lxmert = load("bimodal")
    s, q, cross = lxmert_layers(prefix, attn="cam")
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


def test_last_layer_of_the_other_stream_is_not_used():
    s, q, cross = lxmert_layers("syn/")
    shorter = cross._replace(
        q_cross=jax.tree.map(lambda x: x[:-1], cross.q_cross),
        q_self=jax.tree.map(lambda x: x[:-1], cross.q_self),
    )
    for one, other in zip(
        attention.bimodal(s, q, cross), attention.bimodal(s, q, shorter), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_row_without_positive_gradient_stays_zero_where_the_reference_has_nan():
    lxmert = load("bimodal")
    grads = {
        f"lang_self/{i}": lxmert[f"edge/maps/lang_self/{i}/grad"]
        for i in range(int(lxmert["config/lang_layers"]))
    }
    layers = lxmert_layers(cross_layers=1, grads=grads)
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
            relevance = relevance + abar(layers, i, 0) @ relevance
        moved.append(relevance - np.eye(len(relevance)))
    assert not moved[0][1].any()
    totals = [x.sum(-1, keepdims=True) for x in moved]
    totals[0][1] = 1
    rbar = [x / total + np.eye(len(x)) for x, total in zip(moved, totals, strict=True)]
    expected = rbar[0].T @ abar(cross.s_cross, 0, 0) @ rbar[1]
    expected = expected + abar(cross.s_self, 0, 0) @ expected
    # float32 sums
    np.testing.assert_allclose(maps.sq[0], expected, rtol=1e-5, atol=1e-6 * expected.max())


DETR_NAMES = {"ss": "R_q_q", "sq": "R_q_i", "qq": "R_i_i"}


CASES = [("", 0), ("", 2), ("", 4), ("syn/", 1)]


@pytest.mark.parametrize(("prefix", "target"), CASES)
@pytest.mark.parametrize("name", ["ours_no_lrp", "ours_no_lrp_no_norm", "ours_with_lrp"])
def test_encoder_decoder_matches_the_reference(prefix, target, name):
    detr = load("encdec")
    folder = "" if prefix else f"target/{target}/"
    layers = detr_layers(prefix, folder, "cam" if "with_lrp" in name else "attn")
    maps = attention.encoder_decoder(*layers, normalise="no_norm" not in name)
    assert_maps(maps, detr, f"{prefix}{folder}out/{name}", DETR_NAMES)
    aggregated = detr[f"{prefix}{folder}out/{name}/aggregated"]
    np.testing.assert_allclose(
        attention.row(maps.sq, target)[0], aggregated, rtol=1e-5, atol=1e-6 * aggregated.max()
    )
    assert not maps.qs.any()


@pytest.mark.parametrize(("prefix", "target"), CASES)
def test_encoder_decoder_baselines_match_the_reference(prefix, target):
    detr = load("encdec")
    folder = "" if prefix else f"target/{target}/"
    encoder, decoder, cross = detr_layers(prefix, folder)
    _, _, lrp = detr_layers(prefix, folder, "cam")
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


def test_row_without_positive_gradient_keeps_the_layer_that_the_reference_drops():
    detr = load("encdec")
    grads = {"dec_self/0": detr["edge/maps/dec_self/0/grad"]}
    encoder, decoder, cross = detr_layers("syn/", grads=grads)
    plain = attention.encoder_decoder(encoder, decoder, cross, normalise=False)
    assert_maps(plain, detr, "edge/out/ours_no_lrp_no_norm", DETR_NAMES)
    maps = attention.encoder_decoder(encoder, decoder, cross)
    assert_maps(maps, detr, "edge/out/ours_no_lrp", {"ss": "R_q_q", "qq": "R_i_i"})
    # The reference sets an addition with a NaN to 0: as if layer 0 had no cross-attention.
    without = cross._replace(grad=np.concatenate([0 * cross.grad[:1], cross.grad[1:]]))
    dropped = attention.encoder_decoder(encoder, decoder, without)
    assert_maps(dropped, detr, "edge/out/ours_no_lrp", DETR_NAMES)
    assert np.abs(maps.sq - dropped.sq).max() > 0.1 * np.abs(maps.sq).max()


# ---- against the loop


def random_schedule(seed=0, s=3, q=4, layers=3, reads=True):
    """CLIPmapper's: two towers, then the mapper, whose last layer lacks the image's part."""
    rng = np.random.default_rng(seed)

    def kind(count, pair):
        sizes = {"s": s, "q": q}
        return random_layers(rng, count, sizes[pair[0]], sizes[pair[1]])

    read = {"qs": kind(layers - 1, "qs")} if reads else {}
    return [
        [{"qq": kind(2, "qq")}],
        [{"ss": kind(1, "ss")}],
        [
            {"ss": kind(layers, "ss"), "qq": kind(layers, "qq")},
            {"sq": kind(layers, "sq"), **read},
            {"ss": kind(layers, "ss"), "qq": kind(layers - 1, "qq")},
        ],
    ]


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize(
    ("importance", "residual", "reads"),
    [
        (None, True, True),
        (None, False, False),
        ("grad_value", True, True),
        ("grad_value", False, True),
    ],
)
def test_schedule_is_the_loop(importance, residual, reads):
    schedule = random_schedule(reads=reads)
    maps = bimodal_accumulation(schedule, importance=importance, residual=residual)
    for b in range(2):
        for pair, expected in by_loop(schedule, b, importance, residual).items():
            # float64: sums in another order, and R - kept cancels in the loop.
            np.testing.assert_allclose(getattr(maps, pair)[b], expected, rtol=1e-9, atol=1e-9)


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


def co_attention_schedule(s, q, cross):
    short = [jax.tree.map(lambda x: x[:-1], layers) for layers in (cross.q_cross, cross.q_self)]
    stages = [{"sq": cross.s_cross, "qs": short[0]}, {"ss": cross.s_self, "qq": short[1]}]
    # A block without stages has no layers.
    return [[{"ss": s}], [], [{"qq": q}], stages]


def encoder_decoder_schedule(encoder, decoder, cross):
    return [[{"qq": encoder}], [{"ss": decoder}, {"sq": cross}]]


MODELS = {
    "bimodal": (attention.bimodal, co_attention_schedule),
    "encoder_decoder": (attention.encoder_decoder, encoder_decoder_schedule),
}


@pytest.fixture(params=MODELS)
def model(request):
    return request.param


@pytest.mark.usefixtures("x64")
@pytest.mark.parametrize("importance", [None, "grad_value", "norm"])
def test_usual_models_are_the_loop(model, importance):
    function, schedule = MODELS[model]
    layers = random_models()[model]
    maps = function(*layers, importance=importance)
    blocks = [block for block in schedule(*layers) if block]
    for b in range(2):
        for pair, expected in by_loop(blocks, b, importance).items():
            # float64: sums in another order, and R - kept cancels in the loop.
            np.testing.assert_allclose(getattr(maps, pair)[b], expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("importance", [None, "norm"])
def test_usual_models_are_schedules(model, importance):
    function, schedule = MODELS[model]
    layers = random_models(1, dtype=np.float32)[model]
    maps = bimodal_accumulation(schedule(*layers), importance=importance)
    for found, expected in zip(maps, function(*layers, importance=importance), strict=True):
        # The same sums in another program: they may be fused, and so rounded, differently.
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.usefixtures("x64")
def test_equal_importance_is_equal_accumulation():
    schedule = random_schedule(2)
    same = bimodal_accumulation(schedule, importance=lambda value, grad: jnp.ones(value.shape[:-1]))
    for weighted, equal in zip(same, bimodal_accumulation(schedule), strict=True):
        # The weights are exactly 1; only fusion of float64 sums may differ.
        np.testing.assert_allclose(weighted, equal, rtol=1e-12, atol=1e-12)


def even(layers):
    """The same layers with equally important branches."""
    return layers._replace(after=layers.before)


def test_equal_importance_is_equal_accumulation_in_usual_models(model):
    function, _ = MODELS[model]
    layers = random_models(1, dtype=np.float32)[model]
    is_layers = {"is_leaf": lambda x: isinstance(x, attention.Layers)}
    same = jax.tree.map(even, layers, **is_layers)
    for one, other in zip(function(*same, importance="norm"), function(*layers), strict=True):
        # The weights are exactly 1; only fusion of float32 sums may differ.
        np.testing.assert_allclose(one, other, rtol=1e-6, atol=1e-6)


def test_jit_batch_and_dtype(model):
    function, _ = MODELS[model]
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


def error(match):
    return pytest.raises(ValueError, match=match)


def refused(match):
    return error(f"^bimodal_accumulation: {match}")


def test_schedules_that_do_not_fit():
    schedule = float32(random_schedule(3))
    towers, mapper = schedule[:2], schedule[2]
    ss, sq, qq = mapper[0]["ss"], mapper[1]["sq"], mapper[0]["qq"]
    for stage, got in (({"st": ss}, "st"), ({"ss": ss, "sq": sq}, "ss, sq"), ({}, "none")):
        with refused(rf"a stage maps pairs .* the pairs are ss, sq, qq, qs; got {got}$"):
            bimodal_accumulation([*towers, [stage]])
    with refused(r"no stream attends to the other; use equal or weighted"):
        bimodal_accumulation(towers)
    with refused(r"sq: expected maps \[layers, batch, .* got \(2, 2, 3, 4\)"):
        bimodal_accumulation([[{"sq": Layers(sq.attn[0], sq.grad[0])}]])
    with refused(r"ss: expected maps \(3 or 2, 2, heads, 3, 3\) to fit .* \(3, 2, 2, 4, 4\)"):
        bimodal_accumulation([[{"ss": qq}, {"sq": sq}]])
    with refused(r"ss: expected maps \(3 or 2, 2, heads, 3, 3\) to fit .* \(1, 2, 2, 3, 3\)"):
        bimodal_accumulation([[{"ss": jax.tree.map(lambda x: x[:1], ss)}, {"sq": sq}]])
    with refused(r"ss: weighted accumulation needs before, after, value_grad; give"):
        bimodal_accumulation([[{"ss": Layers(ss.attn, ss.grad)}, {"sq": sq}]], importance="norm")
    with error(r"importance: 'size' is unknown; expected one of"):
        bimodal_accumulation(schedule, importance="size")
    broken = sq.grad.copy()
    broken[1, 0, 0, 0, 0] = np.nan
    with refused(r"sq: grad: NaN or infinity in layer 1 of 3"):
        bimodal_accumulation([[{"ss": ss}, {"sq": sq._replace(grad=broken)}]])
