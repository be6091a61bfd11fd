"""Step 2 of the planned filter on Hopper, in Gluon: what ``plan`` does, with one product.

A row's shares are known only once all its scores are. The Triton kernel therefore computes the
scores twice; this one keeps the exponentials of the first time in shared memory, each against the
row's maximum by then, and corrects them by one factor per row and step at the end. Of more keys
than fit it computes all scores but those of the first chunk a second time.
"""

from __future__ import annotations

import math
from typing import Final

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from cef_compile.kernels import config as c
from cef_compile.kernels.gluon_parts import SWIZZLE, barrier, describe, rows_of, whole_lines
from cef_compile.kernels.ranks import ENERGY_FP16, LOWEST, Plan, compiled_for, empty_plan

_LOG2E = gl.constexpr(math.log2(math.e))
_STEP = gl.constexpr(64)
"""Key tiles of a step."""
_BUNDLE = gl.constexpr(4)
"""Steps that are looked at together at the end: one for each warp of a group."""
_ROWS_AT_ONCE = gl.constexpr(16)
"""Rows whose shares a thread holds at the end: more would spill."""
_LOWEST = gl.constexpr(LOWEST)
_ENERGY_FP16 = gl.constexpr(ENERGY_FP16)

_MOST: Final = 5
"""Bundles of which all fit into the 227 KiB of a program."""
_CHUNK: Final = 2
"""Bundles of a chunk where not all fit: two programs share a multiprocessor, which is worth more
than the scores that larger chunks save."""
_OTHER_BYTES: Final = 4 << 10
"""More than what does not grow with the number of key tiles, beside the stats."""


def shared_bytes(dim: int, n_n: int) -> int:
    """Shared memory that a program needs at most."""
    rows = c.BLOCK_M // c.PLAN_ROW_STRIDE
    step = rows * (_STEP.value * 2 + 4) + _STEP.value * 4  # shares, factors, counts
    return _capacity(n_n) * step + _STEP.value * 4 * c.padded_dim(dim) + _OTHER_BYTES


def takes(dim: int) -> bool:
    """Whether it ranks 16-bit keys with a head_dim."""
    # TMA copies whole swizzled rows, so a mean must fill them.
    return c.padded_dim(dim) in (SWIZZLE.value, 2 * SWIZZLE.value)


def _capacity(n_n: int) -> int:
    """Steps of a chunk, whole bundles: few lengths, few programs to compile."""
    bundles = c.tiles(n_n, _BUNDLE.value * _STEP.value)
    return _BUNDLE.value * (bundles if bundles <= _MOST else _CHUNK)


def _one_chunk(n_n: int) -> bool:
    return n_n <= _capacity(n_n) * _STEP.value


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
) -> Plan:
    """As :func:`cef_compile.kernels.plan.plan`, for 16-bit tensors whose dim it :func:`takes`."""
    batch, heads, q_len, dim = q.shape
    positions = q_len if tokens is None else len(tokens)
    n_m, n_n = c.tiles(positions, c.BLOCK_M), count.shape[1]
    made = empty_plan((batch, heads, n_m, n_n), histogram, keep_energy=keep_energy, device=q.device)
    if made.bins.numel():
        _plan[(n_m, heads, batch)](
            q,
            describe(_panels(stats), step_block(stats.shape[3])),
            count,
            count if tokens is None else tokens,
            made.bins,
            made.histogram if made.energy is None else made.energy,
            made.histogram,
            positions,
            n_n,
            heads // stats.shape[1],
            0 if count.shape[0] == 1 else n_n,
            scale,
            *((n_m, n_n) if exact_tiles is None else exact_tiles),
            *q.stride(),
            **constants(
                dim,
                n_n,
                keep_energy=keep_energy,
                ordered=tokens is not None,
                exact=exact_tiles is not None,
            ),
            **options(n_n),
        )
    return made


