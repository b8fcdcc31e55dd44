"""The table of a perturbation test."""

import json

import numpy as np
import pytest

from jaxrel.metrics.perturbation import STEPS, summary
from jaxrel.train.evaluate.perturbation import markdown


def straight(*ends):
    """Values of four examples on a straight line from 1 to an end: the AUC is 50 * (1 + end)."""
    lines = [1 + (end - 1) * np.array(STEPS) for end in ends]
    return np.broadcast_to(np.array(lines)[..., None], (2, 9, 4)).copy()


def test_the_table():
    unsure = straight(0.8, 0.1)
    unsure[0] += np.array([-0.2, 0.2, -0.1, 0.1])
    values = {"equal": straight(0.8, 0.1), "other": straight(0.5, 0.1), "un|sure": unsure}
    found = summary(values, measure="accuracy", cost={"equal": "1 forward, 1 backward"})
    low, high = (found["methods"]["un|sure"]["negative"]["auc"][end] for end in ("low", "high"))
    assert markdown(json.loads(json.dumps(found))) == (
        "### Perturbation test\n"
        "\n"
        "Perturbation test (`perturbation/1`), accuracy, 4 examples, bootstrap 95% intervals; "
        "bold: the interval of the difference excludes 0.\n"
        "\n"
        "| method | negative AUC (higher is better) | difference to equal "
        "| positive AUC (lower is better) | difference to equal | cost |\n"
        "| --- | --- | --- | --- | --- | --- |\n"
        "| equal | 90.00 [90.0, 90.0] |  | 55.00 [55.0, 55.0] |  | 1 forward, 1 backward |\n"
        "| other | 75.00 [75.0, 75.0] | **-15.00 [-15.00, -15.00]** "
        "| 55.00 [55.0, 55.0] | +0.00 [+0.00, +0.00] |  |\n"
        f"| un\\|sure | 90.00 [{low:.1f}, {high:.1f}] | +0.00 [{low - 90:+.2f}, {high - 90:+.2f}] "
        "| 55.00 [55.0, 55.0] | +0.00 [+0.00, +0.00] |  |\n"
    )
    assert low < 85
    assert high > 95


def test_the_table_without_a_baseline():
    alone = markdown(summary({"random": straight(0.5, 0.5)}, measure="score", baseline=None))
    assert "| random | 75.00 [75.0, 75.0] | 75.00 [75.0, 75.0] |\n" in alone
    assert "difference" not in alone


def test_a_result_of_another_protocol():
    with pytest.raises(ValueError, match=r"'perturbation/1', .* got protocol 'x/1'"):
        markdown({"protocol": "x/1"})
