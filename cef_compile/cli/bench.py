"""``cef-compile bench``: attention on this device, filtered beside dense."""

from __future__ import annotations

import argparse
import json
import re
from typing import Any, Final

from cef_compile.cli.common import Subparsers, UsageError, add_parser

SHAPE: Final = re.compile(r"(\d+)x(\d+)x(\d+)x(\d+)")
DEFAULT_SHAPES: Final = {"cuda": ("1x40x32760x128", "1x24x27280x128"), "cpu": ("1x2x2048x64",)}
"""By device; on CUDA those of Wan 2.2 A14B at 480p and TI2V-5B at 720p."""
EXAMPLES: Final = """\
  cef-compile bench
  cef-compile bench --shape 1x24x16384x128 --shape 2x16x8192x64 --density 0.3
  cef-compile bench --device cpu --force      to see the table; its times mean nothing"""


def add_bench(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_parser(
        subparsers,
        "bench",
        help="times of filtered attention on this card, beside PyTorch's dense ones",
        description="Time cef_compile.attention on random tensors beside every backend of\n"
        "scaled_dot_product_attention that this card has. Densities are set, so the\n"
        "times hold for any model of the shape; which density a recall needs is a\n"
        "property of the model: see its audit.",
        examples=EXAMPLES,
    )
    option = parser.add_argument
    option(
        "--shape",
        action="append",
        metavar="BxHxLxD",
        help="batch, heads, length, head_dim; may be given again (default: those of Wan 2.2)",
    )
    option(
        "--density",
        type=float,
        nargs="+",
        default=[0.2, 0.3, 0.4],
        help="shares of key tiles to compute (default: 0.2 0.3 0.4)",
    )
    option("--dtype", choices=["bfloat16", "float16", "float32"], help="(default: by device)")
    option("--device", choices=["auto", "cuda", "cpu"], default="auto", help="(default: auto)")
    option("--force", action="store_true", help="run on a CPU all the same")
    option("--json", action="store_true", help="print JSON")
    parser.set_defaults(run=run)


def run(arguments: argparse.Namespace) -> None:
    """Check the request, measure, print the table."""
    device = _device(arguments.device, arguments.force)
    shapes = [_shape(text) for text in arguments.shape or DEFAULT_SHAPES[device]]
    for density in arguments.density:
        if not 0 < density <= 1:
            raise UsageError(f"density must be in (0, 1], got {density}")
    from cef_compile.cli.measure import measure

    dtype = arguments.dtype or ("bfloat16" if device == "cuda" else "float32")
    rows: list[dict[str, Any]] = []
    try:
        for shape in shapes:
            rows += measure(shape, arguments.density, dtype, device)
    except ValueError as error:  # the shape or dtype is one that the filter does not take
        raise UsageError(error) from error
    except RuntimeError as error:
        if "out of memory" not in str(error):
            raise
        raise UsageError(f"{shape} does not fit into the memory of the device") from error
    _print(rows, device, dtype, as_json=arguments.json)


def _print(rows: list[dict[str, Any]], device: str, dtype: str, as_json: bool) -> None:
    from cef_compile.report.environment import environment
    from cef_compile.report.table import number, text_table

    env = environment()
    if as_json:
        print(json.dumps({"environment": env, "dtype": dtype, "rows": rows}, indent=2))
        return
    card = env["cuda"]["devices"][0]["name"] if device == "cuda" else "CPU"
    print(f"{card}, torch {env['versions']['torch']}, {dtype}; batch x heads x length x head_dim")
    header = ["shape", "attention", "density", "recall", "ms", "against dense", "note"]
    cells = [
        [
            row["shape"],
            row["attention"],
            number(row["density"]),
            number(row["recall"]),
            number(row["ms"], 3),
            "" if row["speed"] is None else f"{row['speed']:.2f}x",
            row["note"],
        ]
        for row in rows
    ]
    print(text_table(header, cells))
    print("against dense: the fastest dense backend's time over this one's, same tensors, same run")
    if device == "cpu":
        print("NOTE: on a CPU the filter is a PyTorch reference; these times mean nothing.")


def _device(name: str, force: bool) -> str:
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError("device is cuda, but torch finds no CUDA device")
    if name == "cuda" or (name == "auto" and torch.cuda.is_available()):
        return "cuda"
    if not force:
        raise UsageError(
            "times on a CPU mean nothing: the filter is a PyTorch reference there, made to be"
            " checked; --force shows the table all the same"
        )
    return "cpu"


def _shape(text: str) -> tuple[int, int, int, int]:
    found = SHAPE.fullmatch(text)
    if found is None or "0" in found.groups():
        raise UsageError(
            f"shape must be BATCHxHEADSxLENGTHxHEAD_DIM, such as 1x24x16384x128, got {text!r}"
        )
    batch, heads, length, dim = map(int, found.groups())
    return batch, heads, length, dim
