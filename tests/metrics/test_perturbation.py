"""The perturbation test against naive references and a model whose truth is known."""

import functools
import json

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import numpy as jnp
from scipy import stats

from jaxrel.metrics import bootstrap, bootstrap_many, perturbation, randomisation
from jaxrel.metrics.perturbation import (
    PROTOCOL,
    STEPS,
    auc,
    keep_masks,
    random_relevance,
    summary,
    sweep,
    sweep_indices,
)
from jaxrel.metrics.randomisation import agreement, cascade, rank_correlation
from jaxrel.report.plots import lines


def naive_keep(relevance, removable, positive, steps):
    """The protocol's words, token by token."""
    steps_kept = []
    for p in steps:
        rows = []
        for scores, free in zip(relevance.tolist(), removable.tolist(), strict=True):
            tokens = [i for i in range(len(scores)) if free[i]]
            # Python's sort is stable too: of equal scores the lower index comes first.
            best = sorted(tokens, key=lambda i: scores[i] if positive else -scores[i])
            kept = best[: int((1 - p) * len(tokens))]
            rows.append([not free[i] or i in kept for i in range(len(scores))])
        steps_kept.append(rows)
    return np.array(steps_kept)


# Few shapes, since each compiles; few values, so that there are ties, with zeros of both signs.
@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([(1, 1), (2, 5), (3, 12)]),
    st.integers(0, 2**31),
    st.sampled_from([[-1.0, -0.0, 0.0, 2.0], np.linspace(-1, 1, 1000)]),
)
def test_keep_masks_are_the_naive_ones(shape, seed, values):
    rng = np.random.default_rng(seed)
    relevance = rng.choice(values, shape).astype(np.float32)
    removable = rng.random(shape) < 0.7
    for positive in (False, True):
        found = keep_masks(relevance, removable, positive=positive)
        assert found.tolist() == naive_keep(relevance, removable, positive, STEPS).tolist()


def test_the_counts_are_pythons():
    # Every length up to 600 at once: where (1 - p) * n ends just below a whole number, too.
    removable = np.tri(600, dtype=bool)
    run = jax.jit(functools.partial(keep_masks, positive=False))
    keep = run(np.ones((600, 600), np.float32), removable)
    kept = np.asarray((keep & removable).sum(-1))
    assert kept.tolist() == [[int((1 - p) * n) for n in range(1, 601)] for p in STEPS]
    assert kept[4, 4] == 0  # int((1 - 0.8) * 5)


def test_ties_go_from_the_back_in_both_tests():
    relevance, removable = np.zeros((1, 5), np.float32), np.array([[False, True, True, True, True]])
    for positive in (False, True):
        keep = keep_masks(relevance, removable, positive=positive, steps=(0, 0.5, 1))
        assert keep[:, 0].astype(int).tolist() == [[1] * 5, [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]]


WEIGHTS = np.random.default_rng(0).exponential(size=(16, 21)).astype(np.float32)
REMOVABLE = np.ones((16, 21), bool)
REMOVABLE[:, 0] = False  # a class token
REMOVABLE[8:, 15:] = False  # and shorter texts


def weight_kept(keep):
    """A model whose score is the sum of what its tokens weigh: its relevance is that weight."""
    return (jnp.where(REMOVABLE, WEIGHTS, 0) * keep).sum(-1)


@pytest.fixture(scope="module")
def swept():
    relevance = np.stack(
        [WEIGHTS, random_relevance(jax.random.key(0), WEIGHTS.shape), -WEIGHTS, 0 * WEIGHTS]
    )
    run = lambda relevance: sweep(weight_kept, relevance, REMOVABLE, batch_size=7)
    return relevance, run, np.asarray(run(relevance))


def test_sweep_is_a_loop_over_methods_tests_and_steps(swept):
    relevance, run, values = swept
    assert values.shape == (4, 2, 9, 16)
    for m, one in enumerate(relevance):
        for s, positive in enumerate((False, True)):
            keep = naive_keep(one, REMOVABLE, positive, STEPS)
            # 21 float32 terms, summed in another order.
            np.testing.assert_allclose(values[m, s], [weight_kept(k) for k in keep], rtol=1e-6)
    np.testing.assert_allclose(jax.jit(run)(relevance), values, rtol=1e-6)


