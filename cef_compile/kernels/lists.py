"""Step 3 of the planned filter: the threshold, and the list of each query tile."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cef_compile.kernels import config as c
from cef_compile.kernels.schedule import Lists, append, list_block, room, take_longest_first

_WARPS = 4

_BLOCK_N = tl.constexpr(c.BLOCK_N)
_BINS = tl.constexpr(c.RANK_BINS)
_BINS_PER_OCTAVE = tl.constexpr(c.BINS_PER_OCTAVE)
_OCTAVES = tl.constexpr(c.RANK_OCTAVES)
_TARGET = tl.constexpr(c.CONTROL_TARGET)
_LOG2_THRESHOLD = tl.constexpr(c.CONTROL_LOG2_THRESHOLD)
_FIXED = tl.constexpr(c.CONTROL_FIXED)
_DENSITY = tl.constexpr(c.MEASURE_DENSITY)
_ESTIMATE = tl.constexpr(c.MEASURE_ESTIMATE)
_APPLIED = tl.constexpr(c.MEASURE_LOG2_THRESHOLD)
_ENGINE = tl.constexpr(c.MEASURE_ENGINE)
_SIZE = tl.constexpr(c.MEASURE_SIZE)
_ENERGY_UNIT = tl.constexpr(c.ENERGY_UNIT)
_TOP_BIN = tl.constexpr(c.TOP_BIN)


def lists(
    bins: Tensor,
    energy: Tensor | None,
    count: Tensor,
    histogram: Tensor,
    control: Tensor,
    *,
    rule: str,
    partial: bool,
    want_kept: bool,
    exact_tiles: tuple[int, int] | None = None,
    together: int = 1,
    engine: str = "triton",
) -> tuple[Lists, Tensor, Tensor]:
    """Compact lists of the tiles that a rule keeps, and what they say of the call.

    ``threshold`` keeps the visible pairs from the threshold's bin on, which is the one of
    :func:`~cef_compile.kernels.config.threshold_bin`, or given; ``top_k`` and ``top_p`` are those
    of the reference.

    Args:
        bins, energy: of :class:`~cef_compile.kernels.plan.Plan`; the energy only for top_k, top_p.
        count: int32 ``[B or 1, Tn]``, visible keys of each tile.
        histogram: int64 ``[2, RANK_BINS]`` of the plan.
        control: float32 ``[CONTROL_SIZE]``.
        rule: one of ``PLANNED_RULES``.
        partial: whether a tile may be partly visible.
        want_kept: also return the kept pairs as a mask.
        exact_tiles: first query tile and first key tile of exact tokens: those and all later ones
            are kept whatever the rule says.
        together: heads whose query tiles are ordered as one, longest list first; those of the next
            heads come after. See :func:`~cef_compile.kernels.schedule.heads_together`.
        engine: one of ``ENGINES``, what will compute the attention: to be put on record.

    Returns:
        The lists, the normalised histogram float32 ``[2, RANK_BINS]``, and float32
        ``[MEASURE_SIZE]`` with density, estimate, log2 of the threshold and engine set, the audit's
        places NaN.
    """
    batch, heads, n_m, n_n = bins.shape
    device = bins.device
    found = room(bins, want_kept)
    curve = torch.empty(histogram.shape, device=device)
    measures = torch.empty(c.MEASURE_SIZE, device=device)
    taken = histogram if rule == "threshold" else torch.zeros(2, dtype=torch.int64, device=device)
    total = batch * heads * n_m
    # At least one program: the measures of nothing are measures too.
    _lists[(max(n_m, 1), max(heads, 1), max(batch, 1))](
        bins,
        bins if energy is None else energy,
        count,
        histogram,
        control,
        found.index,
        found.count,
        bins if found.kept is None else found.kept,
        taken,
        curve,
        measures,
        found.queue,
        n_n if total else 0,
        0 if count.shape[0] == 1 else n_n,
        total,
        *((n_m, n_n) if exact_tiles is None else exact_tiles),
        RULE=rule,
        PARTIAL=partial,
        WANT_KEPT=want_kept,
        USED=c.ENGINES.index(engine),
        STEP=list_block(n_n),
        num_warps=_WARPS,
    )
    if rule != "threshold":
        _measure[(1,)](
            histogram,
            taken,
            measures,
            num_warps=_WARPS,
        )
    take_longest_first(found, together)
    return found, curve, measures


@triton.jit
def _threshold_bin(
    energy,
    control,
):
    """Lowest kept bin. Sums are of integers, so that no rounding decides which bin is reached."""
    mass = tl.sum(energy, 0)
    recall = tl.load(control + _TARGET)
    above = mass - tl.cumsum(energy, 0) + energy
    reached = above.to(tl.float64) >= recall.to(tl.float64) * mass.to(tl.float64)
    own = tl.maximum(tl.sum(reached.to(tl.int32), 0) - 1, 0)
    own = tl.where((recall >= 1) | (mass == 0), 0, own)
    given = tl.ceil((tl.load(control + _LOG2_THRESHOLD) + _OCTAVES) * _BINS_PER_OCTAVE)
    given = tl.minimum(tl.maximum(given, 0.0), _BINS - 1).to(tl.int32)
    return tl.where(tl.load(control + _FIXED) > 0, given, own)


@triton.jit
def _record(
    energy,
    number,
    bin_,
    curve,
    measures,
    USED: tl.constexpr,
):
    """Store the normalised histogram and what follows from it and the threshold's bin."""
    bins = tl.arange(0, _BINS)
    mass, pairs = tl.sum(energy, 0), tl.sum(number, 0)
    mass64 = tl.maximum(mass, 1).to(tl.float64)
    pairs64 = tl.maximum(pairs, 1).to(tl.float64)
    tl.store(curve + bins, (energy.to(tl.float64) / mass64).to(tl.float32))
    tl.store(curve + _BINS + bins, (number.to(tl.float64) / pairs64).to(tl.float32))
    kept_mass = tl.sum(tl.where(bins >= bin_, energy, 0), 0).to(tl.float64)
    kept_pairs = tl.sum(tl.where(bins >= bin_, number, 0), 0).to(tl.float64)
    density = tl.where(pairs > 0, kept_pairs / pairs64, 1.0).to(tl.float32)
    estimate = tl.where(mass > 0, kept_mass / mass64, 1.0).to(tl.float32)
    applied = bin_.to(tl.float32) / _BINS_PER_OCTAVE - _OCTAVES
    for at in tl.static_range(_SIZE):
        if at == _DENSITY:
            tl.store(measures + at, density)
        elif at == _ESTIMATE:
            tl.store(measures + at, estimate)
        elif at == _APPLIED:
            tl.store(measures + at, applied)
        elif at == _ENGINE:
            tl.store(measures + at, USED)
        else:  # an audit's alone
            tl.store(measures + at, float("nan"))


