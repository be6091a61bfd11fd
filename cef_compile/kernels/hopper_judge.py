"""Which key tiles the online filter keeps, on Hopper, in Gluon.

A program has a query tile, and goes through all key tiles: scores, a verdict of all rows, and what
that means for the ledger. Values have no part in it: what is kept is written down, and attention
over lists computes it. So a program needs few registers, and where one waits for keys, scores or a
verdict, three others on the same multiprocessor compute. A verdict is a barrier, behind which the
memory of the keys just judged is free: no warp is needed to guard it.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from cef_compile.kernels import config as c
from cef_compile.kernels.gluon_parts import describe, rows_at, tile_block, whole_lines
from cef_compile.kernels.ledger import accounts

_LOG2E = gl.constexpr(math.log2(math.e))
_RECALL_UNIT = gl.constexpr(c.RECALL_UNIT)
OPTIONS: Final = {"num_warps": 8, "maxnreg": 64}
"""So that four programs fit a multiprocessor, whose 65,536 registers they share ..."""
_PROGRAM_BYTES: Final = (228 // 4 - 2) * 1024
"""... and its shared memory, of which each leaves some to the system and to what is small."""


def judge(
    q: Tensor,
    k: Tensor,
    control: Tensor,
    *,
    scale: float,
    even: float,
    key_mask: Tensor | None,
    rule: str,
    certify: str,
    bound: bool,
    tokens: Tensor | None = None,
    exact_tiles: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Decide in one pass over all key tiles, as the Triton kernel does.

    The two agree but where rounding does: that kernel sums in another order.

    Args:
        q, k: bf16 or fp16, head_dim 64 or 128; k with strides that TMA takes.
        control, scale, even, key_mask, rule, certify, bound, tokens, exact_tiles: as for that
            kernel.

    Returns:
        uint8 ``[B, H, Tm, Tn]``, ``JUDGED_WHOLE`` or ``JUDGED_PARTLY`` where a tile is kept whose
        keys all are visible or not, else 0; recall, kept and sums, as that kernel's.
    """
    batch, heads, q_len, dim = q.shape
    key_heads, kv_len = k.shape[1], k.shape[2]
    positions = q_len if tokens is None else len(tokens)
    n_m, n_n = c.tiles(positions, c.BLOCK_M), c.tiles(kv_len, c.BLOCK_N)
    judged = torch.zeros(batch, heads, n_m, n_n, dtype=torch.uint8, device=q.device)
    recall, kept, sums = accounts(q, n_m)
    if recall.numel():
        _judge[(n_m * heads * batch,)](
            q,
            describe(k, tile_block(dim)),
            q if key_mask is None else key_mask,
            control,
            kept if tokens is None else tokens,
            judged,
            recall,
            kept,
            sums,
            q_len,
            positions,
            kv_len,
            n_m,
            n_n,
            heads,
            heads // key_heads,
            scale,
            even,
            *((n_m, n_n) if exact_tiles is None else exact_tiles),
            *q.stride(),
            *c.mask_strides(key_mask),
            **constants(
                dim,
                ragged=kv_len % c.BLOCK_N != 0,
                masked=key_mask is not None,
                same_length=q_len == kv_len or tokens is not None,
                ordered=tokens is not None,
                exact=exact_tiles is not None,
                rule=rule,
                certify=certify,
                bound=bound,
            ),
            **OPTIONS,
        )
    return judged, recall, kept, sums


def constants(
    dim: int,
    *,
    ragged: bool,
    masked: bool,
    same_length: bool,
    ordered: bool,
    exact: bool,
    rule: str,
    certify: str,
    bound: bool,
) -> dict[str, object]:
    """What the kernel is compiled for."""
    return {
        "DIM": dim,
        "BLOCK_M": c.BLOCK_M,
        "BLOCK_N": c.BLOCK_N,
        "COUNT_BLOCK": c.COUNT_BLOCK,
        "STAGES": (_PROGRAM_BYTES - c.BLOCK_M * dim * 2) // (c.BLOCK_N * dim * 2),
        "RAGGED": ragged,
        "HAS_MASK": masked,
        "SAME_LENGTH": same_length,
        "ORDERED": ordered,
        "EXACT": exact,
        "RULE": rule,
        "CERTIFY": certify,
        "BOUND": bound,
        "WHOLE": c.JUDGED_WHOLE,
        "PARTLY": c.JUDGED_PARTLY,
        "STRIDE": c.ONLINE_MAX_STRIDE,
        "TARGET": c.CONTROL_TARGET,
        "LOG2_THRESHOLD": c.CONTROL_LOG2_THRESHOLD,
        "FIXED": c.CONTROL_FIXED,
        "WARPS": OPTIONS["num_warps"],
    }