def test_leaving_tokens_out_is_hiding_them(swept):
    relevance, *_ = swept
    weights = jnp.asarray(WEIGHTS)

    def of_mask(keep):
        return (weights * keep).sum(-1)

    def of_indices(kept):
        assert kept.dtype == jnp.int32
        return jnp.take_along_axis(weights, kept, axis=-1).sum(-1)

    free = REMOVABLE[0]
    hidden = sweep(of_mask, relevance, np.broadcast_to(free, WEIGHTS.shape))
    run = lambda relevance: sweep_indices(of_indices, relevance, free)
    # 21 float32 terms, summed in another order.
    np.testing.assert_allclose(run(relevance), hidden, rtol=1e-5)
    np.testing.assert_allclose(jax.jit(run)(relevance), hidden, rtol=1e-5)
    broken = jnp.asarray(relevance).at[1, 2, 3].set(jnp.nan)
    values = np.asarray(jax.jit(run)(broken))
    assert np.isnan(values[1, ..., 2]).all()
    assert np.isnan(values).sum() == values[1, ..., 2].size


def test_arrays_are_measured_by_example(swept):
    relevance, steps, free = jnp.asarray(swept[0]), (0, 0.5, 1), REMOVABLE[0]

    def ends(kept):
        return jnp.stack([kept[:, 0], kept[:, -1]], axis=1)

    broken = relevance.at[1, 2, 3].set(jnp.nan)
    found = np.array(jax.jit(lambda x: sweep_indices(ends, x, free, steps=steps))(broken))
    assert np.isnan(found[1, :, :, 2]).all()
    assert np.isnan(found).sum() == found[1, :, :, 2].size
    found = np.delete(found, 2, axis=3)
    everywhere = np.broadcast_to(free, WEIGHTS.shape)
    for m, sign in np.ndindex(found.shape[:2]):
        keep = keep_masks(relevance[m], everywhere, positive=bool(sign), steps=steps)
        kept = [[np.flatnonzero(row) for row in step] for step in np.delete(keep, 2, axis=1)]
        assert found[m, sign].tolist() == [[[k[0], k[-1]] for k in step] for step in kept]


def test_the_true_relevance_is_best_in_both_tests(swept):
    true, random, inverse, _ = auc(swept[2]).transpose(1, 0, 2)[0]
    # Optimal at every step, so for each example; between the others only the mean is sure.
    assert (true > random).all()
    assert (true > inverse).all()
    assert random.mean() > inverse.mean()
    true, random, inverse, _ = auc(swept[2]).transpose(1, 0, 2)[1]
    assert (true < random).all()
    assert (true < inverse).all()
    assert random.mean() < inverse.mean()


def test_auc_by_hand():
    # A class token worth 1 that stays; then 4 and 2. Negative: 7, 5, 1; positive: 7, 3, 1.
    weights = jnp.array([[1.0, 4.0, 2.0]])
    values = sweep(
        lambda keep: (weights * keep).sum(-1),
        weights[None],
        np.array([[False, True, True]]),
        steps=(0, 0.5, 1),
    )
    assert values[0, :, :, 0].tolist() == [[7, 5, 1], [7, 3, 1]]
    # (7 + 5) / 2 * 0.5 + (5 + 1) / 2 * 0.5 = 4.5, and 2.5 + 1 = 3.5.
    assert auc(values, (0, 0.5, 1)).tolist() == [[[450.0], [350.0]]]
    # A measure that is always right has 100, whatever the widths; float32 is exact to 1e-7.
    np.testing.assert_allclose(auc(np.ones((9, 3))), 100, rtol=1e-12)
    np.testing.assert_allclose(jax.jit(auc)(jnp.ones((9, 3))), 100, rtol=1e-6)


