"""Step 2 of the planned filter: rank and energy of every tile pair, and their histogram."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cef_compile.kernels import config as c
from cef_compile.kernels.ranks import ENERGY_FP16, LOWEST, Plan, compiled_for, empty_plan

_LOG2E = tl.constexpr(1.4426950408889634)
_ENERGY_FP16 = tl.constexpr(ENERGY_FP16)
_LOWEST = tl.constexpr(LOWEST)
_SIDE = tl.constexpr(16)
"""The histogram is built as a 16 x 16 matrix: bin = 16 * row + column."""


def plan(
    q: Tensor,
    stats: Tensor,
    count: Tensor,
    *,
    scale: float,
    tokens: Tensor | None = None,
    exact_tiles: tuple[int, int] | None = None,
    keep_energy: bool,
    histogram: Tensor | None = None,
    group_tiles: int,
    block_keys: int,
    warps: int,
    stages: int,
) -> Plan:
    """Rank and energy of every tile pair from centroids alone, in two passes over the centroids.

    Args:
        q: ``[B, H, q_len, D]``, any strides.
        stats: of :class:`~cef_compile.kernels.centroids.Centroids`, in the dtype of q, the
            variance times :func:`~cef_compile.kernels.ranks.variance_factor`.
        count: int32 ``[B or 1, Tn]``, visible keys of each tile.
        scale: factor of the scores.
        tokens: int32 ``[length]``, a token order, of
            :class:`~cef_compile.kernels.centroids.Arranged`: the query at position i of the order
            is row ``tokens[i]`` of q, none where it is -1.
        exact_tiles: first query tile and first key tile of exact tokens.
        keep_energy: also return the energy of every pair.
        histogram: int64 zeros ``[2, RANK_BINS]`` that the plan may add to; None to make them.
        group_tiles: query tiles per program, which share each centroid tile it reads.
        block_keys: key tiles per step.
        warps, stages: of each program.
    """
    batch, heads, q_len, dim = q.shape
    positions = q_len if tokens is None else len(tokens)
    n_m = c.tiles(positions, c.BLOCK_M)
    n_n = count.shape[1]
    made = empty_plan((batch, heads, n_m, n_n), histogram, keep_energy=keep_energy, device=q.device)
    if made.bins.numel():
        _plan[(triton.cdiv(n_m, group_tiles), heads, batch)](
            q,
            stats,
            count,
            count if tokens is None else tokens,
            made.bins,
            made.histogram if made.energy is None else made.energy,
            made.histogram,
            positions,
            n_m,
            n_n,
            heads // stats.shape[1],
            0 if count.shape[0] == 1 else n_n,
            scale,
            *((n_m, n_n) if exact_tiles is None else exact_tiles),
            *q.stride(),
            **compiled_for(
                dim,
                keep_energy=keep_energy,
                ordered=tokens is not None,
                exact=exact_tiles is not None,
            ),
            BLOCK_D=c.padded_dim(dim),
            GROUP=group_tiles,
            KEYS=block_keys,
            PRECISION=c.PLAN_PRECISION if q.dtype == torch.float32 else None,
            STAGES=stages,
            num_warps=warps,
        )
    return made


@triton.jit
def _load_stats(stats, count, key, n_n, WIDTH: tl.constexpr):
    """Mean and variance of some tiles ``[KEYS, WIDTH]``, log2 of the key count (-inf: hidden)."""
    inside = key < n_n
    place = stats + key[:, None] * WIDTH + tl.arange(0, WIDTH)[None, :]
    found = tl.load(count + key, mask=inside, other=0)
    return tl.load(place, mask=inside[:, None], other=0.0), tl.log2(found.to(tl.float32))


@triton.jit(
    do_not_specialize=[
        "positions",
        "n_m",
        "n_n",
        "heads_per_key_head",
        "count_b",
        "exact_m",
        "exact_n",
    ]
)
def _plan(
    q,
    stats,
    count,
    tokens,
    bins,
    energy,
    histogram,
    positions,
    n_m,
    n_n,
    heads_per_key_head,
    count_b,
    scale,
    exact_m,
    exact_n,
    q_b,
    q_h,
    q_l,
    q_d,
    DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ROW_STRIDE: tl.constexpr,
    GROUP: tl.constexpr,
    KEYS: tl.constexpr,
    SQUARE: tl.constexpr,
    BINS_PER_OCTAVE: tl.constexpr,
    OCTAVES: tl.constexpr,
    TOP_BIN: tl.constexpr,
    ENERGY_UNIT: tl.constexpr,
    KEEP_ENERGY: tl.constexpr,
    ORDERED: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program per (GROUP query tiles, head, batch); ROWS rows of each query tile take part."""
    ROWS: tl.constexpr = BLOCK_M // ROW_STRIDE
    group, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    heads = tl.num_programs(1)
    row = tl.arange(0, GROUP * ROWS)
    at = (group * GROUP + row // ROWS) * BLOCK_M + row % ROWS * ROW_STRIDE
    real = at < positions
    if ORDERED:
        at = tl.load(tokens + at, mask=real, other=-1)
        real = at >= 0
    # A row and, beside it, its squares: against (mean, variance) one product gives both terms.
    WIDTH: tl.constexpr = 2 * BLOCK_D
    column = tl.arange(0, WIDTH)
    dims = column % BLOCK_D
    used = real[:, None] & (dims < DIM)[None, :]
    q += batch.to(tl.int64) * q_b + head.to(tl.int64) * q_h
    where = at.to(tl.int64)[:, None] * q_l + dims.to(tl.int64)[None, :] * q_d
    rows = tl.load(q + where, mask=used, other=0.0)
    wide = rows.to(tl.float32)
    rows = tl.where((column < BLOCK_D)[None, :], rows, (wide * wide * SQUARE).to(rows.dtype))

    key_head = batch.to(tl.int64) * (heads // heads_per_key_head) + head // heads_per_key_head
    stats += key_head * n_n * WIDTH
    count += batch * count_b
    step = tl.arange(0, KEYS)
    scale2 = scale * _LOG2E

    # Both passes work on [key tiles, rows], so that the rows stay in shared memory once.
    # Pass 1: log2 of the energy that each row gives all tiles together. Every place of the step
    # keeps a running sum of its own; they are put together once, at the end.
    top = tl.full([KEYS, GROUP * ROWS], _LOWEST, tl.float32)
    total = tl.zeros([KEYS, GROUP * ROWS], tl.float32)
    for start in tl.range(0, n_n, KEYS, num_stages=STAGES):
        known, log_count = _load_stats(stats, count, start + step, n_n, WIDTH)
        score = tl.dot(known, rows.T, input_precision=PRECISION)
        score = score * scale2 + log_count[:, None]
        rise = score - top
        part = tl.exp2(-tl.abs(rise))
        total = tl.where(rise > 0, total * part + 1.0, total + part)
        top = tl.maximum(top, score)
    row_top = tl.max(top, 0)
    total = tl.sum(total * tl.exp2(top - row_top[None, :]), 0)
    top = row_top
    # A NaN anywhere in a row makes its total NaN. Such a row, and one that is padding or sees
    # nothing, has no energy; a real NaN row puts all tiles of its query tile in the top bin.
    sound = real & (total > 0)
    log_total = tl.where(sound, top + tl.log2(total), float("inf"))
    spoilt = tl.max(tl.reshape((real & (total != total)).to(tl.int32), [GROUP, ROWS]), 1) > 0

    # Pass 2: the same scores, now as shares of the row.
    tile = group * GROUP + tl.arange(0, GROUP)
    to = ((batch.to(tl.int64) * heads + head) * n_m + tile) * n_n  # [GROUP]
    cell = tl.arange(0, _SIDE)
    energies = tl.zeros([_SIDE, _SIDE], tl.float32)
    numbers = tl.zeros([_SIDE, _SIDE], tl.float32)
    best_rank = tl.full([KEYS, GROUP], float("-inf"), tl.float32)
    best_key = tl.zeros([KEYS, GROUP], tl.int32)
    best_energy = tl.zeros([KEYS, GROUP], tl.float32)
    for start in tl.range(0, n_n, KEYS, num_stages=STAGES):
        key = start + step
        known, log_count = _load_stats(stats, count, key, n_n, WIDTH)
        score = tl.dot(known, rows.T, input_precision=PRECISION)
        share = score * scale2 + log_count[:, None] - log_total[None, :]
        share = tl.where(sound[None, :], share, float("-inf"))
        share = tl.reshape(share, [KEYS, GROUP, ROWS])
        rank = tl.max(share, 2)
        mass = tl.sum(tl.exp2(share), 2)
        visible = (log_count > float("-inf"))[:, None] & (tile < n_m)[None, :]
        rank = tl.where(spoilt[None, :], 0.0, rank)
        ranked = visible
        if EXACT:
            # Kept whatever it ranks, so in the top bin; and never the best, which is one more.
            exact = (key >= exact_n)[:, None] | (tile >= exact_m)[None, :]
            rank = tl.where(exact, 0.0, rank)
            ranked = visible & ~exact

        bin_ = tl.floor((rank + OCTAVES) * BINS_PER_OCTAVE)
        bin_ = tl.minimum(tl.maximum(bin_, 0.0), TOP_BIN).to(tl.int32)
        stored = (key < n_n)[:, None] & (tile < n_m)[None, :]
        tl.store(bins + to[None, :] + key[:, None], bin_.to(tl.uint8), mask=stored)
        if KEEP_ENERGY:
            kept = tl.where(visible, mass, 0.0)
            tl.store(energy + to[None, :] + key[:, None], kept, mask=stored)

        better = ranked & (rank > best_rank)
        best_rank = tl.where(better, rank, best_rank)
        best_key = tl.where(better, key[:, None], best_key)
        best_energy = tl.where(better, mass, best_energy)

        # The histogram of the step as a product of one-hot matrices, on tensor cores and in a
        # fixed order. Two fp16 parts carry 22 bits of each energy.
        flat = tl.reshape(tl.where(visible, bin_, -1), [KEYS * GROUP])
        weight = tl.reshape(tl.where(visible, mass, 0.0), [KEYS * GROUP]) * _ENERGY_FP16
        in_row = (cell[:, None] == (flat >> 4)[None, :]).to(tl.float16)
        in_column = (flat & 15)[:, None] == cell[None, :]
        weight = tl.where(in_column, weight[:, None], 0.0)
        coarse = weight.to(tl.float16)
        fine = (weight - coarse.to(tl.float32)).to(tl.float16)
        energies = tl.dot(in_row, coarse, energies)
        energies = tl.dot(in_row, fine, energies)
        numbers = tl.dot(in_row, in_column.to(tl.float16), numbers)

    # The best tile of each query tile (the first of equals) moves to the top bin.
    rank = tl.max(best_rank, 0)
    first = tl.where(best_rank == rank[None, :], best_key, n_n)
    key = tl.min(first, 0)
    mass = tl.sum(tl.where(first == key[None, :], best_energy, 0.0), 0) * _ENERGY_FP16
    found = rank > float("-inf")
    tl.debug_barrier()  # the loop's stores to bins come first
    tl.store(bins + to + key, tl.full([GROUP], TOP_BIN, tl.uint8), mask=found)
    own = tl.floor((rank + OCTAVES) * BINS_PER_OCTAVE)
    own = tl.minimum(tl.maximum(own, 0.0), TOP_BIN).to(tl.int32)
    bin_ = cell[:, None] * _SIDE + cell[None, :]
    leaves = (bin_[:, :, None] == own[None, None, :]) & found[None, None, :]
    enters = (bin_[:, :, None] == TOP_BIN) & found[None, None, :]
    moved = enters.to(tl.float32) - leaves.to(tl.float32)
    numbers += tl.sum(moved, 2)
    energies += tl.sum(moved * mass[None, None, :], 2)

    unit = tl.floor(tl.maximum(energies, 0.0) * (ENERGY_UNIT / _ENERGY_FP16) + 0.5).to(tl.int64)
    tl.atomic_add(histogram + bin_, unit, mask=unit > 0, sem="relaxed")
    number = (numbers + 0.5).to(tl.int64)
    tl.atomic_add(histogram + TOP_BIN + 1 + bin_, number, mask=number > 0, sem="relaxed")