def constants(
    dim: int, n_n: int, *, keep_energy: bool, ordered: bool, exact: bool
) -> dict[str, object]:
    """What the kernel is compiled for."""
    shared = compiled_for(dim, keep_energy=keep_energy, ordered=ordered, exact=exact)
    return {
        **shared,
        "WIDTH": c.padded_dim(dim),
        "STEPS": _capacity(n_n),
        "ONE_CHUNK": _one_chunk(n_n),
    }


def options(n_n: int) -> dict[str, int]:
    """How the kernel is compiled.

    Up to 16,384 keys three programs share the registers of a multiprocessor, as they do its memory.
    Where one chunk is not enough, so few would spill.
    """
    return {"num_warps": 4, "maxnreg": 168 if _one_chunk(n_n) else 255}


def _panels(stats: Tensor) -> Tensor:
    """Stats ``[B * Hk, W / 64, Tn, 64]``, panel by panel, as products read shared memory."""
    *_, n_n, width = stats.shape
    return stats.view(-1, n_n, width // SWIZZLE.value, SWIZZLE.value).transpose(1, 2)


def step_block(width: int) -> list[int]:
    """Block of the panels of a step, which TMA copies at once."""
    return [1, width // SWIZZLE.value, _STEP.value, SWIZZLE.value]


@gluon.jit
def _bin_of(rank, BINS_PER_OCTAVE: gl.constexpr, OCTAVES: gl.constexpr, TOP_BIN: gl.constexpr):
    """Rank bin of log2 of a share."""
    bin_ = gl.floor((rank + OCTAVES) * BINS_PER_OCTAVE)
    return gl.minimum(gl.maximum(bin_, 0.0), TOP_BIN).to(gl.int32)


@gluon.jit
def _is_equal(a, b):
    """1.0 where two fp16 numbers are equal and 0.0 elsewhere, two at a time."""
    return gl.inline_asm_elementwise(
        "set.eq.f16x2.f16x2 $0, $1, $2;", "=r,r,r", [a, b], gl.float16, is_pure=True, pack=2
    )


@gluon.jit
def _add_to_histogram(energies, numbers, bin_, mass, visible, pairs, COLUMNS: gl.constexpr):
    """Adds tile pairs to a histogram as products of one-hot matrices: in a fixed order.

    Bin = ``COLUMNS`` * row + column. Two fp16 parts carry 22 bits of each energy.
    """
    layout: gl.constexpr = energies.type.layout
    a_layout: gl.constexpr = gl.DotOperandLayout(0, layout, 2)
    b_layout: gl.constexpr = gl.DotOperandLayout(1, layout, 2)
    bin_ = gl.where(visible, bin_, -COLUMNS)  # in no row
    weight = gl.where(visible, mass, 0.0) * _ENERGY_FP16
    coarse = weight.to(gl.float16)
    _store_flat(pairs.index(0), (bin_ // COLUMNS).to(gl.float16))
    _store_flat(pairs.index(1), (bin_ & (COLUMNS - 1)).to(gl.float16))
    _store_flat(pairs.index(2), coarse)
    _store_flat(pairs.index(3), (weight - coarse.to(gl.float32)).to(gl.float16))
    of_row = gl.expand_dims(pairs.index(0).load(gl.SliceLayout(0, a_layout)), 0)
    row = gl.arange(0, energies.shape[0], gl.SliceLayout(1, a_layout)).to(gl.float16)
    in_row = _is_equal(of_row, gl.expand_dims(row, 1))
    of_column = gl.expand_dims(pairs.index(1).load(gl.SliceLayout(1, b_layout)), 1)
    column = gl.arange(0, energies.shape[1], gl.SliceLayout(0, b_layout)).to(gl.float16)
    in_column = _is_equal(of_column, gl.expand_dims(column, 0))
    coarse = gl.expand_dims(pairs.index(2).load(gl.SliceLayout(1, b_layout)), 1)
    fine = gl.expand_dims(pairs.index(3).load(gl.SliceLayout(1, b_layout)), 1)
    energies = mma_v2(in_row, in_column * coarse, energies)
    energies = mma_v2(in_row, in_column * fine, energies)
    numbers = mma_v2(in_row, in_column, numbers)
    return energies, numbers


@gluon.jit
def _store_flat(memory, values):
    memory.store(gl.reshape(values, [values.numel]))


@gluon.jit(
    do_not_specialize=[
        "positions",
        "n_n",
        "heads_per_key_head",
        "count_b",
        "exact_m",
        "exact_n",
    ]
)
def _plan(
    q, stats_desc, count, tokens, bins, energy, histogram,
    positions, n_n, heads_per_key_head, count_b, scale, exact_m, exact_n,
    q_b, q_h, q_l, q_d,
    DIM: gl.constexpr, WIDTH: gl.constexpr, BLOCK_M: gl.constexpr, ROW_STRIDE: gl.constexpr,
    STEPS: gl.constexpr, ONE_CHUNK: gl.constexpr, SQUARE: gl.constexpr,
    BINS_PER_OCTAVE: gl.constexpr, OCTAVES: gl.constexpr, TOP_BIN: gl.constexpr,
    ENERGY_UNIT: gl.constexpr, KEEP_ENERGY: gl.constexpr, ORDERED: gl.constexpr,
    EXACT: gl.constexpr,
):  # fmt: skip
    """One program per (query tile, head, batch)."""
    dtype: gl.constexpr = stats_desc.dtype
    ROWS: gl.constexpr = BLOCK_M // ROW_STRIDE
    BUNDLES: gl.constexpr = STEPS // _BUNDLE
    gl.static_assert(ROWS == 64, "4 warps multiply 64 rows")
    tile, head, batch = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    n_m, heads = gl.num_programs(0), gl.num_programs(1)
    key_row = batch * (heads // heads_per_key_head) + head // heads_per_key_head
    count += batch * count_b
    n_steps = (n_n + _STEP - 1) // _STEP
    chunks = 1 if ONE_CHUNK else (n_steps + STEPS - 1) // STEPS
    q += batch.to(gl.int64) * q_b + head.to(gl.int64) * q_h

    swizzled: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    plain_2d: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    known = gl.allocate_shared_memory(dtype, [_STEP, 2 * WIDTH], swizzled)
    shares = gl.allocate_shared_memory(gl.float16, [STEPS, ROWS, _STEP], swizzled)
    factors = gl.allocate_shared_memory(gl.float32, [STEPS, ROWS], plain)
    log_counts = gl.allocate_shared_memory(gl.float32, [BUNDLES, _BUNDLE * _STEP], plain)
    pairs = gl.allocate_shared_memory(gl.float16, [4, _BUNDLE * _STEP], plain)
    full = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(full, count=1)
    fence_async_shared()
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _STEP, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, score_layout)
    scale2 = scale * _LOG2E
    given = (q, q_l, q_d, tokens, positions, tile * BLOCK_M, count, n_n, stats_desc, key_row)
    memory = (known, shares, factors, log_counts, full)
    top = gl.full([ROWS], _LOWEST, gl.float32, row_layout)
    total = gl.zeros([ROWS], gl.float32, row_layout)
    waits = 0
    # The first chunk comes last, so that its exponentials are in memory.
    for done in range(chunks):
        top, total, waits = _exponentials(
            given, memory, chunks - 1 - done, top, total, waits, scale2, n_steps,
            DIM, WIDTH, ROW_STRIDE, STEPS, SQUARE, ORDERED, ONE_CHUNK, False, score_layout,
        )  # fmt: skip
    row = tile * BLOCK_M + ROW_STRIDE * gl.arange(0, ROWS, row_layout)
    _at, real = rows_of(row, tokens, positions, ORDERED)
    # A NaN anywhere in a row makes its total NaN. Such a row, and one that is padding or sees
    # nothing, has no energy; a real NaN row puts all tiles of its query tile in the top bin.
    sound = real & (total > 0)
    log_total = gl.where(sound, top + gl.log2(total), float("inf"))
    spoilt = gl.max((real & (total != total)).to(gl.int32), 0) > 0

    # Each warp looks at a step, and each thread at two key tiles and all rows.
    cells: gl.constexpr = gl.BlockedLayout(
        [1, _ROWS_AT_ONCE, _STEP // 32], [1, 1, 32], [_BUNDLE, 1, 1], [2, 1, 0]
    )
    pair_layout: gl.constexpr = gl.SliceLayout(1, cells)
    factor_layout: gl.constexpr = gl.BlockedLayout([1, 2], [1, 32], [_BUNDLE, 1], [1, 0])
    log_total = gl.convert_layout(log_total, gl.SliceLayout(0, factor_layout))
    bundled: gl.constexpr = gl.NVMMASharedLayout(128, 16, 3)
    shares = shares._reinterpret(gl.float16, [BUNDLES, _BUNDLE, ROWS, _STEP], bundled)
    factors = factors._reinterpret(gl.float32, [BUNDLES, _BUNDLE, ROWS], plain_2d)
    log_counts = log_counts._reinterpret(gl.float32, [BUNDLES, _BUNDLE, _STEP], plain_2d)
    beside = gl.expand_dims(gl.arange(0, _STEP, gl.SliceLayout(0, pair_layout)), 0)
    beside += _STEP * gl.expand_dims(gl.arange(0, _BUNDLE, gl.SliceLayout(1, pair_layout)), 1)
    to = ((batch.to(gl.int64) * heads + head) * n_m + tile) * n_n
    counts: gl.constexpr = gl.NVMMADistributedLayout([2, 0], [4, 1], [16, 8])
    COLUMNS: gl.constexpr = (TOP_BIN + 1) // 64
    energies = gl.zeros([64, 8], gl.float32, counts)
    numbers = gl.zeros([64, 8], gl.float32, counts)
    best_rank = gl.full([_BUNDLE, _STEP], float("-inf"), gl.float32, pair_layout)
    best_key = gl.zeros([_BUNDLE, _STEP], gl.int32, pair_layout)
    best_mass = gl.zeros([_BUNDLE, _STEP], gl.float32, pair_layout)
    for chunk in range(chunks):
        if not ONE_CHUNK:
            if chunk > 0:
                _top, _total, waits = _exponentials(
                    given, memory, chunk, top, total, waits, scale2, n_steps,
                    DIM, WIDTH, ROW_STRIDE, STEPS, SQUARE, ORDERED, ONE_CHUNK, True, score_layout,
                )  # fmt: skip
        for bundle in range(_bundles_of(chunk, n_steps, STEPS, ONE_CHUNK)):
            factor = factors.index(bundle).load(factor_layout)
            factors.index(bundle).store(gl.exp2(factor - gl.expand_dims(log_total, 0)))
            key = (chunk * STEPS + bundle * _BUNDLE) * _STEP + beside
            visible = (log_counts.index(bundle).load(pair_layout) > float("-inf")) & (key < n_n)
            largest = gl.zeros([_BUNDLE, _STEP], gl.float32, pair_layout)
            mass = gl.zeros([_BUNDLE, _STEP], gl.float32, pair_layout)
            for part in gl.static_range(ROWS // _ROWS_AT_ONCE):
                factor = factors.index(bundle).slice(part * _ROWS_AT_ONCE, _ROWS_AT_ONCE, 1)
                factor = gl.expand_dims(factor.load(gl.SliceLayout(2, cells)), 2)
                share = shares.index(bundle).slice(part * _ROWS_AT_ONCE, _ROWS_AT_ONCE, 1)
                share = share.load(cells).to(gl.float32) * factor
                largest = gl.maximum(largest, gl.max(share, 1))
                mass += gl.sum(share, 1)
            rank = gl.where(spoilt, 0.0, gl.log2(largest))
            ranked = visible
            if EXACT:
                # Kept whatever it ranks, so in the top bin; and never the best, which is one more.
                exact = (key >= exact_n) | (tile >= exact_m)
                rank = gl.where(exact, 0.0, rank)
                ranked = visible & (~exact)
            bin_ = _bin_of(rank, BINS_PER_OCTAVE, OCTAVES, TOP_BIN)
            gl.store(bins + to + key, bin_.to(gl.uint8), mask=key < n_n)
            if KEEP_ENERGY:
                gl.store(energy + to + key, gl.where(visible, mass, 0.0), mask=key < n_n)
            better = ranked & (rank > best_rank)
            best_rank = gl.where(better, rank, best_rank)
            best_key = gl.where(better, key, best_key)
            best_mass = gl.where(better, mass, best_mass)
            energies, numbers = _add_to_histogram(
                energies, numbers, bin_, mass, visible, pairs, COLUMNS
            )

    # The best tile (the first of equals) moves to the top bin.
    row = gl.arange(0, 64, gl.SliceLayout(1, counts))
    column = gl.arange(0, 8, gl.SliceLayout(0, counts))
    cell = gl.expand_dims(row * COLUMNS, 1) + gl.expand_dims(column, 0)
    rank = gl.max(gl.max(best_rank, 1), 0)
    candidate = gl.where((best_rank == rank) & (rank > float("-inf")), best_key, n_n)
    best = gl.min(gl.min(candidate, 1), 0)
    mass = gl.sum(gl.sum(gl.where(candidate == best, best_mass, 0.0), 1), 0) * _ENERGY_FP16
    barrier()  # the stores to bins come first
    if best < n_n:
        gl.store(bins + to + best, gl.full([], TOP_BIN, gl.uint8))
        bin_ = _bin_of(rank, BINS_PER_OCTAVE, OCTAVES, TOP_BIN)
        moved = (cell == TOP_BIN).to(gl.float32) - (cell == bin_).to(gl.float32)
        numbers += moved
        energies += moved * mass

    inside = gl.expand_dims(column < COLUMNS, 0)
    unit = gl.floor(gl.maximum(energies, 0.0) * (ENERGY_UNIT / _ENERGY_FP16) + 0.5).to(gl.int64)
    gl.atomic_add(histogram + cell, unit, mask=inside & (unit > 0), sem="relaxed")
    number = (numbers + 0.5).to(gl.int64)
    gl.atomic_add(histogram + TOP_BIN + 1 + cell, number, mask=inside & (number > 0), sem="relaxed")


@gluon.jit
def _bundles_of(chunk, n_steps, STEPS: gl.constexpr, ONE_CHUNK: gl.constexpr):
    """Number of bundles of a chunk."""
    left = n_steps - chunk * STEPS
    if not ONE_CHUNK:
        left = gl.minimum(left, STEPS)
    return (left + _BUNDLE - 1) // _BUNDLE


@gluon.jit
def _exponentials(
    given, memory, chunk, top, total, waits, scale2, n_steps,
    DIM: gl.constexpr, WIDTH: gl.constexpr, ROW_STRIDE: gl.constexpr, STEPS: gl.constexpr,
    SQUARE: gl.constexpr, ORDERED: gl.constexpr, ONE_CHUNK: gl.constexpr, AGAIN: gl.constexpr,
    score_layout: gl.constexpr,
):  # fmt: skip
    """One exponential for each score of a chunk; the maximum it is against is kept beside it.

    The second time, ``AGAIN``, that is the maximum of all.
    """
    q, q_l, q_d, tokens, positions, first_row, count, n_n, desc, key_row = given
    known, shares, factors, log_counts, full = memory
    dtype: gl.constexpr = desc.dtype
    ROWS: gl.constexpr = shares.shape[1]
    begin = chunk * STEPS
    end = n_steps
    if not ONE_CHUNK:
        end = gl.minimum(n_steps, begin + STEPS)
    panels = known._reinterpret(dtype, desc.block_shape, desc.layout)
    _fetch(desc, key_row, begin, end, panels, full)

    one = gl.arange(0, _BUNDLE * _STEP, gl.BlockedLayout([1], [32], [_BUNDLE], [0]))
    for bundle in range(_bundles_of(chunk, n_steps, STEPS, ONE_CHUNK)):
        key = (begin + bundle * _BUNDLE) * _STEP + one
        found = gl.load(count + key, mask=key < n_n, other=0)
        log_counts.index(bundle).store(gl.log2(found.to(gl.float32)))  # -inf: hidden
    plain: gl.constexpr = log_counts.type.layout
    log_counts = log_counts._reinterpret(gl.float32, [STEPS, _STEP], plain)

    # The rows of q, by way of the shares' memory, in the registers of those who multiply.
    operand: gl.constexpr = gl.DotOperandLayout(0, score_layout, 2)
    q_layout: gl.constexpr = whole_lines(WIDTH, 4)
    row = first_row + ROW_STRIDE * gl.arange(0, ROWS, gl.SliceLayout(1, q_layout))
    at, real = rows_of(row, tokens, positions, ORDERED)
    dims = gl.arange(0, WIDTH, gl.SliceLayout(0, q_layout))
    used = gl.expand_dims(real, 1) & gl.expand_dims(dims < DIM, 0)
    where = gl.expand_dims(at.to(gl.int64) * q_l, 1) + gl.expand_dims(dims.to(gl.int64) * q_d, 0)
    staged = shares._reinterpret(dtype, [1, ROWS, WIDTH], shares.type.layout).index(0)
    staged.store(gl.load(q + where, mask=used, other=0.0))
    rows = staged.load(operand)
    wide = rows.to(gl.float32)
    squares = (wide * wide * SQUARE).to(dtype)

    score = gl.zeros([ROWS, _STEP], gl.float32, score_layout)
    keys = known.permute((1, 0))
    for step in range(begin, end):
        mbarrier.wait(full, waits & 1)
        waits += 1
        score = warpgroup_mma(rows, keys.slice(0, WIDTH, 0), score, use_acc=False, is_async=True)
        score = warpgroup_mma(squares, keys.slice(WIDTH, WIDTH, 0), score, is_async=True)
        # The operands go through the wait so that the assembler does not make them anew each time.
        score, rows, squares = warpgroup_mma_wait(0, deps=(score, rows, squares))
        barrier()  # all warps are done with these stats
        _fetch(desc, key_row, step + 1, end, panels, full)
        log_count = log_counts.index(step - begin).load(gl.SliceLayout(0, score_layout))
        exponent = score * scale2 + gl.expand_dims(log_count, 0)
        past = top
        if not AGAIN:
            top = gl.maximum(past, gl.max(exponent, 1))
        share = gl.exp2(exponent - gl.expand_dims(top, 1))
        if not AGAIN:
            total = total * gl.exp2(past - top) + gl.sum(share, 1)
        # What is stored holds no NaN: a maximum passes over it.
        shares.index(step - begin).store(gl.maximum(share, 0.0).to(gl.float16))
        factors.index(step - begin).store(top)
    return top, total, waits


@gluon.jit
def _fetch(desc, key_row, step, end, panels, full):
    """Brings the stats of a step, if it comes before the end."""
    BYTES: gl.constexpr = panels.numel * 2
    there = step < end
    mbarrier.expect(full, BYTES, pred=there)
    tma.async_copy_global_to_shared(desc, [key_row, 0, step * _STEP, 0], full, panels, pred=there)
