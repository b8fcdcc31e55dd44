"""What a device's figures are written as, and how its operations are counted."""

import dataclasses
import json

import jax
import numpy as np
import pytest
from jax import lax
from jax import numpy as jnp

from jaxrel.train.evaluate.flops import flops
from tests.benchmarks import device, device_report, page

ROW = {"dtype": "bfloat16", "batch": 4, "sizes": "2 layers", "device": "Some GPU", "jax": "0.1"}
FIGURES = {
    "environment": {"device": "1 x Some GPU", "jax": "0.1"},
    "tables": [
        {
            "title": "A model",
            "note": "How to read it.",
            "rows": [
                {"method": "grad", **ROW, "ms": 1.25, "rounds": 7, "state": ""},
                {"method": "stacked", **ROW, "state": "failed: a | b\nc"},
            ],
        },
        {"title": "Skipped", "note": "", "rows": [{"method": "all", "state": "skipped"}]},
    ],
}
SUITES = """\
<testsuites><testsuite name="pytest">
<testcase classname="tests.test_a" name="one" time="1.5" />
<testcase classname="tests.test_a" name="two" time="0.5"><failure>no</failure></testcase>
<testcase classname="tests.test_b" name="three" time="0"><skipped>no</skipped></testcase>
</testsuite></testsuites>
"""


def table_lines(text):
    return [line for line in text.splitlines() if line.startswith("|")]


def test_both_files_say_the_same(tmp_path):
    device_report.write(tmp_path, FIGURES)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["device.json", "device.md"]
    assert json.loads((tmp_path / "device.json").read_text()) == FIGURES
    text = (tmp_path / "device.md").read_text()
    assert "Measured on device 1 x Some GPU; jax 0.1." in text
    assert "2 layers. How to read it." in text
    header, rule, first, second, *_ = table_lines(text)
    assert header == "| method | dtype | batch | ms | rounds | state |"
    assert rule.count("|") == header.count("|")
    assert first == "| grad | bfloat16 | 4 | 1.25 | 7 |  |"
    assert second == r"| stacked | bfloat16 | 4 | - | - | failed: a \| b c |"


def test_figures_that_json_cannot_hold_are_refused(tmp_path):
    table = {"title": "", "note": "", "rows": [{"ms": float("nan")}]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        device_report.write(tmp_path, {"environment": {}, "tables": [table]})
    assert not [*tmp_path.glob("*.json")]


def test_record_writes_between_the_markers_again_and_again(tmp_path):
    readme = tmp_path / "README.md"
    begin, end = page.marks(device_report.SECTION)
    readme.write_text(f"# Above\n\n{begin}\nold\n{end}\n\nBelow.\n")
    device_report.write(tmp_path, FIGURES)
    device_report.record(tmp_path, readme)
    once = readme.read_text()
    assert once.startswith("# Above\n\n")
    assert once.endswith("\n\nBelow.\n")
    assert "old" not in once
    assert "### A model" in once
    device_report.record(tmp_path, readme)
    assert readme.read_text() == once


def test_suites_are_counted_by_file(tmp_path):
    file = tmp_path / "suites.xml"
    assert device_report.suites_table(file) is None
    file.write_text(SUITES)
    table = device_report.suites_table(file)
    assert table.rows == [
        {"suite": "tests/test_a.py", "passed": 1, "failed": 1, "skipped": 0, "seconds": 2.0},
        {"suite": "tests/test_b.py", "passed": 0, "failed": 0, "skipped": 1, "seconds": 0.0},
    ]
    assert "`tests/test_a.py::two`" in table.note


def raises(x):
    raise ValueError("no | such\nthing")


def test_a_row_that_fails_leaves_the_others():
    programs = [
        device.Program("base", lambda x: jnp.sin(x) * 2, "base"),
        device.Program("fails", raises, "base"),
        device.Program("twice", lambda x: jnp.sin(x) + x, "base"),
    ]
    make = lambda: (jnp.ones((4, 8)),)
    piece = device.Piece("t", "n", "8 wide", "float32", 4, programs, make, counted=True)
    said = []
    base, fails, twice = device.run(piece, said.append)
    assert fails["state"] == "failed: ValueError: no | such"
    assert base["x time"] == base["x memory"] == base["x FLOPs"] == 1
    for row in (base, fails, twice):
        assert (row["dtype"], row["sizes"], row["batch"]) == ("float32", "8 wide", 4)
        assert row["jax"] == jax.__version__
        assert row["device"] == jax.devices()[0].device_kind
    assert said[-1] == "t: FLOPs counted"


def test_what_does_not_fit_is_a_row_that_says_so():
    def exhausted():
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate")

    ready = {
        "large": device.Ready(exhausted, 3 * device.GIB, 0.0),
        "broken": device.Ready(exhausted, 1, 0.0),
        "small": device.Ready(lambda: None, 1, 0.0),
        "uncompiled": "failed: ValueError: no",
    }
    found = device.usable(ready, limit=2 * device.GIB)
    assert found["large"] == "out of memory: needs 3.0 GiB"
    assert found["broken"] == "out of memory"
    assert isinstance(found["small"], device.Ready)
    assert found["uncompiled"] == "failed: ValueError: no"


def test_what_cannot_fit_is_not_compiled():
    piece = device.forms_piece(8, "float32")
    assert [one.least for one in piece.programs] == [4096, 0, 0, 4096, 4096, 49152, 49152]
    piece = dataclasses.replace(piece, programs=piece.programs[-1:])
    found = device.build(piece, (jnp.ones(1),), limit=40_000)
    assert found == {"stacked weighted": "out of memory: needs 0.0 GiB"}


def test_steps_of_nested_scans_are_counted():
    weights, x = np.ones((3, 5, 64, 64), np.float32), np.ones((8, 64), np.float32)

    def scanned(weights, x):
        inner = lambda x, w: (jnp.tanh(x @ w), None)
        outer = lambda x, ws: (lax.scan(inner, x, ws)[0], None)
        return lax.scan(outer, x, weights)[0].sum()

    def unrolled(weights, x):
        for w in weights.reshape(-1, 64, 64):
            x = jnp.tanh(x @ w)
        return x.sum()

    products = 3 * 5 * 2 * 8 * 64 * 64
    assert products <= flops(scanned, weights, x)
    grads = [jax.grad(fun, argnums=1) for fun in (scanned, unrolled)]
    for forms in ((scanned, unrolled), grads):
        found, expected = (flops(fun, weights, x) for fun in forms)
        # A step counts itself and cuts its slices: a few operations, against 65536 in its product.
        np.testing.assert_allclose(found, expected, rtol=2e-2)
