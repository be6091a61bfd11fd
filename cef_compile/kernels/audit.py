"""The audit: achieved recall and error on sampled query tiles, from attention to all their keys."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cef_compile.kernels import config as c

_DRAW_BITS = tl.constexpr(c.AUDIT_DRAW_BITS)
_LOG2E = tl.constexpr(1.4426950408889634)
_WARPS = 4
_TARGET_PROGRAMS = 1024
"""Programs wanted: a sampled tile's keys are split so that few samples still fill the device."""
_MAX_SPLITS = 32
_COMPARED_ROWS = 32
"""Rows compared in one step: an accumulator of them fits the registers at any head_dim."""
_SUMS = 4
"""Sums of a sample: of recalls, rows, squared errors, squares of the exact output."""
_MEAN_BLOCK = 256
"""Samples summed in one step of the last kernel."""


def audit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    seed: Tensor,
    measures: Tensor,
    *,
    scale: float,
    key_mask: Tensor | None = None,
    recall: bool = True,
    rows: int,
    warps: int,
    stages: int,
) -> None:
    """Write achieved recall, error, their standard errors and the norm into ``measures``.

    Args:
        q: ``[B, H, q_len, D]``; k ``[B, Hk, kv_len, D]``; v ``[B, Hk, kv_len, Dv]``; any strides.
        out: the output that was delivered, ``[B, H, q_len, Dv]``; its last stride is 1.
        lse: float32 ``[B, H, q_len]``, log of the kept energy of each row.
        seed: number whose hash draws the sample (:func:`~cef_compile.kernels.config.audit_tiles`).
        measures: float32 ``[MEASURE_SIZE]``.
        scale: factor of the scores.
        key_mask: bool ``[B or 1, kv_len]``, any strides.
        recall: whether to write the recall and its standard error too.
        rows, warps, stages: of each program; a sampled query tile is shared by ``BLOCK_M / rows``
            of them.
    """
    batch, heads, q_len, dim = q.shape
    key_heads, kv_len, value_dim = k.shape[1], k.shape[2], v.shape[3]
    n_m, n_n = c.tiles(q_len, c.BLOCK_M), c.tiles(kv_len, c.BLOCK_N)
    total = batch * heads * n_m
    samples = c.audit_samples(total, n_n)
    splits = max(1, min(_MAX_SPLITS, n_n, _TARGET_PROGRAMS // max(samples, 1)))
    energies = torch.empty(samples, splits, c.BLOCK_M, device=q.device)
    means = torch.empty(samples, splits, c.BLOCK_M, value_dim, device=q.device)
    sums = torch.empty(_SUMS, samples, device=q.device)
    block_dv = c.padded_dim(value_dim)
    if samples:
        _attend_all[(splits, samples, c.BLOCK_M // rows)](
            q,
            k,
            v,
            k if key_mask is None else key_mask,
            seed,
            energies,
            means,
            total,
            q_len,
            kv_len,
            n_m,
            n_n,
            heads,
            heads // key_heads if key_heads else 1,
            scale,
            *q.stride(),
            *k.stride(),
            *v.stride(),
            *c.mask_strides(key_mask),
            DIM=dim,
            VALUE_DIM=value_dim,
            BLOCK_D=c.padded_dim(dim),
            BLOCK_DV=block_dv,
            BLOCK_M=c.BLOCK_M,
            ROWS=rows,
            BLOCK_N=c.BLOCK_N,
            HAS_MASK=key_mask is not None,
            PRECISION=c.DOT_PRECISION if q.dtype == torch.float32 else None,
            STAGES=stages,
            num_warps=warps,
        )
        _compare[(samples,)](
            out,
            lse,
            energies,
            means,
            seed,
            sums,
            total,
            q_len,
            n_m,
            heads,
            splits,
            samples,
            *out.stride()[:3],
            VALUE_DIM=value_dim,
            BLOCK_DV=block_dv,
            BLOCK_M=c.BLOCK_M,
            ROWS=_COMPARED_ROWS,
            SPLITS=triton.next_power_of_2(splits),
            num_warps=_WARPS,
        )
    _mean[(1,)](
        sums,
        measures,
        samples,
        1 - samples / total if total else 0.0,
        WRITE_RECALL=recall,
        RECALL=c.MEASURE_RECALL,
        STDERR=c.MEASURE_STDERR,
        ERROR=c.MEASURE_ERROR,
        ERROR_STDERR=c.MEASURE_ERROR_STDERR,
        NORM=c.MEASURE_NORM,
        BLOCK=_MEAN_BLOCK,
        num_warps=_WARPS,
    )


@triton.jit
def _pick(seed, sample, samples, total):
    """The sample's query tile: :func:`~cef_compile.kernels.config.audit_tiles` for one of them."""
    part = sample.to(tl.int64)
    bits = tl.load(seed).to(tl.int64) * 0x9E3779B1 + part * 0x85EBCA77 + 0xC2B2AE3D
    bits = ((bits ^ (bits >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    bits = ((bits ^ (bits >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    within = (bits ^ (bits >> 16)) >> (32 - _DRAW_BITS)
    parts = tl.zeros_like(part) + samples  # 64 bits wide
    return ((part << _DRAW_BITS) + within) * total // (parts << _DRAW_BITS)


@triton.jit(
    do_not_specialize=[
        "total_tiles",
        "q_len",
        "kv_len",
        "n_m",
        "n_n",
        "heads",
        "heads_per_key_head",
    ]
)
def _attend_all(
    q,
    k,
    v,
    key_mask,
    seed,
    energies,
    means,
    total_tiles,
    q_len,
    kv_len,
    n_m,
    n_n,
    heads,
    heads_per_key_head,
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
    mask_b,
    mask_l,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program per (part of the keys, sample, part of its rows): what these keys give each row.

    That is the log2 of their energy, and the mean of their values by it.
    """
    split, sample = tl.program_id(0), tl.program_id(1)
    splits = tl.num_programs(0)
    pick = _pick(seed, sample, tl.num_programs(1), total_tiles)
    batch = pick // (heads * n_m)
    head = pick // n_m % heads
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    at = (pick % n_m) * BLOCK_M + row
    dims = tl.arange(0, BLOCK_D)
    value_dims = tl.arange(0, BLOCK_DV)
    within = tl.arange(0, BLOCK_N)
    q += batch * q_b + head * q_h
    k += batch * k_b + head // heads_per_key_head * k_h
    v += batch * v_b + head // heads_per_key_head * v_h
    used = (at < q_len)[:, None] & (dims < DIM)[None, :]
    rows = tl.load(q + at[:, None] * q_l + dims[None, :] * q_d, mask=used, other=0.0)
    scale2 = scale * _LOG2E
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_DV], tl.float32)
    begin = (split.to(tl.int64) * n_n // splits).to(tl.int32)
    end = ((split + 1).to(tl.int64) * n_n // splits).to(tl.int32)
    for step in tl.range(begin, end, num_stages=STAGES):
        key = step * BLOCK_N + within
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
        score = tl.where(seen[None, :], score * scale2, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        anchor = tl.where(new_top == float("-inf"), 0.0, new_top)
        shrink = tl.exp2(top - anchor)
        weight = tl.exp2(score - anchor[:, None])
        total = total * shrink + tl.sum(weight, 1)
        acc = acc * shrink[:, None]
        acc = tl.dot(weight.to(values.dtype), values, acc, input_precision=PRECISION)
        top = new_top
    to = (sample.to(tl.int64) * splits + split) * BLOCK_M + row
    tl.store(energies + to, top + tl.log2(total))
    mean = acc / tl.where(total == 0, 1.0, total)[:, None]
    place = means + to[:, None] * VALUE_DIM + value_dims[None, :]
    tl.store(place, mean, mask=(value_dims < VALUE_DIM)[None, :])


@triton.jit(do_not_specialize=["total_tiles", "q_len", "n_m", "heads", "splits", "samples"])
def _compare(
    out,
    lse,
    energies,
    means,
    seed,
    sums,
    total_tiles,
    q_len,
    n_m,
    heads,
    splits,
    samples,
    out_b,
    out_h,
    out_l,
    VALUE_DIM: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One program per sample: what was delivered to its rows, beside all parts of the keys."""
    sample = tl.program_id(0)
    pick = _pick(seed, sample, samples, total_tiles)
    split = tl.arange(0, SPLITS)
    dims = tl.arange(0, BLOCK_DV)
    out += pick // (heads * n_m) * out_b + pick // n_m % heads * out_h
    first_part = sample.to(tl.int64) * splits
    recall = 0.0
    number = 0.0
    wrong = 0.0
    size = 0.0
    for first in range(0, BLOCK_M, ROWS):
        row = first + tl.arange(0, ROWS)
        place = (first_part + split)[:, None] * BLOCK_M + row[None, :]
        part = tl.load(energies + place, mask=(split < splits)[:, None], other=float("-inf"))
        top = tl.max(part, 0)
        anchor = tl.where(top == float("-inf"), 0.0, top)
        full = top + tl.log2(tl.sum(tl.exp2(part - anchor[None, :]), 0))
        at = pick % n_m * BLOCK_M + row
        visible = (at < q_len) & (full != float("-inf"))
        mine = tl.load(lse + pick // n_m * q_len + at, mask=at < q_len, other=0.0) * _LOG2E
        recall += tl.sum(tl.where(visible, tl.exp2(mine - full), 0.0), 0)
        number += tl.sum(visible.to(tl.float32), 0)
        exact = tl.zeros([ROWS, BLOCK_DV], tl.float32)
        inside = visible[:, None] & (dims < VALUE_DIM)[None, :]
        for i in range(0, splits):
            to = (first_part + i) * BLOCK_M + row
            weight = tl.exp2(tl.load(energies + to) - full)
            mean = tl.load(means + to[:, None] * VALUE_DIM + dims[None, :], mask=inside, other=0.0)
            exact += weight[:, None] * mean
        delivered = tl.load(out + at[:, None] * out_l + dims[None, :], mask=inside, other=0.0)
        off = tl.where(inside, delivered.to(tl.float32) - exact, 0.0)
        wrong += tl.sum(off * off)
        size += tl.sum(tl.where(inside, exact * exact, 0.0))
    tl.store(sums + sample, recall)
    tl.store(sums + samples + sample, number)
    tl.store(sums + 2 * samples + sample, wrong)
    tl.store(sums + 3 * samples + sample, size)


@triton.jit(do_not_specialize=["samples"])
def _mean(
    sums,
    measures,
    samples,
    unseen,
    WRITE_RECALL: tl.constexpr,
    RECALL: tl.constexpr,
    STDERR: tl.constexpr,
    ERROR: tl.constexpr,
    ERROR_STDERR: tl.constexpr,
    NORM: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: means over rows, and standard errors from the spread between query tiles."""
    at = tl.arange(0, BLOCK)
    recall = 0.0
    rows = 0.0
    tiles = 0.0
    tile_mean = 0.0
    wrong = 0.0
    size = 0.0
    for start in range(0, samples, BLOCK):
        inside = start + at < samples
        summed = tl.load(sums + start + at, mask=inside, other=0.0)
        number = tl.load(sums + samples + start + at, mask=inside, other=0.0)
        recall += tl.sum(summed, 0)
        rows += tl.sum(number, 0)
        tiles += tl.sum((number > 0).to(tl.float32), 0)
        tile_mean += tl.sum(summed / tl.maximum(number, 1.0), 0)
        wrong += tl.sum(tl.load(sums + 2 * samples + start + at, mask=inside, other=0.0), 0)
        size += tl.sum(tl.load(sums + 3 * samples + start + at, mask=inside, other=0.0), 0)
    tile_mean = tile_mean / tl.maximum(tiles, 1.0)
    # Of the error it is the square that is a ratio of two sums.
    ratio = tl.where(wrong == 0, 0.0, wrong / size)
    spread = 0.0
    ratio_spread = 0.0
    for start in range(0, samples, BLOCK):
        inside = start + at < samples
        summed = tl.load(sums + start + at, mask=inside, other=0.0)
        number = tl.load(sums + samples + start + at, mask=inside, other=0.0)
        off = tl.where(number > 0, summed / tl.maximum(number, 1.0) - tile_mean, 0.0)
        spread += tl.sum(off * off, 0)
        squared = tl.load(sums + 2 * samples + start + at, mask=inside, other=0.0)
        norm = tl.load(sums + 3 * samples + start + at, mask=inside, other=0.0)
        # In shares of the whole, whose squares stay within float32.
        off = tl.where(inside, squared - ratio * norm, 0.0) / size
        ratio_spread += tl.sum(off * off, 0)
    free = tl.maximum(tiles - 1.0, 1.0)
    if WRITE_RECALL:
        stderr = tl.sqrt(spread / free * unseen / tl.maximum(tiles, 1.0))
        tl.store(measures + RECALL, tl.where(rows > 0, recall / tl.maximum(rows, 1.0), 1.0))
        tl.store(measures + STDERR, stderr)
    error = tl.sqrt(ratio)
    error_stderr = tl.sqrt(ratio_spread / free * unseen * tiles) / (2 * error)
    tl.store(measures + ERROR, error)
    tl.store(measures + ERROR_STDERR, tl.where(error == 0, 0.0, error_stderr))
    tl.store(measures + NORM, size / tl.maximum(rows, 1.0))
