"""`jaxrel report RESULTS`: a page of chosen rows of what `jaxrel batch` wrote."""

import argparse
from pathlib import Path
from typing import Any

from jaxrel.cli import options as shared
from jaxrel.files import check_writable

EXAMPLES = """examples:
  jaxrel report results --where "score > 20" --limit 50 --out page.html
  jaxrel report results --errors
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
        "--limit",
        type=shared.positive,
        default=50,
        help="at most so many, and the rest of the last caption (default: 50)",
    )
    report.add_argument(
        "--out", type=shared.folder, default=Path("report.html"), help="default: report.html"
    )
    report.add_argument(
        "--errors",
        action="store_true",
        help="print the rows that could not be explained, and why; write nothing",
    )
    report.set_defaults(run=run)


def run(options: argparse.Namespace) -> None:
    """Draw the rows, or say which could not be explained."""
    from jaxrel import report
    from jaxrel.batch.folder import read_manifest
    from jaxrel.batch.results import explanations, find_errors, find_rows
    from jaxrel.report import html

    check_writable(options.out.parent)
    manifest = read_manifest(options.results)
    if options.errors:
        for identity, error in find_errors(options.results, options.where):
            print(f"{shared.printable(identity)}: {error}")
        return
    chosen = find_rows(options.results, options.where, order=options.order, limit=options.limit)
    model = shared.load(manifest["settings"]["model"])
    found = explanations(chosen.rows, model, name=manifest["settings"]["model"])
    report.save(found, options.out)
    every = f"{chosen.total} rows"
    what = every if chosen.shown == chosen.total else f"{chosen.shown} of {every} (--limit)"
    inputs = len({row["id"] for row in chosen.rows})
    if options.out.suffix.lower() == ".html" and inputs > html.MOST:
        what += f" of {inputs} inputs, of which the page shows {html.MOST},"
    print(f"wrote {what} to {options.out}")
