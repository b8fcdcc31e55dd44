"""Faithfulness against plain loops in float64, and of functions whose answer is known."""

import jax
import numpy as np
import pytest
from jax import numpy as jnp

from jaxrel.metrics import randomisation
from jaxrel.metrics.faithfulness import area, deletion, infidelity, insertion, max_sensitivity

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(3, 4, 6, 2))
WEIGHT = RNG.normal(size=(4, 6, 2))


def linear(x):
    return (x * WEIGHT).sum((1, 2, 3))


def curved(x):
    return jnp.tanh((x * WEIGHT).sum((1, 2, 3)) / 3) + (x**2).mean((1, 2, 3))


@pytest.mark.parametrize("cells", [(4, 6), (2, 3)])
@pytest.mark.parametrize("inserted", [False, True])
def test_curves_by_loops(x64, cells, inserted):
    relevance = RNG.normal(size=(3, *cells))
    relevance[1, 0] = relevance[1, 1]  # of equal cells the first goes first
    baseline, steps = np.array([0.5, -1.0]), 5
    curve = (insertion if inserted else deletion)(curved, IMAGES, relevance, baseline, steps=steps)
    size = (4 // cells[0], 6 // cells[1])
    for b in range(3):
        order = sorted(np.ndindex(cells), key=lambda at: (-relevance[b][at], at))
        for step in range(steps + 1):
            gone = order[: round(step * len(order) / steps)]
            image = IMAGES[b].copy()
            for at in np.ndindex(4, 6):
                if ((at[0] // size[0], at[1] // size[1]) in gone) != inserted:
                    image[at] = baseline
            # float64 sums of some tens of numbers, in another order
            np.testing.assert_allclose(curve[step, b], curved(image[None])[0], rtol=1e-12)


def test_a_map_that_is_right_falls_faster(x64):
    right = (IMAGES * WEIGHT).sum(-1)
    areas = [area(deletion(linear, IMAGES, one)) for one in (right, -right)]
    assert (areas[0] < areas[1]).all()
    areas = [area(insertion(linear, IMAGES, one)) for one in (right, -right)]
    assert (areas[0] > areas[1]).all()
    # 0, 1, 4 at 0, 1/2, 1: 1/4 + 5/4.
    np.testing.assert_allclose(area(jnp.array([[0.0], [1.0], [4.0]])), [1.5])


def test_curves_under_jit(x64):
    relevance = RNG.normal(size=(3, 4, 6))
    plain = deletion(curved, IMAGES, relevance)
    np.testing.assert_allclose(
        jax.jit(lambda x, r: deletion(curved, x, r))(IMAGES, relevance), plain, rtol=1e-12
    )


def test_infidelity_by_loops(x64):
    relevance, key = RNG.normal(size=IMAGES.shape), jax.random.key(1)
    found = infidelity(curved, IMAGES, relevance, key, perturb=0.3, samples=7)
    scaled = infidelity(curved, IMAGES, relevance, key, perturb=0.3, samples=7, normalise=True)
    changes = [0.3 * jax.random.normal(k, IMAGES.shape) for k in jax.random.split(key, 7)]
    for b in range(3):
        predicted = [float((np.asarray(change[b]) * relevance[b]).sum()) for change in changes]
        fell = [
            float(curved(IMAGES[b : b + 1])[0] - curved(IMAGES[b : b + 1] - change[b])[0])
            for change in changes
        ]
        pairs = list(zip(predicted, fell, strict=True))
        # float64 differences of scores of order 1.
        np.testing.assert_allclose(found[b], np.mean([(p - f) ** 2 for p, f in pairs]), rtol=1e-10)
        factor = sum(p * f for p, f in pairs) / sum(p * p for p in predicted)
        want = np.mean([(factor * p - f) ** 2 for p, f in pairs])
        np.testing.assert_allclose(scaled[b], want, rtol=1e-10)


def test_the_gradient_of_a_linear_function_is_faithful_and_steady(x64):
    gradient = np.broadcast_to(WEIGHT, IMAGES.shape)
    key = jax.random.key(0)
    # Rounding of float64 sums of order 10, squared.
    assert infidelity(linear, IMAGES, gradient, key).max() < 1e-24
    assert infidelity(linear, IMAGES, 2 * gradient, key).min() > 0.1
    assert infidelity(linear, IMAGES, 2 * gradient, key, normalise=True).max() < 1e-24
    squares = infidelity(linear, IMAGES, gradient, key, perturb=lambda key, x: x)
    assert squares.max() < 1e-24
    steady = max_sensitivity(lambda x: jnp.broadcast_to(WEIGHT, x.shape), IMAGES, key)
    assert (steady == 0).all()


def test_sensitivity_by_loops(x64):
    explain = lambda x: jax.vmap(jax.grad(lambda one: curved(one[None])[0]))(x)
    key = jax.random.key(2)
    found = max_sensitivity(explain, IMAGES, key, radius=0.1, samples=4)
    length = lambda x: np.sqrt((np.asarray(x) ** 2).sum())
    for b in range(3):
        one = IMAGES[b : b + 1]
        before, worst = explain(one), 0.0
        for k in jax.random.split(key, 4):
            noise = jax.random.uniform(k, IMAGES.shape, minval=-0.1, maxval=0.1)[b]
            worst = max(worst, length(explain(one + noise) - before))
        np.testing.assert_allclose(found[b], worst / length(before), rtol=1e-10)


def test_entropy_by_hand():
    maps = np.array([[0.0, 0.0, 1.0, 1.0], [3.0, 3.0, 3.0, 3.0], [0.0, 1.0, 2.0, 3.0]])
    # float32 logarithms
    np.testing.assert_allclose(
        randomisation.entropy(maps, bins=4), [np.log(2), 0, np.log(4)], rtol=1e-6
    )
    rise = randomisation.complexity_rise(maps[[0, 1]], maps[[2, 1]], bins=4)
    np.testing.assert_allclose(rise, [1, 0], rtol=1e-6)
    with pytest.raises(ValueError, match=r"complexity_rise: maps of \[3, 4\] and \[2, 4\]; give"):
        randomisation.complexity_rise(maps, maps[:2])


def test_smoothed_maps_by_loops(x64):
    explain = lambda x: x**3
    key = jax.random.key(0)
    found = randomisation.smoothed(explain, key, noise=0.2, samples=3)(jnp.asarray(IMAGES))
    spread = IMAGES.max((1, 2, 3)) - IMAGES.min((1, 2, 3))
    parts = [
        (IMAGES + 0.2 * spread[:, None, None, None] * jax.random.normal(k, IMAGES.shape)) ** 3
        for k in jax.random.split(key, 3)
    ]
    np.testing.assert_allclose(found, sum(parts) / 3, rtol=1e-10)


NAN = np.full((3, 4, 6), np.nan)
ERRORS = {
    "cells": (
        lambda: deletion(linear, IMAGES, np.ones((3, 3, 6))),
        r"deletion: maps \(3, 3, 6\) do not divide images \(3, 4, 6, 2\); give one map per image",
    ),
    "steps": (
        lambda: insertion(linear, IMAGES, np.ones((3, 4, 6)), steps=0),
        "insertion: steps must be at least 1, got 0",
    ),
    "NaN": (
        lambda: deletion(linear, IMAGES, NAN),
        "deletion: relevance is not finite; look for NaN",
    ),
    "scores": (
        lambda: deletion(lambda x: x, IMAGES, np.ones((3, 4, 6))),
        r"expected one score per example, \(3,\), .* got \(3, 4, 6, 2\); choose one, as in lambda",
    ),
    "shape": (
        lambda: infidelity(linear, IMAGES, np.ones((3, 4, 6)), jax.random.key(0)),
        r"relevance \(3, 4, 6\) of inputs \(3, 4, 6, 2\); give relevance of every feature",
    ),
    "samples": (
        lambda: max_sensitivity(linear, IMAGES, jax.random.key(0), samples=0),
        "max_sensitivity: samples must be at least 1, got 0",
    ),
    "smooth": (
        lambda: randomisation.smoothed(linear, jax.random.key(0), samples=0),
        "smoothed: samples must be at least 1, got 0",
    ),
}


@pytest.mark.parametrize(("run", "text"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(run, text):
    with pytest.raises(ValueError, match=text):
        run()
