"""Explanations put together and taken apart by example."""

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

# What must be the same of all parts.
_COMMON = ("method", "signed", "model", "settings")


def fields(parts: Sequence[Any]) -> dict[str, Any]:
    """The fields of the explanation of all examples; see `Explanation.concatenate`."""
    if not parts:
        raise ValueError("concatenate: there is no explanation; give at least one")
    first = parts[0]
    for part in parts[1:]:
        for name in _COMMON:
            if getattr(part, name) != getattr(first, name):
                raise ValueError(
                    f"concatenate: explanations of one method, settings and model can be joined; "
                    f"{name} is {getattr(first, name)!r} and {getattr(part, name)!r}"
                )
    for name in ("image", "text", "pixels"):
        _check_sizes(name, [getattr(part, name) for part in parts])
    joined = {name: getattr(first, name) for name in _COMMON}
    for name in ("score", "image", "text"):
        arrays = [getattr(part, name) for part in parts]
        joined[name] = None if arrays[0] is None else np.concatenate(arrays)
    for name in ("target", "tokens"):
        joined[name] = tuple(chain.from_iterable(getattr(part, name) for part in parts))
    if first.pixels is not None:
        joined["pixels"] = [one for part in parts for one in part.pixels]
    if any(part.flags for part in parts):
        joined["flags"] = [one for part in parts for one in part.flags or [None] * len(part)]
    joined["report"] = _reports([(part.report, len(part)) for part in parts])
    return joined


def _check_sizes(name: str, values: Sequence[Any]) -> None:
    """Raise ValueError unless all or none have this field, and in one size."""
    sizes = {None if x is None else () if name == "pixels" else x.shape[1:] for x in values}
    if len(sizes) > 1:
        raise ValueError(
            f"concatenate: the explanations differ in {name}: "
            + " and ".join("none" if size is None else str(list(size)) for size in sizes)
        )


def part(report: Any, chosen: slice, count: int) -> Any:
    """A report of some of the examples: lists with an entry per example are cut."""
    if isinstance(report, dict):
        return {name: part(value, chosen, count) for name, value in report.items()}
    return report[chosen] if isinstance(report, list) and len(report) == count else report


def _reports(reports: Sequence[tuple[Any, int]], *, totals: bool = False) -> Any:
    """One report of several, each of so many examples.

    Numbers of an account of relevance (`totals`) are sums over examples, and are added up. Of
    others those stay that all have in common.
    """
    entries = [entry for entry, _ in reports]
    first = entries[0]
    if all(isinstance(entry, dict) for entry in entries):
        shared = [name for name in first if all(name in entry for entry in entries)]
        return {
            name: _reports([(x[name], n) for x, n in reports], totals=name == "relevance" or totals)
            for name in shared
        }
    if all(isinstance(entry, list) and len(entry) == count for entry, count in reports):
        return [one for entry in entries for one in entry]
    if totals and all(isinstance(entry, float) for entry in entries):
        return sum(entries)
    return first if all(entry == first for entry in entries) else None
