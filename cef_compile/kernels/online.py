"""The online filter: one pass over all key tiles with a moving threshold and an exact ledger."""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from cef_compile.kernels import config as c
from cef_compile.kernels.descriptor import describe
from cef_compile.kernels.ledger import accounts, log2_threshold_of

_LN2 = tl.constexpr(math.log(2.0))
_LOG2E = tl.constexpr(1.4426950408889634)
_RECALL_UNIT = tl.constexpr(c.RECALL_UNIT)
_CHUNK = 32
"""Key tiles after which it is decided again whether values are worth fetching ahead."""


def online(
    q: Tensor,
    k: Tensor,
    v: Tensor,
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
    descriptors: bool,
    warps: int,
    registers: int | None,
    eager_stages: int,
    stages: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Filter in one pass over all key tiles, as the reference of the same name does.

    Args:
        q, k, v, control, scale, key_mask, rule, certify, bound: as for the reference.
        even: what a tile has of the energy where all keys have as much.
        tokens: int32 ``[length]``, a token order, of
            :class:`~cef_compile.kernels.centroids.Arranged`, in which k, v and key_mask are: the
            query at position i of the order is row ``tokens[i]`` of q and of what is returned.
        exact_tiles: first query tile and first key tile of exact tokens.
        descriptors: read k and v through TMA descriptors.
        warps, registers: of each program, and of each of its threads at most.
        eager_stages, stages: of the pipeline where values are fetched ahead, and where not.

    Returns:
        out ``[B, H, q_len, Dv]`` in (B, q_len, H, Dv) memory order; lse and recall of each row,
        float32 ``[B, H, q_len]``; kept tiles int32 ``[B, H, Tm]``; sums int64 ``[ONLINE_SUMS]``.
    """
    batch, heads, q_len, dim = q.shape
    key_heads, kv_len, value_dim = k.shape[1], k.shape[2], v.shape[3]
    positions = q_len if tokens is None else len(tokens)
    n_m = c.tiles(positions, c.BLOCK_M)
    n_n = c.tiles(kv_len, c.BLOCK_N)
    out = q.new_empty(batch, q_len, heads, value_dim).transpose(1, 2)
    recall, kept, sums = accounts(q, n_m)
    lse = torch.empty_like(recall)
    block_d, block_dv = c.padded_dim(dim), c.padded_dim(value_dim)
    if lse.numel():
        _online[(n_m * heads * batch,)](
            q,
            k,
            v,
            describe(k, c.BLOCK_N, block_d) if descriptors else k,
            describe(v, c.BLOCK_N, block_dv) if descriptors else v,
            k if key_mask is None else key_mask,
            control,
            kept if tokens is None else tokens,
            out,
            lse,
            recall,
            kept,
            sums,
            q_len,
            positions,
            kv_len,
            n_m,
            n_n,
            heads,
            heads // key_heads if key_heads else 1,
            scale,
            even,
            *((n_m, n_n) if exact_tiles is None else exact_tiles),
            *q.stride(),
            *k.stride(),
            *v.stride(),
            *out.stride()[:3],
            *c.mask_strides(key_mask),
            DIM=dim,
            VALUE_DIM=value_dim,
            BLOCK_D=block_d,
            BLOCK_DV=block_dv,
            BLOCK_M=c.BLOCK_M,
            BLOCK_N=c.BLOCK_N,
            COUNT_BLOCK=c.COUNT_BLOCK,
            RAGGED=kv_len % c.BLOCK_N != 0,
            HAS_MASK=key_mask is not None,
            SAME_LENGTH=q_len == kv_len or tokens is not None,
            ORDERED=tokens is not None,
            EXACT=exact_tiles is not None,
            DESCRIPTORS=descriptors,
            RULE=rule,
            CERTIFY=certify,
            BOUND=bound,
            STRIDE=c.ONLINE_MAX_STRIDE,
            TARGET=c.CONTROL_TARGET,
            LOG2_THRESHOLD=c.CONTROL_LOG2_THRESHOLD,
            FIXED=c.CONTROL_FIXED,
            PRECISION=c.DOT_PRECISION if q.dtype == torch.float32 else None,
            CHUNK=_CHUNK,
            EAGER_STAGES=eager_stages,
            STAGES=stages,
            num_warps=warps,
            # Not every backend of Triton knows this option.
            **({} if registers is None else {"maxnreg": registers}),
        )
    return out, lse, recall, kept, sums


@triton.jit
def _affordable(
    judged, kept, lost, real, budget, left, CERTIFY: tl.constexpr, STRIDE: tl.constexpr
):
    """Whether the budget lets this tile go: that of the query tile, or that of its every row."""
    spent, cost = lost / kept, judged / kept
    if CERTIFY == "mean":
        rows = tl.sum(real.to(tl.float32), 0)
        spent = tl.sum(tl.where(real, spent, 0.0), 0) / rows
        cost = tl.sum(tl.where(real, cost, 0.0), 0) / rows
        return (spent + cost <= budget) & (cost <= STRIDE * (budget - spent) / left)
    fits = (spent + cost <= budget) & (cost <= STRIDE * (budget - spent) / left)
    return tl.min((fits | ~real).to(tl.int32), 0) == 1


@triton.jit
def _load_keys(
    k, k_desc, key_mask, batch, key_head, first, kv_len, k_l, k_d, mask_l,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr,
    RAGGED: tl.constexpr, HAS_MASK: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """A key tile, which of its keys are visible, and how many."""
    key = first + tl.arange(0, BLOCK_N)
    seen = key < kv_len
    keys_seen = tl.minimum(kv_len - first, BLOCK_N)
    if HAS_MASK:
        mask = tl.load(key_mask + key.to(tl.int64) * mask_l, mask=seen, other=0)
        seen = mask != 0
        keys_seen = tl.sum(seen.to(tl.int32), 0)
    if DESCRIPTORS:
        keys = k_desc.load([batch.to(tl.int32), key_head, first, 0])
        keys = tl.reshape(keys, [BLOCK_N, BLOCK_D])
    else:
        dims = tl.arange(0, BLOCK_D)
        place = key.to(tl.int64)[:, None] * k_l + dims.to(tl.int64)[None, :] * k_d
        inside = (key < kv_len)[:, None] & (dims < DIM)[None, :]
        keys = tl.load(k + place, mask=inside, other=0.0)
    return keys, seen, keys_seen


@triton.jit
def _load_values(
    v, v_desc, seen, batch, key_head, first, kv_len, v_l, v_d,
    VALUE_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_N: tl.constexpr,
    HAS_MASK: tl.constexpr, DESCRIPTORS: tl.constexpr,
):  # fmt: skip
    """A value tile; 0 where hidden, where a NaN would outlive a weight of 0."""
    if DESCRIPTORS:
        values = v_desc.load([batch.to(tl.int32), key_head, first, 0])
        values = tl.reshape(values, [BLOCK_N, BLOCK_DV])
        if HAS_MASK:
            values = tl.where(seen[:, None], values, 0.0)
    else:
        key = first + tl.arange(0, BLOCK_N)
        dims = tl.arange(0, BLOCK_DV)
        place = key.to(tl.int64)[:, None] * v_l + dims.to(tl.int64)[None, :] * v_d
        values = tl.load(v + place, mask=seen[:, None] & (dims < VALUE_DIM)[None, :], other=0.0)
    return values


@triton.jit
def _weights(score, seen, anchor, scale2, MASKED: tl.constexpr):
    """Weights of a tile against the anchor of each row, and their sum."""
    weight = tl.exp2(score * scale2 - anchor[:, None])
    if MASKED:
        weight = tl.where(seen[None, :], weight, 0.0)
    return weight, tl.sum(weight, 1)


@triton.jit
def _judge(
    score, seen, keys_seen, real, exact, top, gathered, lost, scale2, target, threshold,
    log2_threshold, budget, left,
    RAGGED: tl.constexpr, HAS_MASK: tl.constexpr, EXACT: tl.constexpr, RULE: tl.constexpr,
    CERTIFY: tl.constexpr, BOUND: tl.constexpr, STRIDE: tl.constexpr,
):  # fmt: skip
    """Whether a tile goes, and the ledger measured against the new maximum of each row.

    Returns:
        drop; the energy it is judged by; the tile's maximum; the new anchor; gathered and lost
        against it; weights and their sum (unless BOUND, where only a kept tile needs them).
    """
    if RAGGED or HAS_MASK:
        score = tl.where(seen[None, :], score, float("-inf"))
    high = tl.max(score, 1) * scale2
    new_top = tl.maximum(top, high)
    # Subtracting a top of -inf would make NaN of rows that have met nothing yet.
    anchor = tl.where(new_top == float("-inf"), 0.0, new_top)
    shrink = tl.exp2(top - anchor)
    gathered = gathered * shrink
    lost = lost * shrink
    if BOUND:
        weight = score
        judged = keys_seen.to(tl.float32) * tl.exp2(high - anchor)
        energy = judged
    else:
        weight, energy = _weights(score, seen, anchor, scale2, False)
        judged = energy
    if RULE == "share":
        small = judged < threshold * (gathered + lost)
    elif RULE == "lse":
        small = tl.exp2(high - anchor) < threshold * gathered
    else:
        small = high - top < log2_threshold
    drop = (target < 1) & (tl.min((small | ~real).to(tl.int32), 0) == 1)
    if CERTIFY != "none":
        drop = drop & _affordable(
            judged, gathered, lost, real, budget, left.to(tl.float32), CERTIFY, STRIDE
        )
    if EXACT:
        drop = drop & ~exact
    # A tile that nobody sees has nothing to lose and nothing to give.
    drop = drop | (keys_seen == 0)
    return drop, judged, high, anchor, gathered, lost, weight, energy


@triton.jit(
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
def _online(
    q,
    k,
    v,
    k_desc,
    v_desc,
    key_mask,
    control,
    tokens,
    out,
    lse,
    recall,
    kept,
    sums,
    q_len,
    positions,
    kv_len,
    n_m,
    n_n,
    heads,
    heads_per_key_head,
    scale,
    even,
    exact_m,
    exact_n,
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
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    COUNT_BLOCK: tl.constexpr,
    RAGGED: tl.constexpr,
    HAS_MASK: tl.constexpr,
    SAME_LENGTH: tl.constexpr,
    ORDERED: tl.constexpr,
    EXACT: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    RULE: tl.constexpr,
    CERTIFY: tl.constexpr,
    BOUND: tl.constexpr,
    STRIDE: tl.constexpr,
    TARGET: tl.constexpr,
    LOG2_THRESHOLD: tl.constexpr,
    FIXED: tl.constexpr,
    PRECISION: tl.constexpr,
    CHUNK: tl.constexpr,
    EAGER_STAGES: tl.constexpr,
    STAGES: tl.constexpr,
):
    """One program per query tile, a head's tiles side by side."""
    tile = tl.program_id(0) % n_m
    batch_head = tl.program_id(0) // n_m
    batch = (batch_head // heads).to(tl.int64)
    head = batch_head % heads
    key_head = head // heads_per_key_head

    at = tile * BLOCK_M + tl.arange(0, BLOCK_M)
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
    key_mask += batch * mask_b
    where = at.to(tl.int64)[:, None] * q_l + dims.to(tl.int64)[None, :] * q_d
    rows = tl.load(q + where, mask=real[:, None] & (dims < DIM)[None, :], other=0.0)

    target = tl.load(control + TARGET)
    budget = (1.0 - target) / target
    log2_threshold = log2_threshold_of(control, even, RULE, CERTIFY, TARGET, LOG2_THRESHOLD, FIXED)
    threshold = tl.exp2(log2_threshold)

    visible = n_n
    if HAS_MASK:
        visible = 0
        for first in range(0, n_n, COUNT_BLOCK):
            key = (first + tl.arange(0, COUNT_BLOCK))[:, None] * BLOCK_N + within[None, :]
            mask = tl.load(key_mask + key.to(tl.int64) * mask_l, mask=key < kv_len, other=0)
            visible += tl.sum(tl.max((mask != 0).to(tl.int32), 1), 0)

    if SAME_LENGTH:
        start = tl.minimum(tile * BLOCK_M // BLOCK_N, n_n - 1)
    else:
        start = (tile.to(tl.int64) * n_n // n_m).to(tl.int32)
    scale2 = scale * _LOG2E
    top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    # What acc is measured against: it moves only when a tile is kept.
    acc_top = tl.full([BLOCK_M], float("-inf"), tl.float32)
    gathered = tl.zeros([BLOCK_M], tl.float32)
    lost = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    left = visible
    number = 0

    # Where most tiles are kept, values are fetched ahead like keys; elsewhere only when wanted.
    eager = True
    for chunk in range(0, n_n, CHUNK):
        end = tl.minimum(chunk + CHUNK, n_n)
        before = number
        if eager:
            for step in tl.range(chunk, end, num_stages=EAGER_STAGES):
                first = start + step
                first = tl.where(first >= n_n, first - n_n, first) * BLOCK_N
                keys, seen, keys_seen = _load_keys(
                    k, k_desc, key_mask, batch, key_head, first, kv_len, k_l, k_d, mask_l,
                    DIM, BLOCK_D, BLOCK_N, RAGGED, HAS_MASK, DESCRIPTORS,
                )  # fmt: skip
                values = _load_values(
                    v, v_desc, seen, batch, key_head, first, kv_len, v_l, v_d,
                    VALUE_DIM, BLOCK_DV, BLOCK_N, HAS_MASK, DESCRIPTORS,
                )  # fmt: skip
                score = tl.dot(rows, keys.T, input_precision=PRECISION)
                exact = (first >= exact_n * BLOCK_N) | (tile >= exact_m)
                drop, judged, high, anchor, gathered, lost, weight, energy = _judge(
                    score, seen, keys_seen, real, exact, top, gathered, lost, scale2, target,
                    threshold, log2_threshold, budget, left,
                    RAGGED, HAS_MASK, EXACT, RULE, CERTIFY, BOUND, STRIDE,
                )  # fmt: skip
                top = tl.maximum(top, high)
                left -= (keys_seen > 0).to(tl.int32)
                if drop:
                    lost += judged
                else:
                    if BOUND:
                        weight, energy = _weights(score, seen, anchor, scale2, RAGGED or HAS_MASK)
                    number += 1
                    gathered += energy
                    acc = acc * tl.exp2(acc_top - anchor)[:, None]
                    acc = tl.dot(weight.to(values.dtype), values, acc, input_precision=PRECISION)
                    acc_top = top
        else:
            for step in tl.range(chunk, end, num_stages=STAGES):
                first = start + step
                first = tl.where(first >= n_n, first - n_n, first) * BLOCK_N
                keys, seen, keys_seen = _load_keys(
                    k, k_desc, key_mask, batch, key_head, first, kv_len, k_l, k_d, mask_l,
                    DIM, BLOCK_D, BLOCK_N, RAGGED, HAS_MASK, DESCRIPTORS,
                )  # fmt: skip
                score = tl.dot(rows, keys.T, input_precision=PRECISION)
                exact = (first >= exact_n * BLOCK_N) | (tile >= exact_m)
                drop, judged, high, anchor, gathered, lost, weight, energy = _judge(
                    score, seen, keys_seen, real, exact, top, gathered, lost, scale2, target,
                    threshold, log2_threshold, budget, left,
                    RAGGED, HAS_MASK, EXACT, RULE, CERTIFY, BOUND, STRIDE,
                )  # fmt: skip
                top = tl.maximum(top, high)
                left -= (keys_seen > 0).to(tl.int32)
                if drop:
                    lost += judged
                else:
                    if BOUND:
                        weight, energy = _weights(score, seen, anchor, scale2, RAGGED or HAS_MASK)
                    values = _load_values(
                        v, v_desc, seen, batch, key_head, first, kv_len, v_l, v_d,
                        VALUE_DIM, BLOCK_DV, BLOCK_N, HAS_MASK, DESCRIPTORS,
                    )  # fmt: skip
                    number += 1
                    gathered += energy
                    acc = acc * tl.exp2(acc_top - anchor)[:, None]
                    acc = tl.dot(weight.to(values.dtype), values, acc, input_precision=PRECISION)
                    acc_top = top
        eager = 2 * (number - before) > end - chunk

    anchor = tl.where(top == float("-inf"), 0.0, top)
    gone = gathered == 0
    mean = acc * (tl.exp2(acc_top - anchor) / tl.where(gone, 1.0, gathered))[:, None]
    met = gathered + lost
    # Rounded as it should be: all of what was met is not a little less than all.
    mine = tl.where(met == 0, 1.0, tl.div_rn(gathered, met))
    to = batch_head.to(tl.int64) * q_len + at
    tl.store(lse + to, (top + tl.log2(gathered)) * _LN2, mask=real)
    tl.store(recall + to, mine, mask=real)
    tl.store(kept + tl.program_id(0), number)
    out += batch * out_b + head.to(tl.int64) * out_h
    where = at.to(tl.int64)[:, None] * out_l + value_dims[None, :]
    used = real[:, None] & (value_dims < VALUE_DIM)[None, :]
    tl.store(out + where, mean.to(out.dtype.element_ty), mask=used)

    counted = real & (met != 0)  # a row that sees no key has no recall; a NaN row spoils the mean
    nan = counted & (mine != mine)
    units = tl.where(counted & (mine == mine), mine, 0.0) * _RECALL_UNIT
    tl.atomic_add(sums, tl.cast(number, tl.int64), sem="relaxed")
    tl.atomic_add(sums + 1, tl.cast(visible, tl.int64), sem="relaxed")
    tl.atomic_add(sums + 2, tl.sum(tl.floor(units + 0.5).to(tl.int64), 0), sem="relaxed")
    tl.atomic_add(sums + 3, tl.sum(counted.to(tl.int64), 0), sem="relaxed")
    tl.atomic_add(sums + 4, tl.sum(nan.to(tl.int64), 0), sem="relaxed")
