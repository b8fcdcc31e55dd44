"""The guard of costs; `python -m tests.benchmarks.guard` runs it."""

import json

from tests.benchmarks.guard import KEPT, risen


def test_what_has_risen_is_named():
    kept = {"a": {"flops": 100.0, "bytes": 10.0}, "b": {"flops": 1.0, "bytes": 1.0}}
    assert risen(kept, kept) == []
    more = kept | {"a": {"flops": 104.0, "bytes": 10.6}}
    assert risen(more, kept) == ["a: 1.060 times the bytes that are kept"]
    assert risen({"a": kept["a"]}, kept) == ["b: in one of the two alone"]


def test_ten_programs_are_kept():
    kept = json.loads(KEPT.read_text(encoding="utf-8"))
    assert len(kept) == 10
    assert all(cost > 0 for costs in kept.values() for cost in costs.values())
