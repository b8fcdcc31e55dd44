"""The table and the curves of a perturbation test."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from jaxrel.metrics.perturbation import STEPS, summary
from jaxrel.train.evaluate.perturbation import curves, markdown


def straight(*ends):
    """Values of four examples on a straight line from 1 to an end: the AUC is 50 * (1 + end)."""
    lines = [1 + (end - 1) * np.array(STEPS) for end in ends]
    return np.broadcast_to(np.array(lines)[..., None], (2, 9, 4)).copy()


@pytest.fixture(scope="module")
def summarised():
    unsure = straight(0.8, 0.1)
    unsure[0] += np.array([-0.2, 0.2, -0.1, 0.1])
    values = {"equal": straight(0.8, 0.1), "other": straight(0.5, 0.1), "un|sure": unsure}
    return summary(values, measure="accuracy", cost={"equal": "1 forward, 1 backward"})


def test_the_table(summarised):
    found = summarised
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
    for use in (markdown, lambda result: curves(result, "a.png")):
        with pytest.raises(ValueError, match=r"'perturbation/1', .* got protocol 'x/1'"):
            use({"protocol": "x/1"})


def test_curves_draw_both_tests(summarised, tmp_path):
    curves(summarised, tmp_path / "new" / "curves.png")
    image = np.asarray(Image.open(tmp_path / "new" / "curves.png").convert("RGB"))
    left, right = np.split(image[:, : image.shape[1] // 2 * 2], 2, axis=1)
    for half in (left, right):
        # The line of "other" (#0072b2) is seen in both.
        assert (half == (0x00, 0x72, 0xB2)).all(-1).sum() > 100
    assert "matplotlib.pyplot" not in sys.modules


def test_curves_name_the_extra_they_need(summarised, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"matplotlib, which is missing: .*'jaxrel\[report\]'"):
        curves(summarised, tmp_path / "curves.png")
    assert not list(tmp_path.iterdir())
