"""Step 4 of the planned filter: flash attention over the listed key tiles alone."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from cef_compile.kernels import config as c
from cef_compile.kernels.descriptor import describe

_LN2 = tl.constexpr(math.log(2.0))
_LOG2E = tl.constexpr(1.4426950408889634)
_PSEUDO_BLOCK = 64
"""Dropped tiles put back in one step of the compensation."""


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    count: Tensor,
    order: Tensor,
    *,
    scale: float,
    key_mask: Tensor | None = None,
    kept: Tensor | None = None,
    k_mean: Tensor | None = None,
    v_mean: Tensor | None = None,
    key_count: Tensor | None = None,
    tokens: Tensor | None = None,
    descriptors: bool,
    rows: int,
    warps: int,
    stages: int,
) -> tuple[Tensor, Tensor]:
    """Attention of each query tile over the key tiles of its list.

    Args:
        q: ``[B, H, q_len, D]``; k ``[B, Hk, kv_len, D]``; v ``[B, Hk, kv_len, Dv]``; any strides.
        index, count, order: of :class:`~cef_compile.kernels.schedule.Lists`.
        scale: factor of the scores.
        key_mask: bool ``[B or 1, kv_len]``, any strides.
        kept, k_mean, v_mean, key_count: all four, or none: with them every visible tile that is
            not in ``kept`` takes part as one pseudo-token (its mean key and value, the first
            columns of contiguous ``[B, Hk, Tn, W]``, and log of its number of keys).
        tokens: int32 ``[length]``, a token order, of
            :class:`~cef_compile.kernels.centroids.Arranged`. Then k, v, key_mask and all that is
            counted in tiles are in that order (kv_len is its length), q and the outputs are not:
            the query at position i of the order is row ``tokens[i]`` of q, out and lse, and there
            is none where it is -1.
        descriptors: read k and v through TMA descriptors.
        rows, warps, stages: of each program; a query tile is shared by ``BLOCK_M / rows`` of them.

    Returns:
        out ``[B, H, q_len, Dv]`` in (B, q_len, H, Dv) memory order, and lse float32
        ``[B, H, q_len]`` of the listed tiles.
    """
    batch, heads, q_len, dim = q.shape
    key_heads, kv_len, value_dim = k.shape[1], k.shape[2], v.shape[3]
    positions = q_len if tokens is None else len(tokens)
    n_m = c.tiles(positions, c.BLOCK_M)
    n_n = c.tiles(kv_len, c.BLOCK_N)
    out = q.new_empty(batch, q_len, heads, value_dim).transpose(1, 2)
    lse = torch.empty(batch, heads, q_len, dtype=torch.float32, device=q.device)
    if not lse.numel():
        return out, lse
    block_d = c.padded_dim(dim)
    block_dv = c.padded_dim(value_dim)
    compensate = kept is not None
    _attend[(n_m * heads * batch * (c.BLOCK_M // rows),)](
        q,
        k,
        v,
        describe(k, c.BLOCK_N, block_d) if descriptors else k,
        describe(v, c.BLOCK_N, block_dv) if descriptors else v,
        k if key_mask is None else key_mask,
        index,
        count,
        order,
        kept if compensate else index,
        k_mean if compensate else index,
        v_mean if compensate else index,
        key_count if compensate else index,
        index if tokens is None else tokens,
        out,
        lse,
        q_len,
        positions,
        kv_len,
        n_m,
        n_n,
        heads,
        heads // key_heads if key_heads else 1,
        batch * heads * n_m,
        scale,
        *q.stride(),
        *k.stride(),
        *v.stride(),
        *out.stride()[:3],
        *c.mask_strides(key_mask),
        0 if key_count is None or key_count.shape[0] == 1 else n_n,
        0 if k_mean is None else k_mean.shape[3],
        0 if v_mean is None else v_mean.shape[3],
        DIM=dim,
        VALUE_DIM=value_dim,
        BLOCK_D=block_d,
        BLOCK_DV=block_dv,
        BLOCK_M=c.BLOCK_M,
        ROWS=rows,
        BLOCK_N=c.BLOCK_N,
        PSEUDO=_PSEUDO_BLOCK,
        PARTIAL=key_mask is not None or kv_len % c.BLOCK_N != 0,
        HAS_MASK=key_mask is not None,
        DESCRIPTORS=descriptors,
        COMPENSATE=compensate,
        ORDERED=tokens is not None,
        PRECISION=c.DOT_PRECISION if q.dtype == torch.float32 else None,
        STAGES=stages,
        num_warps=warps,
    )
    return out, lse


@triton.jit
def _softmax_step(score, top, total, scale2):
    """Weights of a score tile against the new row maximum, and what the past shrinks by."""
    new_top = tl.maximum(top, tl.max(score, 1) * scale2)
    # Subtracting a maximum of -inf would make NaN of rows that have met nothing yet.
    anchor = tl.where(new_top == float("-inf"), 0.0, new_top)
    weight = tl.exp2(score * scale2 - anchor[:, None])
    shrink = tl.exp2(top - anchor)
    return weight, shrink, new_top, total * shrink + tl.sum(weight, 1)


@triton.jit(
    do_not_specialize=[
        "q_len",
        "positions",
        "kv_len",
        "n_m",
        "n_n",
        "heads",
        "heads_per_key_head",
        "total_tiles",
        "key_count_b",
    ]
)
def _attend(
    q,
    k,
    v,
    k_desc,
    v_desc,
    key_mask,
    index,
    count,
    order,
    kept,
    k_mean,
    v_mean,
    key_count,
    tokens,
    out,
    lse,
    q_len,
    positions,
    kv_len,
    n_m,
    n_n,
    heads,
    heads_per_key_head,
    total_tiles,
    scale,
    q_b,
    q_h,
    q_l,
    q_d,
    k_b,
    k_h,
    k_l,
    k_d,
    v_b,
    v_h,
    v_l,
    v_d,
    out_b,
    out_h,
    out_l,
    mask_b,
    mask_l,
    key_count_b,
    k_mean_n,
    v_mean_n,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PSEUDO: tl.constexpr,
    PARTIAL: tl.constexpr,
    HAS_MASK: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    COMPENSATE: tl.constexpr,
    ORDERED: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program per part of a query tile, in the order of the lists."""
    PARTS: tl.constexpr = BLOCK_M // ROWS
    part = tl.program_id(0) % PARTS
    row = tl.load(order + tl.program_id(0) // PARTS)
    tile = row % n_m
    batch_head = row // n_m
    batch = (batch_head // heads).to(tl.int64)
    head = batch_head % heads
    key_head = head // heads_per_key_head
    row = row.to(tl.int64)
    listed = tl.load(count + row)
    whole = tl.load(count + total_tiles + row)
    index += row * n_n

    at = tile * BLOCK_M + part * ROWS + tl.arange(0, ROWS)
    real = at < positions
    if ORDERED:
        at = tl.load(tokens + at, mask=real, other=-1)
        real = at >= 0
    dims = tl.arange(0, BLOCK_D)
    value_dims = tl.arange(0, BLOCK_DV)
    within = tl.arange(0, BLOCK_N)
    q += batch * q_b + head.to(tl.int64) * q_h
    k += batch * k_b + key_head.to(tl.int64) * k_h
    v += batch * v_b + key_head.to(tl.int64) * v_h
    where = at.to(tl.int64)[:, None] * q_l + dims.to(tl.int64)[None, :] * q_d
    rows = tl.load(q + where, mask=real[:, None] & (dims < DIM)[None, :], other=0.0)

    scale2 = scale * _LOG2E
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_DV], tl.float32)

    # The number of the next tile is read one step ahead: its load would stall every step.
    coming = tl.load(index, mask=listed > 0, other=0).to(tl.int32)
    for step in tl.range(0, whole, num_stages=STAGES):
        first = coming * BLOCK_N
        coming = tl.load(index + tl.minimum(step + 1, n_n - 1)).to(tl.int32)
        if DESCRIPTORS:
            keys = k_desc.load([batch.to(tl.int32), key_head, first, 0])
            keys = tl.reshape(keys, [BLOCK_N, BLOCK_D])
            values = v_desc.load([batch.to(tl.int32), key_head, first, 0])
            values = tl.reshape(values, [BLOCK_N, BLOCK_DV])
        else:
            row_at = (first + within).to(tl.int64)[:, None]
            place = k + row_at * k_l + dims.to(tl.int64)[None, :] * k_d
            keys = tl.load(place, mask=(dims < DIM)[None, :], other=0.0)
            place = v + row_at * v_l + value_dims.to(tl.int64)[None, :] * v_d
            values = tl.load(place, mask=(value_dims < VALUE_DIM)[None, :], other=0.0)
        score = tl.dot(rows, keys.T, input_precision=PRECISION)
        weight, shrink, top, total = _softmax_step(score, top, total, scale2)
        acc = acc * shrink[:, None]
        acc = tl.dot(weight.to(values.dtype), values, acc, input_precision=PRECISION)

    if PARTIAL:
        # Tiles with hidden keys: few, so masked loads do; what they hide may be NaN.
        for step in tl.range(whole, listed, num_stages=1):
            key = tl.load(index + step).to(tl.int32) * BLOCK_N + within
            seen = key < kv_len
            if HAS_MASK:
                hidden = batch * mask_b + key.to(tl.int64) * mask_l
                seen = seen & (tl.load(key_mask + hidden, mask=seen, other=0) != 0)
            row_at = key.to(tl.int64)[:, None]
            place = k + row_at * k_l + dims.to(tl.int64)[None, :] * k_d
            keys = tl.load(place, mask=seen[:, None] & (dims < DIM)[None, :], other=0.0)
            place = v + row_at * v_l + value_dims.to(tl.int64)[None, :] * v_d
            inside = seen[:, None] & (value_dims < VALUE_DIM)[None, :]
            values = tl.load(place, mask=inside, other=0.0)
            score = tl.dot(rows, keys.T, input_precision=PRECISION)
            score = tl.where(seen[None, :], score, float("-inf"))
            weight, shrink, top, total = _softmax_step(score, top, total, scale2)
            acc = acc * shrink[:, None]
            acc = tl.dot(weight.to(values.dtype), values, acc, input_precision=PRECISION)

    log_energy = (top + tl.log2(total)) * _LN2
    lse += batch_head.to(tl.int64) * q_len
    tl.store(lse + at, log_energy, mask=real)

    if COMPENSATE:
        means = batch * (heads // heads_per_key_head) + key_head
        k_mean += means * n_n * k_mean_n
        v_mean += means * n_n * v_mean_n
        key_count += batch * key_count_b
        kept += row * n_n
        for start in tl.range(0, n_n, PSEUDO, num_stages=1):
            key = start + tl.arange(0, PSEUDO)
            keys_in = tl.load(key_count + key, mask=key < n_n, other=0)
            taken = tl.load(kept + key, mask=key < n_n, other=1)
            seen = (keys_in > 0) & (taken == 0)
            place = k_mean + key[:, None] * k_mean_n + dims[None, :]
            keys = tl.load(place, mask=seen[:, None], other=0.0)
            place = v_mean + key[:, None] * v_mean_n + value_dims[None, :]
            values = tl.load(place, mask=seen[:, None], other=0.0)
            score = tl.dot(rows, keys.T, input_precision=PRECISION)
            score = score * scale2 + tl.log2(keys_in.to(tl.float32))[None, :]
            score = tl.where(seen[None, :], score, float("-inf"))
            weight, shrink, top, total = _softmax_step(score, top, total, 1.0)
            acc = acc * shrink[:, None]
            acc = tl.dot(weight.to(values.dtype), values, acc, input_precision=PRECISION)

    mean = acc / tl.where(total == 0, 1.0, total)[:, None]
    out += batch * out_b + head.to(tl.int64) * out_h
    where = at.to(tl.int64)[:, None] * out_l + value_dims[None, :]
    used = real[:, None] & (value_dims < VALUE_DIM)[None, :]
    tl.store(out + where, mean.to(out.dtype.element_ty), mask=used)
