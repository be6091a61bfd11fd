"""``cef-compile explain``: what would be done with a model, without its weights."""

from __future__ import annotations

import argparse
import json
import logging
import warnings
from collections.abc import Mapping
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from cef_compile.cli.common import Subparsers, UsageError, add_parser, one_line, require

if TYPE_CHECKING:
    from cef_compile.cli.models import Model, Size
    from cef_compile.policy import PolicyLike
    from cef_compile.report import Report

EXAMPLES: Final = """\
  cef-compile explain WanTransformer3DModel
  cef-compile explain WanTransformer3DModel --height 480 --width 832
  cef-compile explain ./Wan2.2-T2V-A14B-Diffusers --policy policy.json
  cef-compile explain FluxTransformer2DModel --json"""
DIMENSIONS: Final = {
    "height": "pixels",
    "width": "pixels",
    "frames": "of a video",
    "text": "text tokens",
}


def add_explain(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_parser(
        subparsers,
        "explain",
        help="what would be filtered in a diffusers transformer, without its weights",
        description="List every attention of a diffusers transformer and what the backend would\n"
        "do with it on a GPU. The model is built without weights (on the meta device)\n"
        "and traced, not run: seconds, and little memory, however large it is.",
        examples=EXAMPLES,
    )
    option = parser.add_argument
    option(
        "model",
        metavar="CLASS_OR_FOLDER",
        help="a class, in the configuration that diffusers gives it, or a folder with config.json "
        "(of the transformer, or of a pipeline)",
    )
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--recall", type=float, help="of the default policy (default: 0.95)")
    chosen.add_argument("--policy", type=Path, help="a policy file")
    for name, about in DIMENSIONS.items():
        option(f"--{name}", type=int, help=f"{about} (default: as the model is usually run)")
    option("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Build the model, trace it, print the report."""
    require(("diffusers",), extra="demo")
    policy = _policy(arguments.policy, arguments.recall)
    name, config = _named(arguments.model)
    known = _known(name)
    size = replace(known.size, **_dimensions(arguments))
    report = _explain(name, config, known, size, policy)
    if arguments.json:
        print(json.dumps(report.to_dict(), indent=2))
        return
    frames = f"{size.frames} frames of " if size.frames > 1 else ""
    print(f"{name}, {frames}{size.height} x {size.width} pixels, {size.text} text tokens, bfloat16")
    print(report)


def _named(model: str) -> tuple[str, Mapping[str, Any]]:
    """The class that a user means, and its configuration (empty: the class's defaults)."""
    folder = Path(model)
    if not folder.is_dir():
        if "/" in model or folder.exists():
            raise UsageError(
                f"{model} is no folder; give a class, such as WanTransformer3DModel, or a folder"
                " that holds config.json"
            )
        return model, {}
    places = [folder / "config.json", folder / "transformer" / "config.json"]
    path = next((place for place in places if place.is_file()), None)
    if path is None:
        raise UsageError(f"neither {places[0]} nor {places[1]} exists")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path}: {one_line(error)}") from error
    if not isinstance(config, dict) or not isinstance(config.get("_class_name"), str):
        raise UsageError(f"{path} has no _class_name: it is no configuration of a diffusers model")
    return config["_class_name"], config


def _known(name: str) -> Model:
    import diffusers

    from cef_compile.cli.models import MODELS

    if name in MODELS:
        return MODELS[name]
    possible = ", ".join(MODELS)
    if hasattr(diffusers, name):
        raise UsageError(
            f"there is no example call of {name}; there is one of {possible}. For others use"
            " cef_compile.explain(model, *args) in Python"
        )
    close = get_close_matches(name, MODELS, n=1, cutoff=0.4)
    hint = f"; did you mean {close[0]}?" if close else f"; known are {possible}"
    raise UsageError(f"diffusers has no class {name!r}{hint}")


def _dimensions(arguments: argparse.Namespace) -> dict[str, int]:
    given = {name: getattr(arguments, name) for name in DIMENSIONS}
    found = {name: value for name, value in given.items() if value is not None}
    for name, value in found.items():
        if value < 1:
            raise UsageError(f"{name} must be at least 1, got {value}")
    return found


def _policy(path: Path | None, recall: float | None) -> PolicyLike:
    from cef_compile.backend import DEFAULT_RECALL
    from cef_compile.policy import Balanced, load_policy

    try:
        if path is None:
            return Balanced(DEFAULT_RECALL if recall is None else recall)
        return load_policy(path)
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror}") from error
    except ValueError as error:
        raise UsageError(one_line(error)) from error


def _explain(
    name: str,
    config: Mapping[str, Any],
    known: Model,
    size: Size,
    policy: PolicyLike,
) -> Report:
    import diffusers
    import torch
    from diffusers.utils import logging as diffusers_logging

    import cef_compile

    diffusers_logging.set_verbosity_error()  # it would warn of dtypes, which nothing computes in
    logging.getLogger("torch").setLevel(logging.CRITICAL)  # an error is told in one line below
    class_ = getattr(diffusers, name)
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = class_.from_config(dict(config)) if config else class_()
            model = model.to(torch.bfloat16).eval()
    except (TypeError, ValueError, KeyError, AssertionError) as error:
        raise UsageError(f"cannot build {name}: {one_line(error)}") from error
    inputs = known.inputs(model.config, size)
    try:
        return cef_compile.explain(model, policy=policy, return_dict=False, **inputs)
    except (RuntimeError, TypeError, ValueError) as error:
        raise UsageError(
            f"cannot explain {name} at {size.frames} x {size.height} x {size.width}:"
            f" {one_line(error)}"
        ) from error