@gluon.jit
def _first_key(step, start, n_n, BLOCK_N: gl.constexpr):
    """First key of the tile that comes ``step`` tiles after the first, around the end."""
    tile = start + step
    return gl.where(tile >= n_n, tile - n_n, tile) * BLOCK_N


@gluon.jit
def _seen(first, batch, mask, kv_len, BLOCK_N: gl.constexpr, layout: gl.constexpr):
    """Which keys of a tile are inside k and not masked."""
    key_mask, mask_b, mask_l = mask
    key = first + gl.arange(0, BLOCK_N, layout)
    inside = key < kv_len
    where = batch.to(gl.int64) * mask_b + key.to(gl.int64) * mask_l
    return gl.load(key_mask + where, mask=inside, other=0) != 0


@gluon.jit
def _visible(
    batch, mask, n_n, kv_len, BLOCK_N: gl.constexpr, COUNT_BLOCK: gl.constexpr, layout: gl.constexpr
):
    """Number of key tiles with a key that counts."""
    key_mask, mask_b, mask_l = mask
    within = gl.arange(0, BLOCK_N, gl.SliceLayout(0, layout))
    found = 0
    for at in range(0, n_n, COUNT_BLOCK):
        tile = at + gl.arange(0, COUNT_BLOCK, gl.SliceLayout(1, layout))
        key = gl.expand_dims(tile * BLOCK_N, 1) + gl.expand_dims(within, 0)
        where = batch.to(gl.int64) * mask_b + key.to(gl.int64) * mask_l
        seen = gl.load(key_mask + where, mask=key < kv_len, other=0) != 0
        found += gl.sum(gl.max(seen.to(gl.int32), 1), 0)
    return found


@gluon.jit
def _log2_threshold(
    control, even,
    RULE: gl.constexpr, CERTIFY: gl.constexpr, TARGET: gl.constexpr,
    LOG2_THRESHOLD: gl.constexpr, FIXED: gl.constexpr,
):  # fmt: skip
    """log2 of the threshold given in ``control``, else of the rule's own for the wanted recall."""
    if RULE == "share" and CERTIFY != "none":
        own = float("inf")
    else:
        own = gl.log2((1.0 - gl.load(control + TARGET)) * even)
    return gl.where(gl.load(control + FIXED) > 0, gl.load(control + LOG2_THRESHOLD), own)


@gluon.jit
def _bring(desc, batch, key_head, first, tiles, stage, full, wanted):
    """A tile of keys on its way into the memory of a stage, if it is wanted."""
    BYTES: gl.constexpr = tiles.shape[3] * tiles.shape[4] * 2
    mbarrier.expect(full.index(stage), BYTES, pred=wanted)
    tma.async_copy_global_to_shared(
        desc, [batch, key_head, first, 0], full.index(stage), tiles.index(stage), pred=wanted
    )


@gluon.jit
def _sum2(a, b, c, d):
    """Of two numbers at once, which takes one exchange between warps, not two."""
    return a + c, b + d


@gluon.jit
def _affordable(
    energy, gathered, lost, real, rows, budget, left,
    CERTIFY: gl.constexpr, STRIDE: gl.constexpr,
):  # fmt: skip
    """For each row, whether the budget lets this tile go: that of all rows, or its own."""
    per_kept = 1.0 / gathered
    spent, cost = lost * per_kept, energy * per_kept
    if CERTIFY == "mean":
        spent, cost = gl.reduce((gl.where(real, spent, 0.0), gl.where(real, cost, 0.0)), 0, _sum2)
        spent, cost = spent / rows, cost / rows
    return (spent + cost <= budget) & (cost <= STRIDE * (budget - spent) / left)


@gluon.jit
def _unanimous(yes, votes, WARPS: gl.constexpr):
    """1 where all rows say yes, else 0: a barrier that counts, in place of a tree of exchanges."""
    gl.static_assert(yes.shape[0] == 16 * WARPS, "the vote is one of two rows a thread")
    said = gl.inline_asm_elementwise(
        """{
            .reg .pred mine, all;
            setp.ne.s32 mine, $2, 0;
            setp.ne.and.s32 mine, $3, 0, mine;
            barrier.cta.red.and.pred all, 0, mine;
            selp.s32 $0, 1, 0, all;
            mov.b32 $1, $0;
        }""",
        "=r,=r,r,r",
        [yes.to(gl.int32)],
        dtype=gl.int32,
        is_pure=False,
        pack=2,  # the rows of a thread
    )
    votes.store(said)
    one: gl.constexpr = gl.BlockedLayout([1], [32], [WARPS], [0])
    return gl.max(votes.slice(0, 1).load(one), 0)


