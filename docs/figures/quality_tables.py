"""The tables of what videos are like: methods, variants, orders of tokens, policies."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from markdown_tables import Rows, markdown, speed

from cef_compile.demo.sampler import noise_levels

RESULTS: Final = Path(__file__).parents[2] / "bench" / "results"
RECALLS: Final = Path(__file__).with_name("recalls.json")
DEFAULT_VARIANT: Final = "first pass dense"
"""What ``Balanced`` does."""
VARIANT_RECALLS: Final = (0.95, 0.9)
MEASURES: Final = (("psnr", 1), ("ssim", 3), ("flicker", 2))
NAMES: Final = ("PSNR dB", "SSIM", "flicker")


def _found(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((RESULTS / f"{name}-h100.json").read_text(encoding="utf-8"))
    return found


def _rows(name: str) -> Rows:
    rows: Rows = _found(name)["rows"]
    return rows


def _videos(row: dict[str, Any]) -> list[str]:
    """What was delivered, and PSNR of both kinds of videos."""
    return [
        f"{row['recall']:.3f}", f"{row['density']:.3f}",
        f"{row['noise_psnr']:.1f}", f"{row['clip_psnr']:.1f}",
    ]  # fmt: skip


def methods() -> Rows:
    """Methods as they ship, the floor first, and the default once more without the token order."""
    raster = [
        {**row, "method": row["method"] + ", raster order"}
        for row in _rows("quality-raster")
        if "speed" in row
    ]
    return [*_rows("quality"), *raster]


def recalls(_: dict[str, Any]) -> str:
    """Quality of the demo's videos by recall."""
    rows: Rows = json.loads(RECALLS.read_text(encoding="utf-8"))
    ways = dict.fromkeys((row["recall"], row["dense_steps"]) for row in rows)
    table = []
    for recall, dense_steps in ways:
        mine = [r for r in rows if (r["recall"], r["dense_steps"]) == (recall, dense_steps)]
        name = f"{recall:.2f}" + (f", first {dense_steps} steps dense" if dense_steps else "")
        cells = [
            " / ".join(f"{row[field]:{form}}" for row in mine)
            for field, form in (
                ("achieved", ".3f"),
                ("density", ".2f"),
                ("psnr_db", ".1f"),
                ("ssim", ".4f"),
            )
        ]
        table.append([name, *cells])
    return markdown(["recall", "delivered", "density", "PSNR dB", "SSIM"], table)


def quality(_: dict[str, Any]) -> str:
    """Methods as they ship."""
    table = []
    for row in methods():
        floor = "speed" not in row
        name = row["method"] + ("" if floor else f", {row['parameter']:g}")
        cells = ["", ""] if floor else [f"{row['recall']:.3f}", f"{row['density']:.3f}"]
        for kind in ("noise", "clip"):
            cells += [f"{row[f'{kind}_{value}']:.{places}f}" for value, places in MEASURES]
        table.append([name, *cells, "" if floor else speed(row)])
    header = ["method", "recall", "density"]
    header += [f"{name}, {kind}" for kind in ("noise", "clips") for name in NAMES]
    return markdown([*header, "attention calls"], table)


def quality_short(_: dict[str, Any]) -> str:
    """The same, briefly."""
    table = [
        [row["method"] + ("" if "speed" not in row else f", {row['parameter']:g}"),
         f"{row['density']:.2f}" if "speed" in row else "",
         f"{row['noise_psnr']:.1f}", f"{row['clip_psnr']:.1f}",
         speed(row) if "speed" in row else ""]
        for row in methods()
    ]  # fmt: skip
    header = ["method, parameter", "density", "PSNR dB, from noise", "PSNR dB, real clips"]
    return markdown([*header, "attention calls"], table)


def quality_grid(_: dict[str, Any]) -> str:
    """The default on another grid of tokens."""
    return _default("quality-grid")


def quality_32k(_: dict[str, Any]) -> str:
    """The default on twice as many tokens."""
    return _default("quality-32k")


def _default(name: str) -> str:
    table = [
        [f"{row['parameter']:g}", *_videos(row), speed(row)]
        for row in _rows(name)
        if "speed" in row
    ]
    header = ["recall", "delivered", "density", "PSNR dB, from noise", "PSNR dB, clips"]
    return markdown([*header, "attention calls"], table)


def warm_up(_: dict[str, Any]) -> str:
    """The default with the noisiest steps dense, and without."""
    found = _found("quality-warm-up")
    steps = found["setting"]["steps"]
    above = found["setting"]["dense_above"]
    dense = sum(level > above for level in noise_levels(steps, 1.0)[:-1]) / steps
    table = []
    for name, share, rows in (
        ("none", 0.0, _rows("quality")),
        (f"above {above:g}", dense, found["rows"]),
    ):
        for row in rows:
            if row["method"] == "planned, balanced":
                # Of videos from noise, where a run timed them apart.
                filtered = row.get("noise_speed", row["speed"])
                whole = 1 / (share + (1 - share) / filtered)
                table.append(
                    [name, f"{row['parameter']:g}", f"{row['noise_psnr']:.1f}",
                     speed({"speed": filtered}),
                     speed({"speed": whole})]
                )  # fmt: skip
    header = ["dense steps", "recall", "PSNR dB, from noise", "filtered calls"]
    return markdown([*header, "attention of the whole generation"], table)


