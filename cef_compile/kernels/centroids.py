"""Step 1 of the planned filter: mean and per-channel variance of every tile, one pass over k.

With a token order the same pass writes k in that order; v follows in a pass of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from cef_compile.kernels import config as c
from cef_compile.kernels.order import Layout

_WARPS = 2
"""Of a program that finds moments: with 4, the pass takes up to 1.6 times as long (H100)."""
_COPY_WARPS = 1
"""Of a program that copies; as fast as with more, and faster for few heads."""
_ROWS = 64
"""Rows that one program moves."""


@dataclass(frozen=True)
class Centroids:
    """What the planned filter knows of the key tiles.

    Attributes:
        stats: ``[B, Hk, Tn, W]`` in the dtype of the keys: the mean of the visible keys in
            ``[..., :D]`` and, where asked for, their per-channel variance times the factor in
            ``[..., P : P + D]`` with P the power of two that holds D; zeros elsewhere. Side by
            side, so that one matrix product serves both terms of the plan.
        count: number of visible keys, int32 ``[B or 1, Tn]``.
        histogram: int64 ``[2, RANK_BINS]``, zeros for one plan to add to, since its programs have
            no order; None without variances.
    """

    stats: Tensor
    count: Tensor
    histogram: Tensor | None


@dataclass(frozen=True)
class Arranged:
    """Keys in the order of their tokens' places (:class:`Layout`), with their centroids.

    Attributes:
        k: contiguous ``[B, Hk, length, D]``, zeros where there is no token.
        key_mask: bool ``[B or 1, length]``; None where every position holds a visible token.
        tokens: int32 ``[length]``, the token at each position of the order, -1 where there is none.
        centroids: of the visible keys.
    """

    k: Tensor
    key_mask: Tensor | None
    tokens: Tensor
    centroids: Centroids


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
    made = _made(stats, count_batch, for_plan=variance_factor is not None)
    if stats.numel():
        _centroids[(n_n, heads, batch)](
            x,
            stats,
            made.count,
            made.count if made.histogram is None else made.histogram,
            x if key_mask is None else key_mask,
            kv_len,
            count_batch,
            0.0 if variance_factor is None else variance_factor,
            *x.stride(),
            *c.mask_strides(key_mask),
            DIM=dim,
            BLOCK_D=block_d,
            BLOCK_N=c.BLOCK_N,
            HAS_MASK=key_mask is not None,
            HAS_VARIANCE=variance_factor is not None,
            BINS=c.RANK_BINS,
            num_warps=_WARPS,
        )
    return made


def _made(stats: Tensor, count_batch: int, *, for_plan: bool) -> Centroids:
    """Memory of the results."""
    new = _new(stats)
    count = new(count_batch, stats.shape[2], dtype=torch.int32, device=stats.device)
    histogram = None
    if for_plan:
        histogram = new(2, c.RANK_BINS, dtype=torch.int64, device=stats.device)
    return Centroids(stats, count, histogram)


def _new(stats: Tensor) -> Callable[..., Tensor]:
    """What makes memory that the kernels fill, if there is any tile: then it need not be zeroed."""
    return torch.empty if stats.numel() else torch.zeros


def arrange(
    k: Tensor,
    key_mask: Tensor | None,
    layout: Layout,
    *,
    variance_factor: float | None = None,
) -> Arranged:
    """K in token order, and the centroids of its tiles there, in one pass.

    Args:
        k: ``[B, Hk, kv_len, D]``, any strides.
        key_mask: bool ``[B or 1, kv_len]``, any strides.
        layout: of the kv_len tokens.
        variance_factor: as for :func:`centroids`.
    """
    batch, heads, _, dim = k.shape
    n_n = c.tiles(layout.length, c.BLOCK_N)
    cube_frames, cube_height, cube_width = layout.cube
    block_d = c.padded_dim(dim)
    width = block_d if variance_factor is None else 2 * block_d
    new_k = k.new_empty(batch, heads, layout.length, dim)
    stats = k.new_empty(batch, heads, n_n, width)
    mask_batch = 1 if key_mask is None else key_mask.shape[0]
    made = _made(stats, mask_batch, for_plan=variance_factor is not None)
    tokens = torch.empty(layout.length, dtype=torch.int32, device=k.device)
    new_mask = None
    if key_mask is not None or layout.has_gap:
        new_mask = _new(stats)(mask_batch, layout.length, dtype=torch.bool, device=k.device)
    if stats.numel():
        _arrange[(n_n, heads, batch)](
            k,
            k if key_mask is None else key_mask,
            new_k,
            made.count if new_mask is None else new_mask,
            tokens,
            stats,
            made.count,
            made.count if made.histogram is None else made.histogram,
            layout.length,
            mask_batch,
            0.0 if variance_factor is None else variance_factor,
            layout.before,
            *layout.grid,
            layout.after,
            *k.stride(),
            *c.mask_strides(key_mask),
            DIM=dim,
            BLOCK_D=block_d,
            BLOCK_M=c.BLOCK_M,
            BLOCK_N=c.BLOCK_N,
            CUBE_FRAMES=cube_frames,
            CUBE_HEIGHT=cube_height,
            CUBE_WIDTH=cube_width,
            HAS_MASK=key_mask is not None,
            WRITE_MASK=new_mask is not None,
            HAS_VARIANCE=variance_factor is not None,
            BINS=c.RANK_BINS,
            num_warps=_WARPS,
        )
    return Arranged(new_k, new_mask, tokens, made)


def in_order(x: Tensor, tokens: Tensor, out: Tensor) -> None:
    """Write rows of x in token order, zeros where there is no token.

    Args:
        x: ``[B, Hk, kv_len, D]``, any strides.
        tokens: of :class:`Arranged`.
        out: contiguous ``[B, Hk, length, D]``, to be written.
    """
    batch, heads, length, dim = out.shape
    if out.numel():
        _in_order[(triton.cdiv(length, _ROWS), heads, batch)](
            x,
            tokens,
            out,
            length,
            *x.stride(),
            DIM=dim,
            BLOCK_D=c.padded_dim(dim),
            ROWS=_ROWS,
            num_warps=_COPY_WARPS,
        )


@triton.jit
def _clear(histogram, SIZE: tl.constexpr):
    """The first program zeroes what a later launch adds to: a launch less than to zero it alone."""
    if tl.program_id(0) + tl.program_id(1) + tl.program_id(2) == 0:
        tl.store(histogram + tl.arange(0, SIZE), tl.zeros([SIZE], tl.int64))


@triton.jit
def _store_moments(
    rows, used, seen, stats, at, variance_factor, BLOCK_D: tl.constexpr, HAS_VARIANCE: tl.constexpr
):
    """Store mean and scaled variance of a tile's visible rows, fp32; returns how many there are."""
    found = tl.sum(seen.to(tl.int32), 0)
    share = 1.0 / tl.maximum(found, 1).to(tl.float32)
    middle = tl.sum(rows, 0) * share
    WIDTH: tl.constexpr = 2 * BLOCK_D if HAS_VARIANCE else BLOCK_D
    dims = tl.arange(0, BLOCK_D)
    stats += at * WIDTH
    tl.store(stats + dims, middle.to(stats.dtype.element_ty))
    if HAS_VARIANCE:
        off = tl.where(used, rows - middle[None, :], 0.0)
        spread = tl.sum(off * off, 0) * (share * variance_factor)
        tl.store(stats + BLOCK_D + dims, spread.to(stats.dtype.element_ty))
    return found


