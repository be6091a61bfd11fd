"""The command line ``cef-compile``.

A command is a module with a function that adds its parser and names the function to call; it is
listed in :data:`COMMANDS`. What it needs is imported when it runs, so that ``--help`` stays quick.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Final

from cef_compile import __version__
from cef_compile.cli.bench import add_bench
from cef_compile.cli.calibrate import add_calibrate
from cef_compile.cli.common import INTERRUPTED, USAGE_ERROR, Subparsers, UsageError
from cef_compile.cli.demo import add_demo
from cef_compile.cli.env import add_env
from cef_compile.cli.explain import add_explain
from cef_compile.cli.report import add_report

COMMANDS: Final[tuple[Callable[[Subparsers], None], ...]] = (
    add_demo,
    add_explain,
    add_calibrate,
    add_bench,
    add_report,
    add_env,
)
"""In the order in which ``--help`` lists them."""
EXAMPLES: Final = """\
first steps:
  cef-compile demo                            see it work, on a CPU too
  cef-compile explain WanTransformer3DModel   what would be filtered, and what not
  cef-compile calibrate --max-error 0.01      the fastest policy within an error budget
  cef-compile bench                           how fast attention is on this card
  cef-compile COMMAND --help                  more about a command"""

__all__ = ["COMMANDS", "INTERRUPTED", "USAGE_ERROR", "UsageError", "main", "make_parser"]


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands; ``run`` of what it returns carries one out."""
    parser = argparse.ArgumentParser(
        prog="cef-compile",
        description="Training-free sparse attention for Diffusion Transformers: "
        "a torch.compile backend with an audited recall.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(title="commands", dest="command", required=True)
    for add in COMMANDS:
        add(subparsers)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's own) and return its exit code."""
    arguments = make_parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except UsageError as error:
        print(f"cef-compile {arguments.command}: error: {error}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0
