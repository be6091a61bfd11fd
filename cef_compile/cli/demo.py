"""``cef-compile demo``: :func:`cef_compile.demo.run.run_demo`."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from cef_compile.cli.common import Subparsers, UsageError, add_parser, require
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

PACKAGES: Final = ("accelerate", "diffusers", "PIL", "safetensors", "skimage", "tqdm")
"""What ``cef-compile[demo]`` brings, by import name."""
EXAMPLES: Final = """\
  cef-compile demo
  cef-compile demo --recall 0.95 --clip 1 --out more-recall
  cef-compile demo --policy policy.json       what cef-compile calibrate has written
  cef-compile demo --size 64 --steps 4        a quick look"""


def add_demo(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_parser(
        subparsers,
        "demo",
        help="denoise a real clip with a small trained model, dense and filtered",
        description="Denoise a real clip with the embedded trained tiny Wan, dense and filtered,\n"
        "and write frames, measurements and a report to a folder: report.html is the\n"
        "page to look at, report.json what it was made of.",
        examples=EXAMPLES,
    )
    option = parser.add_argument
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument(
        "--recall",
        type=float,
        help=f"wanted mean share of the attention energy, 1 is dense (default: {RECALL})",
    )
    chosen.add_argument("--policy", type=Path, help="a policy file, as calibrate writes it")
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
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Check the request, run it, print its report."""
    require(PACKAGES, extra="demo")
    from cef_compile.demo.settings import Settings, SettingsError

    try:
        settings = Settings.resolve(
            recall=arguments.recall,
            policy=arguments.policy,
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
    print(f"\nlook at {settings.out / 'report.html'}")


def _by_device(defaults: Mapping[str, int]) -> str:
    return ", ".join(f"{value} on {device}" for device, value in defaults.items())
