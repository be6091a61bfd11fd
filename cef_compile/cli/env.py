"""``cef-compile env``: versions and devices, for a bug report."""

from __future__ import annotations

import argparse
import json

from cef_compile.cli.common import Subparsers, add_parser


def add_env(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_parser(
        subparsers,
        "env",
        help="versions and devices, for a bug report",
        description="Print what a bug report needs: versions, platform, CPU and GPUs.",
        examples="  cef-compile env\n  cef-compile env --json > env.json",
    )
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Print the environment."""
    from cef_compile.report.environment import describe, environment

    env = environment()
    print(json.dumps(env, indent=2) if arguments.json else describe(env))