@triton.jit(do_not_specialize=["kv_len", "count_batch"])
def _centroids(
    x,
    stats,
    count,
    histogram,
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
    BINS: tl.constexpr,
):
    """One program per (key tile, key head, batch)."""
    tile, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n_n, heads = tl.num_programs(0), tl.num_programs(1)
    if HAS_VARIANCE:
        _clear(histogram, 2 * BINS)
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

    found = _store_moments(
        rows, used, seen, stats, (batch.to(tl.int64) * heads + head) * n_n + tile,
        variance_factor, BLOCK_D, HAS_VARIANCE,
    )  # fmt: skip
    if head == 0 and batch < count_batch:
        tl.store(count + batch * n_n + tile, found)


@triton.jit
def _token_at(
    position,
    before,
    frames,
    height,
    width,
    after,
    CUBE_FRAMES: tl.constexpr,
    CUBE_HEIGHT: tl.constexpr,
    CUBE_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """The token at each ``position`` of an order, int32; -1 where there is none, or past the end.

    :func:`~cef_compile.kernels.order.token_order` as arithmetic: nothing is read and nothing is
    kept between calls, so that an order works for symbolic sizes and in CUDA graphs.
    """
    grid = frames * height * width
    rest = tl.minimum(position, grid - 1)
    slab = CUBE_FRAMES * height * width
    frame = rest // slab * CUBE_FRAMES
    rest = rest % slab
    deep = tl.minimum(frames - frame, CUBE_FRAMES)
    band = deep * CUBE_HEIGHT * width
    line = rest // band * CUBE_HEIGHT
    rest = rest % band
    high = tl.minimum(height - line, CUBE_HEIGHT)
    cube = deep * high * CUBE_WIDTH
    column = rest // cube * CUBE_WIDTH
    rest = rest % cube
    wide = tl.minimum(width - column, CUBE_WIDTH)
    frame += rest // (high * wide)
    line += rest // wide % high
    column += rest % wide
    token = before + (frame * height + line) * width + column

    exact = position - (grid + BLOCK_M - 1) // BLOCK_M * BLOCK_M
    beside = tl.where(exact < before, exact, grid + exact)
    beside = tl.where((exact >= 0) & (exact < before + after), beside, -1)
    return tl.where(position < grid, token, beside)


@triton.jit(
    do_not_specialize=[
        "length",
        "mask_batch",
        "before",
        "frames",
        "height",
        "width",
        "after",
    ]
)
def _arrange(
    k,
    key_mask,
    new_k,
    new_mask,
    tokens,
    stats,
    count,
    histogram,
    length,
    mask_batch,
    variance_factor,
    before,
    frames,
    height,
    width,
    after,
    k_b,
    k_h,
    k_l,
    k_d,
    mask_b,
    mask_l,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CUBE_FRAMES: tl.constexpr,
    CUBE_HEIGHT: tl.constexpr,
    CUBE_WIDTH: tl.constexpr,
    HAS_MASK: tl.constexpr,
    WRITE_MASK: tl.constexpr,
    HAS_VARIANCE: tl.constexpr,
    BINS: tl.constexpr,
):
    """One program per (key tile of the order, key head, batch)."""
    tile, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    n_n, heads = tl.num_programs(0), tl.num_programs(1)
    if HAS_VARIANCE:
        _clear(histogram, 2 * BINS)
    position = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    token = _token_at(
        position, before, frames, height, width, after,
        CUBE_FRAMES, CUBE_HEIGHT, CUBE_WIDTH, BLOCK_M,
    )  # fmt: skip
    # Each to its own place: a thread then computes one token, not those of all rows it holds.
    token = tl.gather(token, tl.arange(0, BLOCK_N), 0)
    real = token >= 0
    source = token.to(tl.int64)
    inside = position < length
    dims = tl.arange(0, BLOCK_D)
    first = batch.to(tl.int64) * k_b + head.to(tl.int64) * k_h
    at = source[:, None] * k_l + dims.to(tl.int64)[None, :] * k_d
    narrow = (dims < DIM)[None, :]
    keys = tl.load(k + first + at, mask=real[:, None] & narrow, other=0.0)
    row = (batch.to(tl.int64) * heads + head) * length + position
    tl.store(new_k + row[:, None] * DIM + dims[None, :], keys, mask=inside[:, None] & narrow)

    seen = real
    if HAS_MASK:
        at = batch.to(tl.int64) * mask_b + source * mask_l
        seen = seen & (tl.load(key_mask + at, mask=seen, other=0) != 0)
    used = seen[:, None] & narrow
    rows = tl.where(used, keys, 0.0).to(tl.float32)
    found = _store_moments(
        rows, used, seen, stats, (batch.to(tl.int64) * heads + head) * n_n + tile,
        variance_factor, BLOCK_D, HAS_VARIANCE,
    )  # fmt: skip
    if head == 0 and batch == 0:
        tl.store(tokens + position, token, mask=inside)
    if head == 0 and batch < mask_batch:
        tl.store(count + batch * n_n + tile, found)
        if WRITE_MASK:
            tl.store(new_mask + batch.to(tl.int64) * length + position, seen, mask=inside)


@triton.jit(do_not_specialize=["length"])
def _in_order(
    x,
    tokens,
    out,
    length,
    x_b,
    x_h,
    x_l,
    x_d,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program per (ROWS positions of the order, head, batch)."""
    head, batch = tl.program_id(1), tl.program_id(2)
    position = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    inside = position < length
    token = tl.load(tokens + position, mask=inside, other=-1)
    dims = tl.arange(0, BLOCK_D)
    narrow = (dims < DIM)[None, :]
    x += batch.to(tl.int64) * x_b + head.to(tl.int64) * x_h
    at = token.to(tl.int64)[:, None] * x_l + dims.to(tl.int64)[None, :] * x_d
    rows = tl.load(x + at, mask=(token >= 0)[:, None] & narrow, other=0.0)
    row = (batch.to(tl.int64) * tl.num_programs(1) + head) * length + position
    tl.store(out + row[:, None] * DIM + dims[None, :], rows, mask=inside[:, None] & narrow)