def test_nan_relevance_is_found_out_under_jit():
    relevance = WEIGHTS.copy()
    relevance[:, 0] = np.inf  # not removable: not looked at
    relevance[3, 5] = np.nan
    run = jax.jit(lambda relevance: sweep(weight_kept, relevance, REMOVABLE))
    values = np.asarray(run(relevance[None]))[0]
    assert np.isnan(values[:, :, 3]).all()
    assert np.isfinite(np.delete(values, 3, axis=-1)).all()
    with pytest.raises(ValueError, match=r"'a' are not finite for 1 of 16 .* at example 3;"):
        summary({"a": values}, measure="score", baseline=None)


def test_bootstrap_many_is_bootstrap_row_by_row():
    values = np.random.default_rng(1).normal(5, 1, (2, 3, 41))
    found = bootstrap_many(values, seed=3)
    for index in np.ndindex(2, 3):
        # The same resamples, whose values are added in another order.
        np.testing.assert_allclose(found.at(*index), bootstrap(values[index], seed=3), rtol=1e-12)


def test_bootstrap_many_does_not_depend_on_its_chunks(monkeypatch):
    values = np.random.default_rng(1).random((2, 5)) > 0.5
    whole = bootstrap_many(values)
    monkeypatch.setattr("jaxrel.metrics.intervals._DRAWN_AT_ONCE", 16)
    np.testing.assert_allclose(bootstrap_many(values), whole, rtol=1e-12)


def straight(*ends, examples=4):
    """Values on a straight line from 1 to an end, so that the AUC is 50 * (1 + end)."""
    lines = [1 + (end - 1) * np.array(STEPS) for end in ends]
    return np.broadcast_to(np.array(lines)[..., None], (2, 9, examples)).copy()


@pytest.fixture
def summarised():
    unsure = straight(0.8, 0.1)
    unsure[0] += np.array([-0.2, 0.2, -0.1, 0.1])
    values = {"equal": straight(0.8, 0.1), "other": straight(0.5, 0.1), "un|sure": unsure}
    return summary(values, measure="accuracy", cost={"equal": "1 forward, 1 backward"})


def test_summary_by_hand(summarised):
    assert json.loads(json.dumps(summarised)) == summarised
    assert {k: summarised[k] for k in ("protocol", "measure", "examples", "baseline")} == {
        "protocol": PROTOCOL,
        "measure": "accuracy",
        "examples": 4,
        "baseline": "equal",
    }
    other = summarised["methods"]["other"]["negative"]
    np.testing.assert_allclose(other["curve"]["low"], 1 - 0.5 * np.array(STEPS), rtol=1e-12)
    np.testing.assert_allclose(list(other["auc"].values()), 75, rtol=1e-12)
    np.testing.assert_allclose(list(other["difference"].values()), -15, rtol=1e-12)
    assert "difference" not in summarised["methods"]["equal"]["positive"]


def test_differences_are_paired(summarised):
    noise = np.random.default_rng(0).normal(size=200)
    values = {"equal": straight(0.8, 0.1, examples=200) + noise}
    values["other"] = values["equal"] + 0.01
    other = summary(values, measure="score")["methods"]["other"]["negative"]
    assert other["auc"]["high"] - other["auc"]["low"] > 10
    # Always 1 more, however much the examples differ; float64 leaves 1e-13 of values near 100.
    np.testing.assert_allclose(list(other["difference"].values()), 1, rtol=1e-9)


ONES = np.ones((2, 3), np.float32)
FREE = np.ones((2, 3), bool)
NAN = np.where(np.arange(6).reshape(2, 3) == 4, np.nan, ONES)
LINE = straight(0.5, 0.5)


def masks(relevance=ONES, removable=FREE, steps=STEPS):
    return keep_masks(relevance, removable, positive=False, steps=steps)


def table(values, **options):
    return summary(values, measure="accuracy", **options)


def mean(keep):
    return keep.mean()


