"""Metrics on examples small enough to work out by hand."""

import numpy as np
import pytest

from jaxrel import metrics

MASK = np.zeros((1, 4, 4), bool)
MASK[0, :2, :3] = True  # all of the cell at the top left, half of the one beside it


def test_share_inside_by_hand():
    relevance = np.array([[[2.0, 1.0], [-5.0, 1.0]]])
    # (2 * 1 + 1 * 1/2) of 4: negative relevance does not count.
    np.testing.assert_allclose(metrics.relevance_mass_accuracy(relevance, MASK), [2.5 / 4])


def test_an_even_map_has_the_share_of_chance():
    shares = metrics.relevance_mass_accuracy(np.ones((1, 2, 2)), MASK)
    np.testing.assert_allclose(shares, metrics.chance(MASK))


def test_a_map_without_positive_relevance_has_no_share():
    assert metrics.relevance_mass_accuracy(np.zeros((1, 2, 2)), MASK) == 0


def test_pointing_game():
    left, right = np.zeros((2, 1, 2, 2), np.float32)
    left[0, 0, 0], right[0, 1, 1] = 1, 1
    assert metrics.pointing_game(left, MASK).tolist() == [True]
    assert metrics.pointing_game(right, MASK).tolist() == [False]


def test_bootstrap_interval_has_the_width_of_the_standard_error():
    values = np.random.default_rng(0).normal(3, 1, 400)
    mean, low, high = metrics.bootstrap(values)
    assert mean == values.mean()
    # 2 * 1.96 standard errors of 1/20; the percentiles of 2000 resamples move by a few percent.
    np.testing.assert_allclose(high - low, 2 * 1.96 / 20, rtol=0.1)
    assert metrics.bootstrap(values) == metrics.bootstrap(values)
    assert metrics.bootstrap(values) != metrics.bootstrap(values, seed=1)
    assert str(metrics.Interval(0.5, 0.25, 0.75)) == "0.500 [0.250, 0.750]"


ERRORS = {
    "numbers": (
        lambda: metrics.relevance_mass_accuracy(np.ones((2, 2, 2)), MASK),
        "2 maps and 1 masks",
    ),
    "cells": (
        lambda: metrics.relevance_mass_accuracy(np.ones((1, 3, 3)), MASK),
        "3 x 3 cells do not divide",
    ),
    "no values": (
        lambda: metrics.bootstrap(np.zeros(0)),
        "expected one value per example, got none",
    ),
    "NaN": (lambda: metrics.bootstrap(np.array([np.nan])), "of 1 values some are not finite"),
}


@pytest.mark.parametrize(("call", "text"), ERRORS.values(), ids=ERRORS.keys())
def test_errors(call, text):
    with pytest.raises(ValueError, match=text):
        call()
