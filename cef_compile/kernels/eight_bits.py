"""Queries and keys in 8 bits, for engines that compute the scores of kept tiles in INT8.

A pass of its own after that over the keys: their mean, which is subtracted, is known only when all
have been seen. Queries are done here too, not where the attention kernel loads its rows: here they
can be checked in Triton's interpreter, and there a row's scale would have to change threads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from cef_compile.kernels import config as c

_WARPS = 4
_LEAST = tl.constexpr(c.INT8_LEAST)
_MEAN_TILES = 64
"""Means of tiles that are read in one step."""


@dataclass(frozen=True)
class EightBits:
    """Queries and keys as integers up to 127.

    A score, ``scale * q . k``, is about ``scale * row_scale * key_scale * q8 . k8 + row_shift``.

    Attributes:
        q: int8 ``[B, H, q_len, D]``, contiguous.
        row_scale: float32 ``[B, H, q_len]``, size of a unit; NaN where a row is not finite.
        row_shift: float32 ``[B, H, q_len]``, what the keys' mean adds to every score of a row.
        k: int8 ``[B, Hk, kv_len, D]``, contiguous, less the mean of the visible keys; 0 where
            hidden.
        key_scale: float32 ``[B, Hk, Tn]``, size of a unit in a tile; NaN where a visible key is not
            finite.
    """

    q: Tensor
    row_scale: Tensor
    row_shift: Tensor
    k: Tensor
    key_scale: Tensor


def eight_bits(
    q: Tensor, k: Tensor, stats: Tensor, count: Tensor, *, scale: float, key_mask: Tensor | None
) -> EightBits:
    """Round q and k to 8 bits.

    Args:
        q: ``[B, H, q_len, D]``; k ``[B, Hk, kv_len, D]``; any strides, ``D`` a power of two.
        stats: ``[B, Hk, Tn, >= D]``, begins with the mean of each tile's visible keys.
        count: int32 ``[B or 1, Tn]``, visible keys of each tile, one at least.
        scale: factor of the scores.
        key_mask: bool ``[B or 1, kv_len]``, any strides.
    """
    batch, heads, q_len, dim = q.shape
    _, key_heads, kv_len, _ = k.shape
    n_n = c.tiles(kv_len, c.BLOCK_N)
    mean = torch.empty(batch, key_heads, dim, dtype=torch.float32, device=q.device)
    rows = torch.empty(batch, heads, q_len, dim, dtype=torch.int8, device=q.device)
    row_scale, row_shift = torch.empty(2, batch, heads, q_len, device=q.device)
    keys = torch.empty(batch, key_heads, kv_len, dim, dtype=torch.int8, device=q.device)
    key_scale = torch.empty(batch, key_heads, n_n, device=q.device)
    if rows.numel() and keys.numel():
        _mean[(key_heads, batch)](
            stats,
            count,
            mean,
            n_n,
            count.stride(0) if count.shape[0] > 1 else 0,
            stats.shape[3],
            DIM=dim,
            TILES=_MEAN_TILES,
            num_warps=_WARPS,
        )
        _keys[(n_n, key_heads, batch)](
            k,
            mean,
            k if key_mask is None else key_mask,
            keys,
            key_scale,
            kv_len,
            *k.stride(),
            *c.mask_strides(key_mask),
            DIM=dim,
            BLOCK_N=c.BLOCK_N,
            HAS_MASK=key_mask is not None,
            LIMIT=c.INT8_LIMIT,
            num_warps=_WARPS,
        )
        _rows[(c.tiles(q_len, c.BLOCK_N), heads, batch)](
            q,
            mean,
            rows,
            row_scale,
            row_shift,
            q_len,
            heads // key_heads,
            scale,
            *q.stride(),
            DIM=dim,
            ROWS=c.BLOCK_N,
            LIMIT=c.INT8_LIMIT,
            num_warps=_WARPS,
        )
    return EightBits(rows, row_scale, row_shift, keys, key_scale)


@triton.jit(do_not_specialize=["n_n", "count_b"])
def _mean(
    stats, count, mean, n_n, count_b, width, DIM: tl.constexpr, TILES: tl.constexpr
):  # fmt: skip
    """Mean of the visible keys, from those of their tiles. One program per (key head, batch)."""
    head, batch = tl.program_id(0), tl.program_id(1)
    at = batch.to(tl.int64) * tl.num_programs(0) + head
    stats += at * n_n * width
    count += batch.to(tl.int64) * count_b
    dims = tl.arange(0, DIM)
    total = tl.zeros([DIM], tl.float32)
    found = 0
    for first in range(0, n_n, TILES):
        tile = first + tl.arange(0, TILES)
        real = tile < n_n
        keys = tl.load(count + tile, mask=real, other=0)
        where = tile.to(tl.int64)[:, None] * width + dims[None, :]
        means = tl.load(stats + where, mask=real[:, None], other=0.0).to(tl.float32)
        total += tl.sum(means * keys.to(tl.float32)[:, None], 0)
        found += tl.sum(keys, 0)
    tl.store(mean + at * DIM + dims, total / tl.maximum(found, 1).to(tl.float32))


@triton.jit
def _unit(largest, LIMIT: tl.constexpr):
    """Size of a unit; not 0, for what is divided by it."""
    return tl.maximum(largest, _LEAST) * (1.0 / LIMIT)


@triton.jit
def _rounded(value, unit):
    """Numbers of units, half upwards; 0 for what is not finite."""
    whole = tl.floor(value * (1.0 / unit) + 0.5)
    return tl.where(value - value == 0.0, whole, 0.0).to(tl.int8)


@triton.jit(do_not_specialize=["kv_len"])
def _keys(
    k, mean, key_mask, keys, key_scale, kv_len, k_b, k_h, k_l, k_d, mask_b, mask_l,
    DIM: tl.constexpr, BLOCK_N: tl.constexpr, HAS_MASK: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """One program per (key tile, key head, batch)."""
    tile, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch_head = batch.to(tl.int64) * tl.num_programs(1) + head
    row = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, DIM)
    inside = row < kv_len
    seen = inside
    if HAS_MASK:
        at = batch.to(tl.int64) * mask_b + row.to(tl.int64) * mask_l
        seen = seen & (tl.load(key_mask + at, mask=seen, other=0) != 0)
    first = batch.to(tl.int64) * k_b + head.to(tl.int64) * k_h
    at = row.to(tl.int64)[:, None] * k_l + dims.to(tl.int64)[None, :] * k_d
    value = tl.load(k + first + at, mask=seen[:, None], other=0.0).to(tl.float32)
    value = tl.where(seen[:, None], value - tl.load(mean + batch_head * DIM + dims)[None, :], 0.0)
    unit = _unit(tl.max(tl.max(tl.abs(value), 1), 0), LIMIT)
    # Of finite numbers this is 0, of others NaN.
    nothing = tl.sum(tl.sum(value - value, 1), 0)
    tl.store(key_scale + batch_head * tl.num_programs(0) + tile, unit + nothing)
    to = (batch_head * kv_len + row)[:, None] * DIM + dims[None, :]
    tl.store(keys + to, _rounded(value, unit), mask=inside[:, None])


@triton.jit(do_not_specialize=["q_len", "heads_per_key_head"])
def _rows(
    q, mean, rows, row_scale, row_shift, q_len, heads_per_key_head, scale, q_b, q_h, q_l, q_d,
    DIM: tl.constexpr, ROWS: tl.constexpr, LIMIT: tl.constexpr,
):  # fmt: skip
    """One program per (64 rows, head, batch)."""
    head, batch = tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1)
    batch_head = batch.to(tl.int64) * heads + head
    key_heads = heads // heads_per_key_head
    key_head = batch.to(tl.int64) * key_heads + head // heads_per_key_head
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    dims = tl.arange(0, DIM)
    inside = row < q_len
    first = batch.to(tl.int64) * q_b + head.to(tl.int64) * q_h
    at = row.to(tl.int64)[:, None] * q_l + dims.to(tl.int64)[None, :] * q_d
    value = tl.load(q + first + at, mask=inside[:, None], other=0.0).to(tl.float32)
    unit = _unit(tl.max(tl.abs(value), 1), LIMIT)
    shift = scale * tl.sum(value * tl.load(mean + key_head * DIM + dims)[None, :], 1)
    at = batch_head * q_len + row
    tl.store(row_scale + at, unit + tl.sum(value - value, 1), mask=inside)
    tl.store(row_shift + at, shift, mask=inside)
    tl.store(
        rows + at[:, None] * DIM + dims[None, :],
        _rounded(value, unit[:, None]),
        mask=inside[:, None],
    )
