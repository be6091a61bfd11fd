"""Times of the engines of the attention over lists beside dense attention, as JSON.

    python bench/engines.py [--turn SECONDS] [--out bench/results]

All engines have the same lists, and take turns with each other and with the dense attention of
cuDNN, FlashAttention-2 and, where it is installed, FlashAttention-4; "mhz" is the clock that the
card had in them, as far as it is read. "uneven" lists have between 1 and half of all tiles. Lists
of 128 keys are of pairs of tiles, which FlashAttention-4 takes as its own tiles. Beside each time
is the largest error against float64 on the same tiles, of two query tiles. The time of
"hopper-int8" includes making q and k 8 bits, which is beside it alone too.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from measure import (
    Row,
    about,
    card,
    dense,
    error,
    inputs,
    list_engines,
    median_ms,
    over_lists,
    settled_by_turns,
    version,
)
from torch import Tensor

from cef_compile.kernels import config as c
from cef_compile.kernels.centroids import centroids
from cef_compile.kernels.eight_bits import eight_bits
from cef_compile.kernels.ranks import variance_factor
from cef_compile.kernels.schedule import Lists

SHAPES = ((24, 32256, 128), (24, 16384, 128), (24, 32256, 64), (24, 32256, 96))
DENSITIES = (1.0, 0.4, 0.18)
UNEVEN = "uneven"
TURN_S = 0.6
"""Long enough for the clock to settle in the first half."""
INT8 = "hopper-int8"
TILES = (c.BLOCK_N, 2 * c.BLOCK_N)
"""Keys of what is listed."""


def lists(heads: int, length: int, density: float | str, keys: int) -> Lists:
    """Random lists of tiles of ``keys`` keys, as lists of tiles of ``BLOCK_N``."""
    draw = torch.Generator("cuda").manual_seed(1)
    n_m, n_n = c.tiles(length, c.BLOCK_M), c.tiles(length, keys)
    if density == UNEVEN:
        share = torch.rand(1, heads, n_m, device="cuda", generator=draw) ** 2
        count = (0.54 * n_n * share).round().clamp(1).int()
    else:
        count = torch.full((1, heads, n_m), round(density * n_n), device="cuda").int()
    shuffled = torch.rand(1, heads, n_m, n_n, device="cuda", generator=draw).argsort(-1)
    listed = torch.arange(n_n, device="cuda") < count[..., None]
    index = torch.where(listed, shuffled, n_n).sort(-1).values.clamp(max=n_n - 1)
    parts = keys // c.BLOCK_N
    index = (parts * index[..., None] + torch.arange(parts, device="cuda")).flatten(-2)
    order = count.argsort(dim=-1, descending=True, stable=True)
    order = order + n_m * torch.arange(heads, device="cuda")[:, None]
    count = torch.stack([parts * count] * 2).contiguous()
    queue = torch.zeros(1, dtype=torch.int32, device="cuda")
    return Lists(index.to(torch.int16).contiguous(), count, order.flatten().int(), queue, None)


def fa4(q: Tensor, k: Tensor, v: Tensor, listed: Lists, keys: int) -> Callable[[], Tensor]:
    """FlashAttention-4 over tiles of ``keys`` keys; its form of the lists is made beforehand."""
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    from flash_attn.cute.interface import _flash_attn_fwd

    parts = keys // c.BLOCK_N
    count = (listed.count[0] // parts).contiguous()
    none = torch.zeros_like(count)
    tiles = BlockSparseTensorsTorch(
        mask_block_cnt=none,
        mask_block_idx=none[..., None],
        full_block_cnt=count,
        full_block_idx=(listed.index[..., ::parts] // parts).int().contiguous(),
        block_size=(c.BLOCK_M, keys),
    )
    rows = [t.transpose(1, 2) for t in (q, k, v)]

    def call() -> Tensor:
        out = _flash_attn_fwd(
            *rows, softmax_scale=q.shape[3] ** -0.5, tile_mn=tiles.block_size,
            block_sparse_tensors=tiles, return_lse=True,
        )[0]  # fmt: skip
        return out.transpose(1, 2)

    return call


def rows(turn_s: float) -> Iterator[Row]:
    """A row for each dense attention and each engine, by shape and density."""
    for heads, length, dim in SHAPES:
        q, k, v = inputs(heads, length, dim)
        scale = dim**-0.5
        known = centroids(k, variance_factor=variance_factor(scale))
        rounding = partial(eight_bits, q, k, known.stats, known.count, scale=scale, key_mask=None)
        for density in (*DENSITIES, UNEVEN):
            given = {keys: lists(heads, length, density, keys) for keys in TILES}
            calls: dict[tuple[str, int | None], Callable[[], Tensor]] = {
                (name, None): call for name, call in dense(q, k, v).items()
            }
            for keys, listed in given.items():
                for name in list_engines(q, dim):
                    by = fa4(q, k, v, listed, keys) if name == "fa4" else None
                    calls[name, keys] = by or partial(over_lists, name, q, k, v, listed, known)
            times = settled_by_turns(calls, turn_s)
            rounding_ms = round(median_ms(rounding), 3) if (INT8, TILES[0]) in calls else None
            for (name, keys), found in times.items():
                tiles = () if keys is None else (given[keys].index, given[keys].count[0])
                yield {
                    "engine": name,
                    "shape": f"{heads} x {length} x {dim}",
                    "tile_keys": keys,
                    "density": density,
                    "ms": round(found.ms, 3),
                    "mhz": found.mhz,
                    "speed": round(times["cuDNN", None].ms / found.ms, 2),
                    "error": error(q, k, v, calls[name, keys](), *tiles),
                    **({"rounding_ms": rounding_ms} if name == INT8 else {}),
                    **version(name),
                }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--turn", type=float, default=TURN_S, help="seconds of a turn")
    given = parser.parse_args()
    out = given.out
    found = {"about": {**about(), "turn_s": given.turn}, "results": []}
    print(found["about"], flush=True)
    out.mkdir(parents=True, exist_ok=True)
    for row in rows(given.turn):
        print(row, flush=True)
        found["results"].append(row)
        (out / f"engines-{card()}.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
