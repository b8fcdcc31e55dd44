"""What was measured on a device, as JSON and Markdown, and as a part of this folder's README.

A folder of results has `device.json` and `device.md`. The JSON file says it all, and every row
says what it was measured on; the Markdown file shows what rows have in common once.
"""

import importlib.metadata
import json
import os
import platform
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import jax

from jaxrel.files import write_atomically
from tests.benchmarks import page
from tests.benchmarks.table import Table, processor

JSON, MARKDOWN, SUITES = "device.json", "device.md", "suites.xml"
SECTION = "device figures"
# These are said once for a table, above it.
COMMON = ("device", "jax", "sizes")
PACKAGES = ("jax", "jaxlib", "flax", "numpy")
SETTINGS = ("XLA_FLAGS", "XLA_PYTHON_CLIENT_MEM_FRACTION", "JAX_DEFAULT_MATMUL_PRECISION")

Figures = dict[str, Any]


def environment() -> dict[str, str]:
    """The device, the versions, and the settings that bear on speed."""
    found = {
        "device": f"{jax.device_count()} x {jax.devices()[0].device_kind}",
        "processor": f"{processor()}, {os.cpu_count()} cores",
        "Python": platform.python_version(),
    }
    found |= {name: importlib.metadata.version(name) for name in PACKAGES}
    return found | {name: os.environ[name] for name in SETTINGS if os.environ.get(name)}


def write(folder: Path, figures: Figures) -> None:
    """Write both files, each whole or not at all.

    Args:
      folder: where to; it must exist.
      figures: "environment", "tables" (title, note, rows), and whatever else JSON can hold.
    """
    text = json.dumps(figures, indent=1, allow_nan=False) + "\n"
    write_atomically(folder / JSON, text.encode())
    write_atomically(folder / MARKDOWN, markdown(figures).encode())


def markdown(figures: Figures) -> str:
    """The figures as Markdown, headings from the third level on."""
    said = "; ".join(f"{name} {value}" for name, value in figures["environment"].items())
    parts = [f"Measured on {said}.\n"]
    tables = [table for table in figures["tables"] if table["rows"]]
    skipped = [table["title"] for table in tables if all(map(_skipped, table["rows"]))]
    parts += [_shown(table).markdown() for table in tables if table["title"] not in skipped]
    if skipped:
        parts.append(f"Not measured, for want of time: {'; '.join(skipped)}.\n")
    return "\n".join(parts)


def _skipped(row: Mapping[str, Any]) -> bool:
    return str(row.get("state", "")).startswith("skipped")


def record(folder: Path, readme: Path) -> None:
    """Write a folder's figures into a README, between its markers.

    Args:
      folder: has `device.json`.
      readme: has the marks of `SECTION`.

    Raises:
      FileNotFoundError: one of the files is not there.
      ValueError: the README lacks a mark, or has one twice.
    """
    figures = json.loads((folder / JSON).read_text(encoding="utf-8"))
    page.write(readme, SECTION, markdown(figures))


def suites_table(file: Path) -> Table | None:
    """The outcome of the test suites, by file, from a JUnit file; None if it is not there."""
    if not file.exists():
        return None
    counts: dict[str, dict[str, Any]] = defaultdict(_no_tests)
    failed = []
    for case in ElementTree.parse(file).iter("testcase"):
        suite = case.get("classname", "").split(".")
        name = "/".join(suite) + ".py"
        outcome = _outcome(case)
        counts[name][outcome] += 1
        counts[name]["seconds"] += float(case.get("time", 0))
        if outcome == "failed":
            failed.append(f"`{name}::{case.get('name')}`")
    note = "Seconds are of all workers together."
    if failed:
        note += "\n\nFailed:\n\n" + "\n".join(f"- {one}" for one in failed)
    return Table("Test suites", note, [{"suite": name} | row for name, row in counts.items()])


def _no_tests() -> dict[str, Any]:
    return {"passed": 0, "failed": 0, "skipped": 0, "seconds": 0.0}


def _outcome(case: ElementTree.Element) -> str:
    kinds = {child.tag for child in case}
    if kinds & {"failure", "error"}:
        return "failed"
    return "skipped" if "skipped" in kinds else "passed"


def _shown(table: Mapping[str, Any]) -> Table:
    """A table without the columns that say the same in every row: its note says it instead."""
    rows: Sequence[Mapping[str, Any]] = table["rows"]
    common = [name for name in COMMON if len({str(row.get(name)) for row in rows}) == 1]
    said = [str(rows[0][name]) for name in common if name in rows[0] and name == "sizes"]
    kept = [{name: _cell(x) for name, x in row.items() if name not in common} for row in rows]
    return Table(table["title"], " ".join([*(f"{one}." for one in said), table["note"]]), kept)


def _cell(cell: Any) -> Any:
    """Counts as they are, and text that cannot end a cell or a line."""
    if isinstance(cell, int):
        return str(cell)
    return " ".join(cell.replace("|", "\\|").split()) if isinstance(cell, str) else cell
