"""Times of the engines of the attention over lists beside cuDNN's dense attention, as JSON.

    python bench/engines.py [--out bench/results/engines.json]

All engines have the same lists, and take turns, since a card that is hot is slower. "uneven" lists
have between 1 and half of all tiles. FlashAttention-4 is among them where it is installed, too with
its own 128 x 128 tiles, on lists of pairs of tiles, which "hopper" gets too.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from cef_compile.kernels import config as c
from cef_compile.kernels import hopper
from cef_compile.kernels.attend import attend as triton_attend
from cef_compile.kernels.engines import Call, lacks
from cef_compile.kernels.tuning import find_tuning

SHAPES = ((24, 32256, 128), (24, 32256, 64))
DENSITIES = (1.0, 0.4, 0.18)
UNEVEN = "uneven"
ROUNDS, RUNS = 2, 5
FLUSH_BYTES = 1 << 28  # overwritten before each run: empties the L2
Row = dict[str, object]


def lists(heads: int, length: int, density: float | str, keys: int) -> tuple[Tensor, Tensor]:
    """Index int16 and count int32 of random lists of tiles of ``keys`` keys, as tiles of 64."""
    draw = torch.Generator("cuda").manual_seed(1)
    n_m, n_n = c.tiles(length, c.BLOCK_M), c.tiles(length, keys)
    if density == UNEVEN:
        share = torch.rand(1, heads, n_m, device="cuda", generator=draw) ** 2
        count = (0.54 * n_n * share).round().clamp(1).int()
    else:
        count = torch.full((1, heads, n_m), round(density * n_n), device="cuda").int()
    order = torch.rand(1, heads, n_m, n_n, device="cuda", generator=draw).argsort(-1)
    listed = torch.arange(n_n, device="cuda") < count[..., None]
    index = torch.where(listed, order, n_n).sort(-1).values.clamp(max=n_n - 1)
    parts = keys // c.BLOCK_N
    index = (parts * index[..., None] + torch.arange(parts, device="cuda")).flatten(-2)
    return index.to(torch.int16).contiguous(), torch.stack([parts * count] * 2).contiguous()


def calls(
    q: Tensor, k: Tensor, v: Tensor, index: Tensor, count: Tensor, keys: int
) -> dict[str, Callable[[], object]]:
    """A call for each engine."""
    dim = q.shape[3]
    scale = dim**-0.5
    order = count[0].argsort(dim=-1, descending=True, stable=True).int().contiguous()
    tuning = find_tuning(90, dim, wide=False)
    assert tuning is not None

    def dense() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(q, k, v)

    def plain() -> object:
        return triton_attend(
            q, k, v, index, count, order, scale=scale, descriptors=True,
            rows=tuning.attend_rows, warps=tuning.attend_warps, stages=tuning.attend_stages,
        )  # fmt: skip

    found: dict[str, Callable[[], object]] = {"cuDNN": dense}
    if keys == c.BLOCK_N:
        found["triton"] = plain
    found["hopper"] = lambda: hopper.attend(q, k, v, index, count, order, scale=scale)
    if not lacks("fa4", Call(90, q.dtype, dim, dim)):
        from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
        from flash_attn.cute.interface import _flash_attn_fwd

        parts = keys // c.BLOCK_N
        listed = (count[0] // parts).contiguous()
        none = torch.zeros_like(listed)
        tiles = BlockSparseTensorsTorch(
            none, none[..., None], listed, (index[..., ::parts] // parts).int().contiguous(),
            block_size=(c.BLOCK_M, keys),
        )  # fmt: skip
        rows = [t.transpose(1, 2) for t in (q, k, v)]
        found["fa4"] = lambda: _flash_attn_fwd(
            *rows, softmax_scale=scale, tile_mn=(c.BLOCK_M, keys), block_sparse_tensors=tiles,
            return_lse=True,
        )  # fmt: skip
    return found


def timed(functions: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median milliseconds of each."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(ROUNDS):
        for name, function in functions.items():
            function()
            for _ in range(RUNS):
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                flush.zero_()
                begin.record()
                function()
                end.record()
                end.synchronize()
                times[name].append(begin.elapsed_time(end))
    return {name: statistics.median(found) for name, found in times.items()}


def rows() -> Iterator[Row]:
    for heads, length, dim in SHAPES:
        draw = torch.Generator("cuda").manual_seed(0)
        q, k, v = (
            torch.randn(
                1, length, heads, dim, device="cuda", dtype=torch.bfloat16, generator=draw
            ).transpose(1, 2)
            for _ in range(3)
        )
        for keys in (c.BLOCK_N, 2 * c.BLOCK_N):
            for density in (*DENSITIES, UNEVEN):
                index, count = lists(heads, length, density, keys)
                found = timed(calls(q, k, v, index, count, keys))
                for name, ms in found.items():
                    yield {
                        "engine": name,
                        "shape": f"{heads} x {length} x {dim}",
                        "tile_keys": keys,
                        "density": density,
                        "ms": round(ms, 3),
                        "speed": round(found["cuDNN"] / ms, 2),
                    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bench/results/engines.json"))
    arguments = parser.parse_args()
    about = {
        "card": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cudnn": torch.backends.cudnn.version(),
        "dtype": "bfloat16",
    }
    found = []
    for row in rows():
        print(row, flush=True)
        found.append(row)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps({"about": about, "results": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
