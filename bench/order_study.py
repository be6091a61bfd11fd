"""Token orders compared on learned attention: tiles that must be kept for one delivered recall.

    python bench/order_study.py [--quality] [--out bench/results/order.json] [--plot order.png]

q and k of all self attentions of the trained tiny Wan on two real clips, three noise levels and
several grids are cut into tiles in one order after another. Of a random sample of query tiles the
exact energies are computed, the plan's ranks from centroids beside them, and one threshold for
the whole model is set so that the delivered recall is the target, as ``Balanced`` does: the share
of tile pairs above it is the density. ``--quality`` samples whole videos in the orders that are
left over at the end, the model being run on reordered tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from learned import inputs
from quality import Study, add_setting, show
from token_order import cubes, hilbert, morton, reordered
from torch import Tensor

from cef_compile.kernels import config as c
from cef_compile.report.environment import environment

Grid = tuple[int, int, int]
Order = Callable[[Grid], Tensor]

GRIDS: tuple[Grid, ...] = ((16, 32, 32), (13, 30, 52), (1, 64, 64))
"""Frames, height and width: a video of powers of two, a ragged one, an image."""
LEVELS = (0.25, 0.5, 0.75)
CLIPS = (0, 1)
TILES = ((128, 64), (128, 128))
RECALL = 0.9
QUERY_TILES = 8
"""Sampled of each head."""


def raster(grid: Grid) -> Tensor:
    """As the tokens come."""
    return torch.arange(grid[0] * grid[1] * grid[2])


def cube(*block: int) -> Order:
    """By cubes of one size; of as many tokens, 8 rows high, where there is a single frame."""
    frames, height, width = block

    def order(grid: Grid) -> Tensor:
        # An image has no frames to take: its cubes are wider by as much.
        flat = (1, 8, frames * height * width // 8)
        return cubes(grid, flat if grid[0] == 1 else (frames, height, width))

    return order


SHIPPED: Order = lambda grid: cubes(grid, c.IMAGE_CUBE if grid[0] == 1 else c.VIDEO_CUBE)  # noqa: E731

ORDERS: dict[str, tuple[Order, Order]] = {
    "raster": (raster, raster),
    "4x4x4": (SHIPPED, SHIPPED),
    "2x4x8": (cube(2, 4, 8), cube(2, 4, 8)),
    "2x8x4": (cube(2, 8, 4), cube(2, 8, 4)),
    "8x4x2": (cube(8, 4, 2), cube(8, 4, 2)),
    "8x2x4": (cube(8, 2, 4), cube(8, 2, 4)),
    "16x2x2": (cube(16, 2, 2), cube(16, 2, 2)),
    "1x8x8": (cube(1, 8, 8), cube(1, 8, 8)),
    "8x8x8": (cube(8, 8, 8), cube(8, 8, 8)),
    "Morton": (morton, morton),
    "Hilbert": (hilbert, hilbert),
    "queries 4x4x8, keys 4x4x4": (cube(4, 4, 8), SHIPPED),
    "queries 8x4x4, keys 4x4x4": (cube(8, 4, 4), SHIPPED),
    "queries 2x8x8, keys 4x4x4": (cube(2, 8, 8), SHIPPED),
    "queries Hilbert, keys 4x4x4": (hilbert, SHIPPED),
    "queries raster, keys 4x4x4": (raster, SHIPPED),
    "queries 4x4x4, keys raster": (SHIPPED, raster),
}
"""By name: the order of queries and that of keys."""
QUALITY_ORDERS = ("raster", "4x4x4", "8x4x2", "16x2x2", "Morton", "Hilbert")
"""Those that whole videos can be sampled in: queries and keys in one order."""
QUALITY_RECALLS = (0.95, 0.9, 0.86)


def tiled(x: Tensor, block: int) -> Tensor:
    """``[..., L]`` cut into ``[..., tiles, block]``, the last one filled up with zeros."""
    number = c.tiles(x.shape[-1], block)
    return F.pad(x, (0, number * block - x.shape[-1])).unflatten(-1, (number, block))


def density(q: Tensor, k: Tensor, block_m: int, block_n: int, recall: float) -> dict[str, float]:
    """The density at which tiles ranked by the plan, and by exact shares, deliver ``recall``.

    Args:
        q, k: ``[1, H, tokens, D]`` in their orders.
        block_m, block_n: query rows and keys of a tile.
        recall: mean over the sampled rows of all heads.
    """
    scale = q.shape[-1] ** -0.5
    tiles = q.shape[2] // block_m  # whole query tiles alone: every one has as many rows
    draw = torch.Generator().manual_seed(0)
    ranks: dict[str, list[Tensor]] = {"planned": [], "exact": []}
    energies = []
    for head in range(q.shape[1]):
        keys = k[0, head].float()
        count = tiled(torch.ones_like(keys[:, 0]), block_n).sum(-1)
        mean = tiled(keys.T, block_n).sum(-1).T / count[:, None]
        square = tiled(keys.square().T, block_n).sum(-1).T / count[:, None]
        spread = (square - mean.square()).clamp_min(0)
        for tile in torch.randperm(tiles, generator=draw)[:QUERY_TILES].tolist():
            rows = q[0, head, tile * block_m : (tile + 1) * block_m].float()
            some = rows[:: c.PLAN_ROW_STRIDE]
            planned = scale * some @ mean.T + scale**2 / 2 * some.square() @ spread.T
            ranks["planned"].append((planned + count.log()).softmax(-1).amax(0))
            shares = tiled((scale * rows @ keys.T).softmax(-1), block_n).sum(-1)
            ranks["exact"].append(shares.amax(0))
            energies.append(shares.mean(0))
    energy = torch.cat(energies)
    found = {}
    for name, parts in ranks.items():
        order = torch.cat(parts).argsort(descending=True)
        gathered = energy[order].double().cumsum(0) / len(energies)
        found[name] = int((gathered < recall).sum() + 1) / len(energy)
    return found


def densities(given: argparse.Namespace, device: torch.device) -> Iterator[dict[str, Any]]:
    """A row for each grid, clip, noise level, tile and order."""
    for grid in given.grids:
        for clip in CLIPS[: given.clips]:
            for level in LEVELS[: given.levels]:
                q, k, _ = inputs(grid, device, clip=clip, level=level)
                for name, (query, key) in ORDERS.items():
                    at = [order(grid).to(device) for order in (query, key)]
                    moved = [x.index_select(2, index) for x, index in zip((q, k), at, strict=True)]
                    for block_m, block_n in TILES:
                        yield {
                            "order": name, "grid": list(grid), "clip": clip, "level": level,
                            "tile": [block_m, block_n],
                            **density(*moved, block_m, block_n, RECALL),
                        }  # fmt: skip


def qualities(given: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Sampled videos in each order: the model runs on tokens in it, the filter as they come."""
    given.raster = True
    study = Study(given)
    side = given.size // 8
    for name in given.orders:
        order = ORDERS[name][0]((given.frames, side, side)).to(study.device)
        for recall in given.recalls:
            with reordered(study.model, order):
                yield {"order": name, **study.row("planned, balanced", recall, 1.0)}


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean density of each order by grid and tile, and its ratio to raster order."""
    table = []
    groups = dict.fromkeys((tuple(row["grid"]), tuple(row["tile"])) for row in rows)
    for grid, tile in groups:
        for name in ORDERS:
            mine = [
                row
                for row in rows
                if (tuple(row["grid"]), tuple(row["tile"]), row["order"]) == (grid, tile, name)
            ]
            line = {"order": name, "grid": list(grid), "tile": list(tile)}
            line |= {way: statistics.mean(row[way] for row in mine) for way in ("planned", "exact")}
            table.append(line)
    for line in table:
        base = next(
            other["planned"]
            for other in table
            if (other["order"], other["grid"], other["tile"])
            == ("raster", line["grid"], line["tile"])
        )
        line["of_raster"] = line["planned"] / base
    return table


def plot(table: list[dict[str, Any]], path: Path) -> None:
    """Bars of density against raster order, a panel for each grid."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    grids = list(dict.fromkeys(tuple(line["grid"]) for line in table))
    figure, panels = plt.subplots(
        1, len(grids), figsize=(4.2 * len(grids), 4.6), sharey=True, squeeze=False
    )
    for panel, grid in zip(panels[0], grids, strict=True):
        for number, tile in enumerate(TILES):
            mine = [
                line for line in table if (tuple(line["grid"]), tuple(line["tile"])) == (grid, tile)
            ]
            places = [i + 0.4 * number - 0.2 for i in range(len(mine))]
            panel.barh(
                places, [100 * (line["of_raster"] - 1) for line in mine], height=0.38,
                color=("#3a7fc0", "#d9822b")[number], label=f"tiles of {tile[0]} x {tile[1]}",
            )  # fmt: skip
        panel.set_yticks(range(len(ORDERS)), list(ORDERS))
        panel.set_title(" x ".join(map(str, grid)))
        panel.set_xlabel("density against raster order, %")
        panel.axvline(0, color="black", linewidth=0.8)
        panel.invert_yaxis()
    panels[0][-1].legend(loc="center right")
    figure.suptitle(f"Key tiles that deliver a recall of {RECALL:.2f}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def parse_grid(text: str) -> Grid:
    """``"16x32x32"``."""
    frames, height, width = map(int, text.split("x"))
    return frames, height, width


@torch.no_grad()
def main() -> None:
    """Run the study, and write its rows and their summary."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--grids", nargs="+", type=parse_grid, default=list(GRIDS))
    parser.add_argument("--levels", type=int, default=len(LEVELS), help="how many noise levels")
    parser.add_argument("--quality", action="store_true", help="sample videos too")
    parser.add_argument("--orders", nargs="+", choices=QUALITY_ORDERS, default=QUALITY_ORDERS)
    parser.add_argument("--recalls", nargs="+", type=float, default=QUALITY_RECALLS)
    add_setting(parser)
    parser.add_argument("--dense-above", type=float, default=1.0, help="noise level of warm-up")
    parser.add_argument("--plot", type=Path, help="write a picture (needs matplotlib)")
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).parent / "results" / "order.json"
    )
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = list(densities(given, device))
    found: dict[str, Any] = {
        "environment": environment(), "recall": RECALL, "summary": summary(rows), "rows": rows,
    }  # fmt: skip
    for line in found["summary"]:
        grid, tile = ("x".join(map(str, line[name])) for name in ("grid", "tile"))
        print(
            f"{grid:10} {tile:8} {line['order']:30} density {line['planned']:.3f}"
            f" ({100 * (line['of_raster'] - 1):+.1f} %), exact ranks {line['exact']:.3f}",
            flush=True,
        )
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps(found, indent=1) + "\n")
    if given.plot:
        plot(found["summary"], given.plot)
    if given.quality:
        found["quality"] = []
        for line in qualities(given):
            found["quality"].append(line)
            print(f"{line['order']:10}", show({k: v for k, v in line.items() if k != "order"}))
            given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
