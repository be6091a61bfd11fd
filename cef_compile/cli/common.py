"""What the commands share."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, Final

USAGE_ERROR: Final = 2
"""Exit code of a user's mistake, argparse's own."""
INTERRUPTED: Final = 130
"""Exit code after Ctrl-C, as shells have it."""

Subparsers = Any  # argparse keeps the type of add_subparsers() to itself


class UsageError(Exception):
    """The user asked for something that cannot be done; the message is one line."""


def add_parser(
    subparsers: Subparsers, name: str, *, help: str, description: str, examples: str
) -> argparse.ArgumentParser:
    """A parser whose ``--help`` ends with examples, shown as they are written here."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        name,
        help=help,
        description=description,
        epilog=f"examples:\n{examples}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    return parser


def require(packages: Sequence[str], extra: str) -> None:
    """Raise a :class:`UsageError` that names the packages of an extra that are not installed."""
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise UsageError(f'needs {", ".join(missing)}: pip install "cef-compile[{extra}]"')


def one_line(error: BaseException) -> str:
    """The first line of an error's message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