ERRORS = {
    "NaN": (lambda: masks(NAN), r"not finite in 1 of 2 maps, first at index \(1,\)"),
    "NaN, sweep of indices": (
        lambda: sweep_indices(weight_kept, NAN[None], FREE[0]),
        r"sweep_indices: relevance is not finite in 1 of 2 maps, first at index \(0, 1\)",
    ),
    "measure of indices": (
        lambda: sweep_indices(lambda kept: kept.sum(), ONES[None], FREE[0]),
        r"sweep_indices: measure must return one number or array per example, \[2, ...\], got \(\)",
    ),
    "NaN, sweep": (
        lambda: sweep(weight_kept, NAN[None], FREE),
        r"sweep: relevance is not finite in 1 of 2 maps, first at index \(0, 1\)",
    ),
    "shapes": (lambda: masks(removable=FREE[:, :2]), r"= \[2, 3\] and removable of \[2, 2\]"),
    "dtype": (lambda: masks(removable=FREE.astype(int)), "True where a token may go, got int64"),
    "unsorted": (lambda: masks(steps=(0.5, 0.25)), r"rise within \[0, 1\], .* got \(0.5, 0.25\)"),
    "twice": (lambda: masks(steps=(0, 0.5, 0.5)), "steps must rise"),
    "outside": (lambda: masks(steps=(0, 50, 100)), r"within \[0, 1\]"),
    "NaN step": (lambda: masks(steps=(np.nan,)), r"within \[0, 1\]"),
    "no steps": (lambda: masks(steps=()), "steps must rise"),
    "measure": (
        lambda: sweep(mean, ONES[None], FREE),
        r"one number per example, \[2\], got \(\)",
    ),
    "auc steps": (lambda: auc(LINE, (0, 1)), "values at 9 steps, but 2 steps"),
    "one step": (lambda: auc(LINE[:, :1], (0,)), "at least two steps"),
    "no methods": (lambda: table({}), "got no methods"),
    "alike": (
        lambda: table({"equal": LINE, "raw": LINE[..., :2]}),
        r"alike for all methods, got \{'equal': \[2, 9, 4\], 'raw': \[2, 9, 2\]\}",
    ),
    "no examples": (lambda: table({"equal": LINE[..., :0]}), "got none"),
    "baseline": (
        lambda: table({"raw": LINE, "rollout": LINE}),
        "baseline 'equal' is not among the methods raw, rollout",
    ),
    "cost": (lambda: table({"equal": LINE}, cost={"raw": "?"}), "cost 'raw' is not among"),
    "suffix": (lambda: lines({}, [], "a.pdf", x="", y=""), "ends in .png"),
    "bootstrap_many": (lambda: bootstrap_many(NAN), "of 6 values some are not finite"),
    "ranks": (lambda: rank_correlation(ONES, NAN), "1 of 2 pairs of maps .* at example 1"),
    "ranks, shapes": (
        lambda: rank_correlation(ONES, ONES[:1]),
        r"maps of \[2, 3\] and \[1, 3\]; give",
    ),
    "methods": (
        lambda: agreement({"raw": ONES}, [("head", {"equal": ONES})]),
        "'head' has maps of equal, the original of raw",
    ),
}