@gluon.jit
def _anchor(top):
    """What weights are measured against: subtracting a maximum of -inf would make NaN."""
    return gl.where(top == float("-inf"), 0.0, top)


@gluon.jit
def _energy(score, anchor, scale2):
    """Of a tile, against the anchor of each row."""
    return gl.sum(gl.exp2(score * scale2 - gl.expand_dims(anchor, 1)), 1)


@gluon.jit(
    do_not_specialize=[
        "q_len",
        "positions",
        "kv_len",
        "n_m",
        "n_n",
        "heads",
        "heads_per_key_head",
        "exact_m",
        "exact_n",
    ]
)
def _judge(
    q, k_desc, key_mask, control, tokens, judged, recall, kept, sums,
    q_len, positions, kv_len, n_m, n_n, heads, heads_per_key_head, scale, even, exact_m, exact_n,
    q_b, q_h, q_l, q_d, mask_b, mask_l,
    DIM: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    COUNT_BLOCK: gl.constexpr, STAGES: gl.constexpr,
    RAGGED: gl.constexpr, HAS_MASK: gl.constexpr, SAME_LENGTH: gl.constexpr,
    ORDERED: gl.constexpr, EXACT: gl.constexpr, RULE: gl.constexpr, CERTIFY: gl.constexpr,
    BOUND: gl.constexpr, WHOLE: gl.constexpr, PARTLY: gl.constexpr,
    STRIDE: gl.constexpr, TARGET: gl.constexpr,
    LOG2_THRESHOLD: gl.constexpr, FIXED: gl.constexpr, WARPS: gl.constexpr,
):  # fmt: skip
    """One program per query tile, a head's tiles side by side."""
    dtype: gl.constexpr = k_desc.dtype
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    score_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BLOCK_N, 16])
    row_layout: gl.constexpr = gl.SliceLayout(1, score_layout)
    key_layout: gl.constexpr = gl.SliceLayout(0, score_layout)
    wide: gl.constexpr = whole_lines(DIM, WARPS)

    rows = gl.allocate_shared_memory(dtype, [BLOCK_M, DIM], layout)
    k_steps = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, DIM], layout)
    # The same memory, as the copies know it.
    k_tiles = k_steps._reinterpret(dtype, [STAGES, 1, 1, BLOCK_N, DIM], k_desc.layout)
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    votes = gl.allocate_shared_memory(gl.int32, [BLOCK_M], flat)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    for i in gl.static_range(STAGES):
        mbarrier.init(k_full.index(i), count=1)
    fence_async_shared()

    tile = gl.program_id(0) % n_m
    batch_head = gl.program_id(0) // n_m
    batch = batch_head // heads
    head = batch_head % heads
    key_head = head // heads_per_key_head
    if SAME_LENGTH:
        start = gl.minimum(tile * BLOCK_M // BLOCK_N, n_n - 1)
    else:
        start = (tile.to(gl.int64) * n_n // n_m).to(gl.int32)
    for i in gl.static_range(STAGES):
        early = _first_key(i, start, n_n, BLOCK_N)
        _bring(k_desc, batch, key_head, early, k_tiles, i, k_full, i < n_n)

    at, real = rows_at(tile * BLOCK_M, tokens, positions, BLOCK_M, ORDERED, gl.SliceLayout(1, wide))
    dims = gl.arange(0, DIM, gl.SliceLayout(0, wide))
    used = gl.expand_dims(real, 1)
    places = gl.expand_dims(at.to(gl.int64) * q_l, 1) + gl.expand_dims(dims.to(gl.int64) * q_d, 0)
    q += batch.to(gl.int64) * q_b + head.to(gl.int64) * q_h
    rows.store(gl.load(q + places, mask=used, other=0.0))
    fence_async_shared()

    at, real = rows_at(tile * BLOCK_M, tokens, positions, BLOCK_M, ORDERED, row_layout)
    mask = (key_mask, mask_b, mask_l)
    target = gl.load(control + TARGET)
    log2_threshold = _log2_threshold(control, even, RULE, CERTIFY, TARGET, LOG2_THRESHOLD, FIXED)
    scale2 = scale * _LOG2E
    threshold = gl.exp2(log2_threshold)
    budget = (1.0 - target) / target
    visible = n_n
    if HAS_MASK:
        visible = _visible(batch, mask, n_n, kv_len, BLOCK_N, COUNT_BLOCK, wide)
    present = gl.sum(real.to(gl.float32), 0)
    judged += gl.program_id(0).to(gl.int64) * n_n
    top = gl.full([BLOCK_M], float("-inf"), gl.float32, row_layout)
    gathered = gl.zeros([BLOCK_M], gl.float32, row_layout)
    lost = gl.zeros([BLOCK_M], gl.float32, row_layout)
    # A product that begins anew ignores the accumulator; zeros in its place cost instructions.
    score = gl.zeros([BLOCK_M, BLOCK_N], gl.float32, score_layout)
    left = visible
    number = n_n * 0  # a tensor, since the loop makes it one

    for step in range(0, n_n):
        first = _first_key(step, start, n_n, BLOCK_N)
        stage = step % STAGES
        mbarrier.wait(k_full.index(stage), (step // STAGES) & 1)
        keys = k_steps.index(stage).permute((1, 0))
        score = warpgroup_mma(rows, keys, score, use_acc=False, is_async=True)
        score = warpgroup_mma_wait(0, deps=(score,))

        keys_seen = gl.minimum(kv_len - first, BLOCK_N)
        if HAS_MASK:
            seen = _seen(first, batch, mask, kv_len, BLOCK_N, key_layout)
            keys_seen = gl.sum(seen.to(gl.int32), 0)
            score = gl.where(gl.expand_dims(seen, 0), score, float("-inf"))
        elif RAGGED:
            seen = first + gl.arange(0, BLOCK_N, key_layout) < kv_len
            score = gl.where(gl.expand_dims(seen, 0), score, float("-inf"))
        high = gl.max(score, 1) * scale2
        new_top = gl.maximum(top, high)
        anchor = _anchor(new_top)
        shrink = gl.exp2(top - anchor)
        gathered = gathered * shrink
        lost = lost * shrink
        if BOUND:
            energy = keys_seen.to(gl.float32) * gl.exp2(high - anchor)
        else:
            energy = _energy(score, anchor, scale2)
        if RULE == "share":
            small = energy < threshold * (gathered + lost)
        elif RULE == "lse":
            small = gl.exp2(high - anchor) < threshold * gathered
        else:
            small = high - top < log2_threshold
        if CERTIFY != "none":
            small = small & _affordable(
                energy, gathered, lost, real, present, budget, left.to(gl.float32), CERTIFY, STRIDE
            )
        verdict = _unanimous(small | (real == 0), votes, WARPS)
        drop = (target < 1) & (verdict == 1)
        if EXACT:
            drop = drop & (tile < exact_m) & (first < exact_n * BLOCK_N)
        # A tile that nobody sees has nothing to lose and nothing to give.
        drop = drop | (keys_seen == 0)
        top = new_top
        left -= (keys_seen > 0).to(gl.int32)

        # All warps have voted, so all have their scores: the memory of these keys is free. That
        # the verdict is asked for keeps the copy behind it.
        wanted = (step + STAGES < n_n) & (verdict >= 0)
        then = _first_key(step + STAGES, start, n_n, BLOCK_N)
        _bring(k_desc, batch, key_head, then, k_tiles, stage, k_full, wanted)
        if drop:
            lost += energy
        else:
            if BOUND:
                energy = _energy(score, anchor, scale2)
            gathered += energy
            number += 1
            state = gl.where(keys_seen == BLOCK_N, WHOLE, PARTLY)
            gl.store(judged + first // BLOCK_N, state.to(gl.uint8))

    met = gathered + lost
    # Rounded as it should be: all of what was met is not a little less than all.
    mine = gl.where(met == 0, 1.0, gl.div_rn(gathered, met))
    gl.store(recall + batch_head.to(gl.int64) * q_len + at, mine, mask=real)
    gl.store(kept + gl.program_id(0), number)

    counted = real & (met != 0)  # a row that sees no key has no recall; a NaN row spoils the mean
    nan = counted & (mine != mine)
    units = gl.where(counted & (mine == mine), mine, 0.0) * _RECALL_UNIT
    gl.atomic_add(sums, gl.cast(number, gl.int64), sem="relaxed")
    gl.atomic_add(sums + 1, gl.cast(visible, gl.int64), sem="relaxed")
    gl.atomic_add(sums + 2, gl.sum(gl.floor(units + 0.5).to(gl.int64), 0), sem="relaxed")
    gl.atomic_add(sums + 3, gl.sum(counted.to(gl.int64), 0), sem="relaxed")
    gl.atomic_add(sums + 4, gl.sum(nan.to(gl.int64), 0), sem="relaxed")