def orders(_: dict[str, Any]) -> str:
    """Density at recall .9 in each order, by clip, and of exact ranks."""
    grid, tile = [16, 32, 32], [128, 64]
    rows = [row for row in _rows("order") if (row["grid"], row["tile"]) == (grid, tile)]

    def mean(name: str, clip: int, way: str) -> float:
        mine = [row[way] for row in rows if (row["order"], row["clip"]) == (name, clip)]
        return statistics.mean(mine)

    table = []
    for name in dict.fromkeys(row["order"] for row in rows):
        cells = []
        for way in ("planned", "exact"):
            for clip in (0, 1):
                ratio = mean(name, clip, way) / mean("raster", clip, way) - 1
                cells.append(f"{mean(name, clip, way):.3f}, {100 * ratio:+.0f} %")
        table.append([name, *cells])
    header = [f"clip {clip}, {way}" for way in ("planned", "exact ranks") for clip in (0, 1)]
    return markdown(["order", *header], table)


def order_videos(_: dict[str, Any]) -> str:
    """Videos in three orders."""
    table = [
        [row["order"], f"{row['parameter']:.2f}", *_videos(row)]
        for row in _found("order")["quality"]
    ]
    header = ["order", "recall", "delivered", "density", "PSNR dB, from noise", "PSNR dB, clips"]
    return markdown(header, table)


def calibration(_: dict[str, Any]) -> str:
    """A calibrated policy on other inputs."""
    table = []
    for row in _rows("calibration"):
        dense = "worst_error" not in row
        name = row["name"] + (f", {row['recall']}" if row.get("recall") else "")
        errors = ["", ""]
        if not dense:
            errors = [f"{row['calibration_error']:.4f}", f"{row['worst_error']:.4f}"]
        table.append(
            [name, f"{row['predicted_time']:.3f}", *errors, f"{row['step_ms']:.2f} ms", speed(row)]
        )
    header = ["policy", "predicted attention time", "error, calibrated on", "elsewhere, at most"]
    return markdown([*header, "a step", ""], table)


def _variants() -> dict[str, dict[float, dict[str, Any]]]:
    found: dict[str, dict[float, dict[str, Any]]] = {}
    for row in _rows("variants"):
        found.setdefault(row["variant"], {})[row["target"]] = row
    return found


def curve(_: dict[str, Any]) -> str:
    """The default filter by recall: sampled video against dense."""
    rows = sorted(_variants()[DEFAULT_VARIANT].items(), reverse=True)
    table = [[f"{target:.2f}", *_videos(row)] for target, row in rows]
    header = ["recall", "delivered", "density", "PSNR dB, from noise", "PSNR dB, real clips"]
    return markdown(header, table)


def variants(_: dict[str, Any]) -> str:
    """Each variant of the filter beside the default, and what it gains at the same density."""
    found = _variants()
    ruler = found[DEFAULT_VARIANT]
    table = []
    for name, rows in sorted(found.items(), key=lambda item: item[0] != DEFAULT_VARIANT):
        for target, row in sorted(rows.items(), reverse=True):
            if target not in VARIANT_RECALLS:
                continue
            gains = [_gain(ruler, row, kind) for kind in ("noise", "clip")]
            table.append([name, f"{target:.2f}", *_videos(row), *gains])
    header = ["variant", "recall", "delivered", "density", "from noise, dB", "clips, dB"]
    return markdown([*header, "from noise, at equal density", "clips, at equal density"], table)


def _gain(ruler: dict[float, dict[str, Any]], row: dict[str, Any], kind: str) -> str:
    """PSNR over that of the default on the same videos and at the same density.

    Between the default's measured points.
    """
    mine = row[f"{kind}_psnrs"]
    points = sorted(
        (known["density"], statistics.mean(known[f"{kind}_psnrs"][: len(mine)]))
        for known in ruler.values()
    )
    for (d0, p0), (d1, p1) in pairwise(points):
        if d0 <= row["density"] <= d1:
            expected = p0 + (p1 - p0) * (row["density"] - d0) / (d1 - d0)
            return f"{statistics.mean(mine) - expected:+.1f}"
    return "outside"


TABLES: Final[dict[str, Callable[[dict[str, Any]], str]]] = {
    "recalls": recalls,
    "curve": curve,
    "quality": quality,
    "quality_short": quality_short,
    "quality_grid": quality_grid,
    "quality_32k": quality_32k,
    "warm_up": warm_up,
    "orders": orders,
    "order_videos": order_videos,
    "calibration": calibration,
    "variants": variants,
}