@pytest.mark.parametrize(("call", "text"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(call, text):
    with pytest.raises(ValueError, match=text):
        call()


def test_rank_correlation_is_scipys():
    rng = np.random.default_rng(0)
    # Few values in the first half, so that there are ties.
    a, b = rng.normal(size=(2, 8, 30)).astype(np.float32)
    a[:4], b[:4] = np.round(a[:4]), np.round(b[:4])
    expected = [stats.spearmanr(x, y).statistic for x, y in zip(a, b, strict=True)]
    # Sums of 30 squared ranks in float32.
    np.testing.assert_allclose(rank_correlation(a, b), expected, atol=1e-6)
    valid = np.arange(30) < np.arange(10, 26, 2)[:, None]
    expected = [stats.spearmanr(x[v], y[v]).statistic for x, y, v in zip(a, b, valid, strict=True)]
    found = jax.jit(rank_correlation)(a, np.where(valid, b, np.nan), valid=valid)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_rank_correlation_by_hand():
    a = np.array([[1.0, 2, 3], [1, 2, 3], [7, 7, 7], [0.0, -0.0, 1]])
    b = np.array([[10.0, 20, 90], [9, 5, 1], [1, 2, 3], [-0.0, 0.0, 5]])
    # Square roots and a quotient in float32.
    np.testing.assert_allclose(rank_correlation(a, b), [1, -1, 0, 1], atol=1e-6)
    assert np.isnan(jax.jit(rank_correlation)(a, np.where(b == 90, np.nan, b))).tolist() == [
        True,
        *[False] * 3,
    ]


PARAMS = {
    "encoder": {"layers": {"kernel": jnp.arange(24.0).reshape(3, 8), "count": jnp.arange(3)}},
    "head": {"bias": jnp.zeros(4), "kernel": jnp.arange(8.0).reshape(2, 4)},
}
GROUPS = {"head": ["head"], "layer 2": ["encoder/layers[2]"], "layer 1": ["encoder/layers[1]"]}


def test_cascade_adds_up_and_keeps_the_values(key):
    steps = list(cascade(PARAMS, GROUPS, key))
    assert [name for name, _ in steps] == list(GROUPS)
    heads = [params["head"]["kernel"] for _, params in steps]
    layers = [params["encoder"]["layers"]["kernel"] for _, params in steps]
    assert not (heads[0] == PARAMS["head"]["kernel"]).all()
    assert sorted(heads[0].ravel().tolist()) == list(range(8))
    assert (heads[0] == heads[2]).all()
    old = np.asarray(PARAMS["encoder"]["layers"]["kernel"])
    # Layers from the last to the first; each keeps its own values.
    assert [(np.asarray(one) == old).all(1).tolist() for one in layers] == [
        [True, True, True],
        [True, True, False],
        [True, False, False],
    ]
    assert (layers[1][2] == layers[2][2]).all()
    assert (np.sort(layers[2], axis=1) == old).all()
    assert all((p["encoder"]["layers"]["count"] == np.arange(3)).all() for _, p in steps)
    assert jax.tree.all(
        jax.tree.map(np.array_equal, steps[-1][1], list(cascade(PARAMS, GROUPS, key))[-1][1])
    )


def test_cascade_of_a_module_shows_that_its_maps_depend_on_parameters(key):
    model = nnx.Linear(12, 1, rngs=nnx.Rngs(0))
    x = jax.random.normal(key, (6, 12))

    def maps(model):
        return {"relevance": x * model.kernel[:, 0], "input": x}

    randomised = cascade(model, {"all": ["kernel"]}, key)
    found = agreement(maps(model), ((name, maps(one)) for name, one in randomised))
    # What does not look at the parameters cannot change; 1e-6 for the float32 of the ranks.
    assert found["all"]["input"] == pytest.approx((1, 1, 1), abs=1e-6)
    assert found["all"]["relevance"].high < 0.9


@pytest.mark.parametrize(
    ("groups", "text"),
    [
        ({}, "expected paths of parameters by group, got {}"),
        ({"a": []}, "by group, got {'a': \\[\\]}"),
        ({"a": ["haed"]}, "group 'a': no floating parameter at 'haed'; there are encoder, head"),
        ({"a": ["head", "head/gain"]}, "'head/gain'; there are head/bias, head/kernel"),
        ({"a": ["head/bias/value"]}, "'head/bias/value'; there are head/bias, head/kernel"),
        ({"a": ["encoder/layers/count"]}, "'encoder/layers/count'; .* encoder/layers/kernel"),
        ({"a": [""]}, "at ''; there are encoder, head"),
        ({"a": ["encoder[3]"]}, r"'encoder\[3\]' asks for entry 3 .* has shape \[3, 8\]"),
    ],
)
def test_cascade_errors_come_at_once(groups, text, key):
    with pytest.raises(ValueError, match=text):
        cascade(PARAMS, groups, key)


def test_the_modules_are_reached_from_metrics():
    assert perturbation.STEPS == (0, 0.25, 0.5, 0.75, 0.8, 0.85, 0.9, 0.95, 1)
    assert randomisation.cascade is cascade
