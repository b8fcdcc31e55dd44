"""The roofline, by hand."""

import pytest

from tests.benchmarks import cost_model
from tests.benchmarks.cost_model import MEASURED, Cost, Machine

MACHINE = Machine("two chips", 2, flops=100.0, bandwidth=10.0)


def test_the_longer_of_operations_and_bytes_counts():
    assert MACHINE.balance == 10
    assert Cost(4, flops=400.0, bytes=20.0).seconds(MACHINE) == 4
    assert Cost(4, flops=400.0, bytes=80.0).seconds(MACHINE) == 8
    assert Cost(4, flops=400.0, bytes=40.0).seconds(MACHINE) == 4


def test_chips_have_a_batch_each():
    assert Cost(4, flops=400.0, bytes=80.0).rate(MACHINE) == 2 * 4 / 8


def test_rates_are_scaled_by_what_was_measured():
    cost = Cost(8, flops=0.0, bytes=2 * MEASURED.bandwidth)
    costs, measured = {"net": {"grad": cost}}, {"net": {"grad": 1.5}}
    (compared,) = cost_model.comparison(costs, measured)
    assert (compared["by bytes, ms"], compared["measured / model"]) == (2000, 0.75)
    (row,) = cost_model.estimates(costs, measured)
    for machine in cost_model.MODELLED:
        rate = machine.chips * 8 * machine.bandwidth / cost.bytes
        assert row[f"{machine.name}: images/s"] == pytest.approx(rate, rel=1e-12)
        assert row[f"{machine.name}: as on the H200"] == pytest.approx(rate / 0.75, rel=1e-12)


def test_flops_are_those_of_the_table_of_the_h200():
    tables = cost_model.page.tables(cost_model.README.read_text(encoding="utf-8"))
    for network, costs in cost_model.read().items():
        rows = {row["method"]: row for row in tables[f"CLIP {network}, {cost_model.DTYPE}"]}
        for method, cost in costs.items():
            # Another version of JAX and of the rules; the table has two digits.
            assert cost.flops / 1e12 == pytest.approx(float(rows[method]["TFLOP"]), rel=2e-3)
            assert cost.batch == int(rows[method]["batch"])
