"""`jaxrel report RESULTS`: a page of chosen rows of what `jaxrel batch` wrote."""

import argparse
from pathlib import Path
from typing import Any

from jaxrel.cli import options as shared
from jaxrel.files import check_writable

EXAMPLES = """examples:
  jaxrel report results --where "score > 20" --limit 50 --out page.html
  jaxrel report results --where "list_contains(tokens, 'dog')" --order "score desc" --out page.html
"""


def add(commands: Any) -> None:
    """Add the command."""
    report = commands.add_parser(
        "report",
        help="draw chosen rows of what `jaxrel batch` wrote",
        description="Write a page (.html) or a figure (.png) of chosen rows of a folder that "
        "`jaxrel batch` wrote. Rows are chosen in DuckDB's SQL over the columns of the table.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    report.add_argument("results", type=shared.folder, help="the folder that `jaxrel batch` wrote")
    report.add_argument(
        "--where", default="true", help="which rows, such as 'score > 20' (default: all)"
    )
    report.add_argument("--order", default="id, row", help="in which order (default: 'id, row')")
    report.add_argument(
        "--limit", type=shared.positive, default=50, help="at most so many (default: 50)"
    )
    report.add_argument(
        "--out", type=shared.folder, default=Path("report.html"), help="default: report.html"
    )
    report.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Draw the rows."""
    from jaxrel import report
    from jaxrel.batch.folder import read_manifest
    from jaxrel.batch.results import explanations, find_rows

    check_writable(options.out.parent)
    manifest = read_manifest(options.results)
    rows = find_rows(options.results, options.where, order=options.order, limit=options.limit)
    model = shared.load(manifest["settings"]["model"])
    found = explanations(rows, model, name=manifest["settings"]["model"])
    report.save(found, options.out)
    print(f"wrote {len(found[0])} rows to {options.out}")
