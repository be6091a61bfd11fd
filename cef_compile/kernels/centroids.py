"""Step 1 of the planned filter: mean and per-channel variance of every tile, one pass over k."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from cef_compile.kernels import config as c

_WARPS = 4


@dataclass(frozen=True)
class Centroids:
    """What the planned filter knows of the key tiles.

    Attributes:
        stats: ``[B, Hk, Tn, W]`` in the dtype of the keys: the mean of the visible keys in
            ``[..., :D]`` and, where asked for, their per-channel variance times the factor in
            ``[..., P : P + D]`` with P the power of two that holds D; zeros elsewhere. Side by
            side, so that one matrix product serves both terms of the plan.
        count: number of visible keys, int32 ``[B or 1, Tn]``.
    """

    stats: Tensor
    count: Tensor


def centroids(
    x: Tensor, key_mask: Tensor | None = None, *, variance_factor: float | None = None
) -> Centroids:
    """Mean, and with ``variance_factor`` scaled variance, of each tile of ``BLOCK_N`` rows of x.

    Sums are fp32. The results keep the dtype of ``x`` so that the plan runs on tensor cores; the
    factor brings the variance into a range where fp16 neither overflows nor loses bits.

    Args:
        x: keys or values, ``[B, Hk, kv_len, D]``, any strides.
        key_mask: bool ``[B or 1, kv_len]``, any strides; rows outside it take no part.
        variance_factor: factor of the stored variance, None for the mean alone.
    """
    batch, heads, kv_len, dim = x.shape
    n_n = c.tiles(kv_len, c.BLOCK_N)
    block_d = c.padded_dim(dim)
    width = block_d if variance_factor is None else 2 * block_d
    stats = x.new_empty(batch, heads, n_n, width)
    count_batch = 1 if key_mask is None else key_mask.shape[0]
    count = torch.zeros(count_batch, n_n, dtype=torch.int32, device=x.device)
    if stats.numel():
        _centroids[(n_n, heads, batch)](
            x,
            stats,
            count,
            x if key_mask is None else key_mask,
            kv_len,
            count_batch,
            0.0 if variance_factor is None else variance_factor,
            *x.stride(),
            0 if key_mask is None or count_batch == 1 else key_mask.stride(0),
            0 if key_mask is None else key_mask.stride(1),
            DIM=dim,
            BLOCK_D=block_d,
            BLOCK_N=c.BLOCK_N,
            HAS_MASK=key_mask is not None,
            HAS_VARIANCE=variance_factor is not None,
            num_warps=_WARPS,
        )
    return Centroids(stats, count)


@triton.jit(do_not_specialize=["kv_len", "count_batch"])
def _centroids(
    x,
    stats,
    count,
    key_mask,
    kv_len,
    count_batch,
    variance_factor,
    x_b,
    x_h,
    x_l,
    x_d,
    mask_b,
    mask_l,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_MASK: tl.constexpr,
    HAS_VARIANCE: tl.constexpr,
):
    """One program per (key tile, key head, batch)."""
    tile, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n_n, heads = tl.num_programs(0), tl.num_programs(1)
    keys = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    dims = tl.arange(0, BLOCK_D)
    seen = keys < kv_len
    if HAS_MASK:
        at = batch.to(tl.int64) * mask_b + keys.to(tl.int64) * mask_l
        seen = seen & (tl.load(key_mask + at, mask=seen, other=0) != 0)
    used = seen[:, None] & (dims < DIM)[None, :]
    first = batch.to(tl.int64) * x_b + head.to(tl.int64) * x_h
    at = keys.to(tl.int64)[:, None] * x_l + dims.to(tl.int64)[None, :] * x_d
    rows = tl.load(x + first + at, mask=used, other=0.0).to(tl.float32)

    found = tl.sum(seen.to(tl.int32), 0)
    share = 1.0 / tl.maximum(found, 1).to(tl.float32)
    middle = tl.sum(rows, 0) * share
    WIDTH: tl.constexpr = 2 * BLOCK_D if HAS_VARIANCE else BLOCK_D
    stats += ((batch.to(tl.int64) * heads + head) * n_n + tile) * WIDTH
    tl.store(stats + dims, middle.to(stats.dtype.element_ty))
    if HAS_VARIANCE:
        off = tl.where(used, rows - middle[None, :], 0.0)
        spread = tl.sum(off * off, 0) * (share * variance_factor)
        tl.store(stats + BLOCK_D + dims, spread.to(stats.dtype.element_ty))
    if head == 0 and batch < count_batch:
        tl.store(count + batch * n_n + tile, found)
