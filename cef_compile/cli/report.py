"""``cef-compile report``: the page of a saved report."""

from __future__ import annotations

import argparse
from pathlib import Path

from cef_compile.cli.common import Subparsers, UsageError, add_parser


def add_report(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_parser(
        subparsers,
        "report",
        help="make report.html of a report.json",
        description="Make one self-contained page (no network) of a saved report: the folder or\n"
        "report.json that the demo wrote, or a file with json.dumps(backend.report.to_dict()).",
        examples="  cef-compile report demo-out\n  cef-compile report mine.json --out mine.html",
    )
    parser.add_argument("source", type=Path, help="a JSON file, or a folder with report.json")
    parser.add_argument(
        "--out", type=Path, help="page to write (default: beside the JSON file, named like it)"
    )
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Write the page."""
    from cef_compile.report.record import RecordError
    from cef_compile.report.saved import write_page

    source: Path = arguments.source
    if source.is_dir():
        source /= "report.json"
    out = arguments.out or source.with_suffix(".html")
    try:
        write_page(source, out)
    except RecordError as error:
        raise UsageError(error) from error
    print(f"written to {out}")
