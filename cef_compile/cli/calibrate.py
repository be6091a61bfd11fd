"""``cef-compile calibrate``: a policy file from a budget of output error."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from cef_compile.cli.common import Subparsers, UsageError, add_parser, one_line, require
from cef_compile.demo.defaults import CLIPS, FRAMES, SIZE

if TYPE_CHECKING:
    from torch import nn

    from cef_compile.backend import Backend

    Run = Callable[[Backend], object]

PACKAGES: Final = ("accelerate", "diffusers", "safetensors", "tqdm")
STEPS: Final = 3
"""Noise levels at which the embedded model is measured: two calls each, with and without text."""
OUT: Final = Path("policy.json")
CLIP_OPTIONS: Final = ("clip", "size", "frames", "seed", "steps")
"""What only the embedded model's own clip has."""
EXAMPLES: Final = """\
  cef-compile calibrate --max-error 0.02
  cef-compile demo --policy policy.json
  cef-compile calibrate --max-error 0.01 --candidates 0.97 0.9 --checkpoint measured.json
  cef-compile calibrate ./my-transformer --inputs calls.pt --out mine.json

calls.pt holds calls of your own model, recorded while it sampled: a list of pairs
(noise level or None, keyword arguments), written by torch.save. docs/calibration.md
shows how to record it."""


def add_calibrate(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_parser(
        subparsers,
        "calibrate",
        help="the fastest policy within an error budget, as a file",
        description="Measure what each attention of a model loses and saves at several recalls,\n"
        "and write the fastest policy whose error of the model's output stays within a\n"
        "budget. Without a folder the embedded trained tiny Wan is calibrated on its\n"
        "clip. The noise levels are part of the policy; see docs/calibration.md.",
        examples=EXAMPLES,
    )
    option = parser.add_argument
    option(
        "folder",
        nargs="?",
        type=Path,
        metavar="FOLDER",
        help="a diffusers transformer: config.json and weights (default: the tiny Wan)",
    )
    option("--inputs", type=Path, metavar="FILE", help="recorded calls of the model in FOLDER")
    option(
        "--max-error",
        type=float,
        required=True,
        help="budget: |filtered - dense| / |dense| of the model's output, in (0, 1]",
    )
    option("--out", type=Path, default=OUT, help="policy file to write (default: %(default)s)")
    option(
        "--candidates",
        type=float,
        nargs="+",
        metavar="RECALL",
        help="recalls to choose from; fewer are faster (default: 0.99 ... 0.5)",
    )
    option("--checkpoint", type=Path, metavar="FILE", help="go on here if it is interrupted")
    option(
        "--min-kv-len", type=int, help="fewest keys at which a node is filtered (default: as usual)"
    )
    option("--device", choices=["auto", *SIZE], default="auto", help="(default: %(default)s)")
    option("--clip", type=int, help=f"which of the {CLIPS} clips of the tiny Wan (default: 0)")
    for name, defaults in (("size", SIZE), ("frames", FRAMES)):
        by_device = ", ".join(f"{value} on {device}" for device, value in defaults.items())
        option(f"--{name}", type=int, help=f"of the clip (default: {by_device})")
    option("--steps", type=int, help=f"noise levels of the clip (default: {STEPS})")
    option("--seed", type=int, help="of its noise (default: 0)")
    option("--json", action="store_true", help="print what was measured as JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Check the request, calibrate, write the file, print what was found."""
    require(PACKAGES, extra="demo")
    _check_writable(arguments.out)
    if arguments.folder is None:
        if arguments.inputs is not None:
            raise UsageError("--inputs are calls of a model: name its folder too")
        model, denoise = _tiny_wan(arguments)
    else:
        given = [name for name in CLIP_OPTIONS if getattr(arguments, name) is not None]
        if given:
            raise UsageError(f"--{given[0]} is of the tiny Wan's clip; a FOLDER has its --inputs")
        if arguments.inputs is None:
            raise UsageError(
                "--inputs is missing: what attention looks like depends on real inputs, and this"
                " command has none for your model; --help says what the file holds"
            )
        model, denoise = _recorded(arguments)
    policy = _calibrate(arguments, model, denoise)
    from cef_compile import save_policy

    save_policy(policy, arguments.out)
    if arguments.json:
        print(json.dumps(json.loads(arguments.out.read_text())["calibration"], indent=2))
    else:
        print(f"{policy.calibration}\nwrote {arguments.out}")


def _calibrate(arguments: argparse.Namespace, model: nn.Module, denoise: Run) -> Any:
    import cef_compile
    from cef_compile.calibrate import CANDIDATES

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the outcome says it where Balanced is better
        try:
            return cef_compile.calibrate(
                model,
                denoise,
                max_error=arguments.max_error,
                candidates=arguments.candidates or CANDIDATES,
                checkpoint=arguments.checkpoint,
                min_kv_len=arguments.min_kv_len,
                progress=sys.stderr.isatty(),
            )
        except ValueError as error:
            raise UsageError(one_line(error)) from error
        except OSError as error:
            raise UsageError(f"cannot use {error.filename}: {error.strerror}") from error
        except (RuntimeError, TypeError) as error:
            if arguments.inputs is None:
                raise
            raise UsageError(f"the model fails on {arguments.inputs}: {one_line(error)}") from error


def _tiny_wan(arguments: argparse.Namespace) -> tuple[nn.Module, Run]:
    from cef_compile.demo.calibration import denoising
    from cef_compile.demo.data import load_model
    from cef_compile.demo.sampler import noise_levels
    from cef_compile.demo.settings import Settings, SettingsError

    try:
        settings = Settings.resolve(
            steps=STEPS if arguments.steps is None else arguments.steps,
            size=arguments.size,
            frames=arguments.frames,
            clip=arguments.clip or 0,
            seed=arguments.seed or 0,
            device=arguments.device,
            out=arguments.out.parent,
        )
    except SettingsError as error:
        raise UsageError(error) from error
    model = load_model(settings.device, settings.dtype)
    denoise = denoising(
        model,
        noise_levels(settings.steps),
        clip=settings.clip,
        frames=settings.frames,
        size=settings.size,
        seed=settings.seed,
        device=settings.device,
        dtype=settings.dtype,
    )
    return model, denoise


def _recorded(arguments: argparse.Namespace) -> tuple[nn.Module, Run]:
    import torch

    from cef_compile.cli.recorded import load_calls, load_transformer
    from cef_compile.demo.settings import SettingsError, find_device

    try:
        device = find_device(arguments.device)
    except SettingsError as error:
        raise UsageError(error) from error
    calls = load_calls(arguments.inputs, device)
    model = load_transformer(arguments.folder, device)

    @torch.no_grad()
    def denoise(backend: Backend) -> None:
        for level, inputs in calls:
            backend.set_noise_level(level)
            model(**inputs)

    return model, denoise


def _check_writable(path: Path) -> None:
    if path.is_dir():
        raise UsageError(f"{path} is a folder; --out names the file to write")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UsageError(f"cannot write to the folder {path.parent}: {error.strerror}") from error