@triton.jit
def _measure(
    histogram,
    taken,
    measures,
):
    """One program: density and estimate of a rule that has no threshold."""
    bins = tl.arange(0, _BINS)
    mass = tl.sum(tl.load(histogram + bins), 0)
    pairs = tl.sum(tl.load(histogram + _BINS + bins), 0)
    kept_mass = tl.load(taken).to(tl.float64) / tl.maximum(mass, 1).to(tl.float64)
    kept_pairs = tl.load(taken + 1).to(tl.float64) / tl.maximum(pairs, 1).to(tl.float64)
    tl.store(measures + _DENSITY, tl.where(pairs > 0, kept_pairs, 1.0).to(tl.float32))
    estimate = tl.where(mass > 0, tl.minimum(kept_mass, 1.0), 1.0)
    tl.store(measures + _ESTIMATE, estimate.to(tl.float32))
    tl.store(measures + _APPLIED, float("nan"))


@triton.jit
def _row_step(bins, energy, count, at, n_n, RULE: tl.constexpr):
    """Bin, visible keys and weight (1, or the energy for top_p) of some tiles of one query tile."""
    inside = at < n_n
    bin_ = tl.load(bins + at, mask=inside, other=0).to(tl.int32)
    keys = tl.load(count + at, mask=inside, other=0)
    weight = (keys > 0).to(tl.float32)
    if RULE == "top_p":
        weight = tl.load(energy + at, mask=inside, other=0.0)
    return bin_, keys, weight


