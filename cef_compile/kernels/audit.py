"""The audit: achieved recall on sampled query tiles, from exact energies of all their keys."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from cef_compile.kernels import config as c

_LN2 = tl.constexpr(math.log(2.0))
_DRAW_BITS = tl.constexpr(c.AUDIT_DRAW_BITS)
_LOG2E = tl.constexpr(1.4426950408889634)
_WARPS = 4
_TARGET_PROGRAMS = 1024
"""Programs wanted: a sampled tile's keys are split so that few samples still fill the device."""
_MAX_SPLITS = 32
_MEAN_BLOCK = 256
"""Samples summed in one step of the last kernel."""


def audit(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    seed: Tensor,
    measures: Tensor,
    *,
    scale: float,
    key_mask: Tensor | None = None,
    rows: int,
) -> None:
    """Write achieved recall and its standard error into ``measures``.

    Args:
        q: ``[B, H, q_len, D]``; k ``[B, Hk, kv_len, D]``; any strides.
        lse: float32 ``[B, H, q_len]``, log of the kept energy of each row.
        seed: number whose hash draws the sample (:func:`~cef_compile.kernels.config.audit_tiles`).
        measures: float32 ``[MEASURE_SIZE]``.
        scale: factor of the scores.
        key_mask: bool ``[B or 1, kv_len]``, any strides.
        rows: rows of a program; a sampled query tile is shared by ``BLOCK_M / rows`` of them.
    """
    batch, heads, q_len, dim = q.shape
    kv_len, key_heads = k.shape[2], k.shape[1]
    n_m, n_n = c.tiles(q_len, c.BLOCK_M), c.tiles(kv_len, c.BLOCK_N)
    total = batch * heads * n_m
    samples = c.audit_samples(total)
    splits = max(1, min(_MAX_SPLITS, n_n, _TARGET_PROGRAMS // max(samples, 1)))
    parts = torch.empty(samples, splits, c.BLOCK_M, device=q.device)
    sums = torch.empty(2, samples, device=q.device)
    if samples:
        _energies[(splits, samples, c.BLOCK_M // rows)](
            q,
            k,
            k if key_mask is None else key_mask,
            seed,
            parts,
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
            0 if key_mask is None or key_mask.shape[0] == 1 else key_mask.stride(0),
            0 if key_mask is None else key_mask.stride(1),
            DIM=dim,
            BLOCK_D=c.padded_dim(dim),
            BLOCK_M=c.BLOCK_M,
            ROWS=rows,
            BLOCK_N=c.BLOCK_N,
            HAS_MASK=key_mask is not None,
            PRECISION=c.DOT_PRECISION if q.dtype == torch.float32 else None,
            num_warps=_WARPS,
        )
        _recalls[(samples,)](
            lse,
            parts,
            seed,
            sums,
            total,
            q_len,
            n_m,
            splits,
            samples,
            BLOCK_M=c.BLOCK_M,
            SPLITS=triton.next_power_of_2(splits),
            num_warps=_WARPS,
        )
    _mean[(1,)](
        sums,
        measures,
        samples,
        1 - samples / total if total else 0.0,
        RECALL=c.MEASURE_RECALL,
        STDERR=c.MEASURE_STDERR,
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
def _energies(
    q,
    k,
    key_mask,
    seed,
    parts,
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
    mask_b,
    mask_l,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_MASK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One program per (part of the keys, sample, part of its rows): log2 of the energy, by row."""
    split, sample = tl.program_id(0), tl.program_id(1)
    splits = tl.num_programs(0)
    pick = _pick(seed, sample, tl.num_programs(1), total_tiles)
    batch = pick // (heads * n_m)
    head = pick // n_m % heads
    row = tl.program_id(2) * ROWS + tl.arange(0, ROWS)
    at = (pick % n_m) * BLOCK_M + row
    dims = tl.arange(0, BLOCK_D)
    within = tl.arange(0, BLOCK_N)
    q += batch * q_b + head * q_h
    k += batch * k_b + head // heads_per_key_head * k_h
    used = (at < q_len)[:, None] & (dims < DIM)[None, :]
    rows = tl.load(q + at[:, None] * q_l + dims[None, :] * q_d, mask=used, other=0.0)
    scale2 = scale * _LOG2E
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    begin = (split.to(tl.int64) * n_n // splits).to(tl.int32)
    end = ((split + 1).to(tl.int64) * n_n // splits).to(tl.int32)
    for step in tl.range(begin, end, num_stages=3):
        key = step * BLOCK_N + within
        seen = key < kv_len
        if HAS_MASK:
            hidden = batch * mask_b + key.to(tl.int64) * mask_l
            seen = seen & (tl.load(key_mask + hidden, mask=seen, other=0) != 0)
        place = k + key.to(tl.int64)[:, None] * k_l + dims.to(tl.int64)[None, :] * k_d
        keys = tl.load(place, mask=seen[:, None] & (dims < DIM)[None, :], other=0.0)
        score = tl.dot(rows, keys.T, input_precision=PRECISION)
        score = tl.where(seen[None, :], score * scale2, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1))
        anchor = tl.where(new_top == float("-inf"), 0.0, new_top)
        total = total * tl.exp2(top - anchor) + tl.sum(tl.exp2(score - anchor[:, None]), 1)
        top = new_top
    to = (sample * splits + split) * BLOCK_M + row
    tl.store(parts + to, top + tl.log2(total))


@triton.jit(do_not_specialize=["total_tiles", "q_len", "n_m", "splits", "samples"])
def _recalls(
    lse,
    parts,
    seed,
    sums,
    total_tiles,
    q_len,
    n_m,
    splits,
    samples,
    BLOCK_M: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """One program per sample: sum of the recalls of its rows that see a key, and their number."""
    sample = tl.program_id(0)
    pick = _pick(seed, sample, samples, total_tiles)
    row = tl.arange(0, BLOCK_M)
    split = tl.arange(0, SPLITS)
    place = (sample * splits + split)[:, None] * BLOCK_M + row[None, :]
    part = tl.load(parts + place, mask=(split < splits)[:, None], other=float("-inf"))
    top = tl.max(part, 0)
    anchor = tl.where(top == float("-inf"), 0.0, top)
    full = top + tl.log2(tl.sum(tl.exp2(part - anchor[None, :]), 0))
    at = pick % n_m * BLOCK_M + row
    mine = tl.load(lse + pick // n_m * q_len + at, mask=at < q_len, other=0.0) * _LOG2E
    visible = (at < q_len) & (full != float("-inf"))
    recall = tl.where(visible, tl.exp2(mine - full), 0.0)
    tl.store(sums + sample, tl.sum(recall, 0))
    tl.store(sums + samples + sample, tl.sum(visible.to(tl.float32), 0))


@triton.jit(do_not_specialize=["samples"])
def _mean(
    sums,
    measures,
    samples,
    unseen,
    RECALL: tl.constexpr,
    STDERR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: mean over rows, and its standard error from the spread between query tiles."""
    at = tl.arange(0, BLOCK)
    recall = 0.0
    rows = 0.0
    tiles = 0.0
    tile_mean = 0.0
    for start in range(0, samples, BLOCK):
        inside = start + at < samples
        summed = tl.load(sums + start + at, mask=inside, other=0.0)
        number = tl.load(sums + samples + start + at, mask=inside, other=0.0)
        recall += tl.sum(summed, 0)
        rows += tl.sum(number, 0)
        tiles += tl.sum((number > 0).to(tl.float32), 0)
        tile_mean += tl.sum(summed / tl.maximum(number, 1.0), 0)
    tile_mean = tile_mean / tl.maximum(tiles, 1.0)
    spread = 0.0
    for start in range(0, samples, BLOCK):
        inside = start + at < samples
        summed = tl.load(sums + start + at, mask=inside, other=0.0)
        number = tl.load(sums + samples + start + at, mask=inside, other=0.0)
        off = tl.where(number > 0, summed / tl.maximum(number, 1.0) - tile_mean, 0.0)
        spread += tl.sum(off * off, 0)
    variance = spread / tl.maximum(tiles - 1.0, 1.0)
    stderr = tl.sqrt(variance * unseen / tl.maximum(tiles, 1.0))
    tl.store(measures + RECALL, tl.where(rows > 0, recall / tl.maximum(rows, 1.0), 1.0))
    tl.store(measures + STDERR, stderr)
