"""The command line: ``cef-compile demo`` and ``cef-compile env``.

A subcommand is a function that adds its parser and names the function to call; what it needs is
imported when it runs, so that ``--help`` stays quick.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from cef_compile import __version__
from cef_compile.demo.defaults import (
    CLIP_FRAMES,
    CLIPS,
    FRAMES,
    OUT,
    RECALL,
    SIZE,
    STEPS,
    TOKEN_PIXELS,
)

USAGE_ERROR: Final = 2
"""Exit code of a user's mistake, argparse's own."""
INTERRUPTED: Final = 130
"""Exit code after Ctrl-C, as shells have it."""
DEMO_PACKAGES: Final = ("accelerate", "diffusers", "PIL", "safetensors", "skimage", "tqdm")
"""What ``cef-compile[demo]`` brings, by import name."""

Subparsers = Any  # argparse keeps the type of add_subparsers() to itself


class UsageError(Exception):
    """The user asked for something that cannot be done; the message is one line."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's own) and return its exit code."""
    parser = argparse.ArgumentParser(
        prog="cef-compile",
        description="Training-free sparse attention for Diffusion Transformers: "
        "a torch.compile backend with an audited recall.",
    )
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(title="commands", dest="command", required=True)
    for add in COMMANDS:
        add(subparsers)
    arguments = parser.parse_args(argv)
    try:
        arguments.run(arguments)
    except UsageError as error:
        print(f"cef-compile {arguments.command}: error: {error}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def add_demo(subparsers: Subparsers) -> None:
    """``cef-compile demo``: :func:`cef_compile.demo.run.run_demo`."""
    parser = subparsers.add_parser(
        "demo",
        help="denoise a real clip with a small trained model, dense and filtered",
        description="Denoise a real clip with the embedded trained tiny Wan, dense and filtered, "
        "and write frames, measurements and the per-node table to a folder.",
    )
    option = parser.add_argument
    option(
        "--recall",
        type=float,
        default=RECALL,
        help="wanted mean share of the attention energy, 1 is dense (default: %(default)s)",
    )
    option("--steps", type=int, default=STEPS, help="Euler steps (default: %(default)s)")
    option(
        "--size",
        type=int,
        help=f"height and width in pixels, a multiple of {TOKEN_PIXELS} "
        f"(default: {_by_device(SIZE)})",
    )
    option("--frames", type=int, help=f"at most {CLIP_FRAMES} (default: {_by_device(FRAMES)})")
    option("--clip", type=int, default=0, help=f"which of the {CLIPS} clips (default: %(default)s)")
    option("--seed", type=int, default=0, help="seed of the noise (default: %(default)s)")
    option("--device", choices=["auto", *SIZE], default="auto", help="(default: %(default)s)")
    option("--out", type=Path, default=OUT, help="folder for results (default: %(default)s)")
    parser.set_defaults(run=run_demo)


def run_demo(arguments: argparse.Namespace) -> None:
    """Check the request, run it, print its report."""
    _require(DEMO_PACKAGES, extra="demo")
    from cef_compile.demo.settings import Settings, SettingsError

    try:
        settings = Settings.resolve(
            recall=arguments.recall,
            steps=arguments.steps,
            size=arguments.size,
            frames=arguments.frames,
            clip=arguments.clip,
            seed=arguments.seed,
            device=arguments.device,
            out=arguments.out,
        )
    except SettingsError as error:
        raise UsageError(error) from error
    from cef_compile.demo.run import run_demo

    print(run_demo(settings))
    print(f"\nwritten to {settings.out}/")


def add_env(subparsers: Subparsers) -> None:
    """``cef-compile env``: versions and devices, for a bug report."""
    parser = subparsers.add_parser("env", help="versions and devices, for a bug report")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run_env)


def run_env(arguments: argparse.Namespace) -> None:
    """Print the environment."""
    from cef_compile.report.environment import describe, environment

    env = environment()
    print(json.dumps(env, indent=2) if arguments.json else describe(env))


COMMANDS: Final[tuple[Callable[[Subparsers], None], ...]] = (add_demo, add_env)


def _by_device(defaults: Mapping[str, int]) -> str:
    return ", ".join(f"{value} on {device}" for device, value in defaults.items())


def _require(packages: Sequence[str], extra: str) -> None:
    missing = [name for name in packages if find_spec(name) is None]
    if missing:
        raise UsageError(f'needs {", ".join(missing)}: pip install "cef-compile[{extra}]"')


if __name__ == "__main__":
    sys.exit(main())