@triton.jit(do_not_specialize=["count_b", "total", "exact_m", "exact_n"])
def _lists(
    bins,
    energy,
    count,
    histogram,
    control,
    index,
    counts,
    kept,
    taken,
    curve,
    measures,
    queue,
    n_n,
    count_b,
    total,
    exact_m,
    exact_n,
    RULE: tl.constexpr,
    PARTIAL: tl.constexpr,
    WANT_KEPT: tl.constexpr,
    USED: tl.constexpr,
    STEP: tl.constexpr,
):
    """One program per (query tile, head, batch). Each finds the threshold: a launch less."""
    n_m, heads = tl.num_programs(0), tl.num_programs(1)
    tile, head, batch = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = (batch.to(tl.int64) * heads + head) * n_m + tile
    masses = tl.load(histogram + tl.arange(0, _BINS))
    cutoff = _threshold_bin(masses, control)
    if row == 0:
        tl.store(queue, 0)
        numbers = tl.load(histogram + _BINS + tl.arange(0, _BINS))
        _record(masses, numbers, cutoff, curve, measures, USED)
    bins += row * n_n
    energy += row * n_n
    index += row * n_n
    kept += row * n_n
    count += batch * count_b
    step = tl.arange(0, STEP)

    # For top_k and top_p another lowest bin, and how much of it is wanted.
    wanted = 0.0
    above = 0.0
    if RULE != "threshold":
        target = tl.load(control + _TARGET)
        sum_ = 0.0
        for start in range(0, n_n, STEP):
            _, _, weight = _row_step(bins, energy, count, start + step, n_n, RULE)
            sum_ += tl.sum(weight, 0)
        wanted = target * sum_
        if RULE == "top_k":
            wanted = tl.ceil(wanted)
        elif target >= 1:
            wanted = float("inf")
        cutoff = 0
        high = _TOP_BIN
        while cutoff < high:
            middle = (cutoff + high + 1) // 2
            sum_ = 0.0
            for start in range(0, n_n, STEP):
                bin_, _, weight = _row_step(bins, energy, count, start + step, n_n, RULE)
                sum_ += tl.sum(tl.where(bin_ >= middle, weight, 0.0), 0)
            if sum_ >= wanted:
                cutoff = middle
            else:
                high = middle - 1
                above = sum_
    # `above` is the weight beyond the cutoff: the last sum that fell short was that of cutoff + 1.

    listed = 0
    whole = 0
    mass = 0.0
    for phase in tl.static_range(2 if PARTIAL else 1):
        before = above
        first = 0  # tiles of the top bin met: the first is the best of those rules
        for start in range(0, n_n, STEP):
            at = start + step
            bin_, keys, weight = _row_step(bins, energy, count, at, n_n, RULE)
            keep = (keys > 0) & (bin_ >= cutoff)
            if RULE != "threshold":
                even = keep & (bin_ == cutoff)
                tied = tl.where(even, weight, 0.0)
                spent = before + tl.cumsum(tied, 0) - tied
                before += tl.sum(tied, 0)
                keep = keep & ((bin_ > cutoff) | (spent < wanted))
                if RULE == "top_p":
                    best = (keys > 0) & (bin_ == _TOP_BIN)
                    place = first + tl.cumsum(best.to(tl.int32), 0)
                    first += tl.sum(best.to(tl.int32), 0)
                    keep = keep | (best & (place == 1))
                keep = keep | ((keys > 0) & ((at >= exact_n) | (tile >= exact_m)))
            if WANT_KEPT:
                if phase == 0:
                    tl.store(kept + at, keep.to(tl.uint8), mask=at < n_n)
            if RULE != "threshold":
                if phase == 0:
                    mass += tl.sum(
                        tl.where(keep, tl.load(energy + at, mask=keep, other=0.0), 0.0), 0
                    )
            if PARTIAL:
                if phase == 0:
                    keep = keep & (keys == _BLOCK_N)
                else:
                    keep = keep & (keys < _BLOCK_N)
            listed = append(index, listed, at, keep)
        if phase == 0:
            whole = listed
    tl.store(counts + row, listed, mask=row < total)
    tl.store(counts + total + row, whole, mask=row < total)
    if RULE != "threshold":
        tl.atomic_add(taken, tl.floor(mass * _ENERGY_UNIT + 0.5).to(tl.int64), sem="relaxed")
        tl.atomic_add(taken + 1, tl.cast(listed, tl.int64), sem="relaxed")
