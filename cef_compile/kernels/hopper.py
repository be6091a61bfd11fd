"""Step 4 of the planned filter on Hopper: what ``attend`` does, one level lower, in Gluon.

A program is three groups of warps that run on their own, as in FlashAttention-3 (arXiv 2407.08608):
one warp brings listed tiles of k and v into shared memory, and two groups of 4 warps take half of
the query tile each. A group computes the scores of one step while the weights of the step before
meet their values, so that the tensor cores work while exponentials are taken. A step is two listed
tiles: products of 128 keys use the tensor cores better than those of 64.
"""

from __future__ import annotations

import functools
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
    warpgroup_mma_wait,
)

from cef_compile.kernels import config as c
from cef_compile.kernels.gluon_parts import (
    SWIZZLE,
    describe,
    line,
    part_sums,
    rows_at,
    tile_block,
    whole_lines,
)
from cef_compile.kernels.int8_scores import as_numbers, int8_scores, int8_softmax_step
from cef_compile.kernels.products import (
    add_values,
    main_part,
    no_values,
    rest_part,
    scores,
    times,
)

_LN2 = gl.constexpr(math.log(2.0))
_LOG2E = gl.constexpr(math.log2(math.e))
_PAIR = gl.constexpr(2)
"""Listed tiles of one step."""
_GROUPS = gl.constexpr(2)
"""Groups of 4 warps that compute; each has ``BLOCK_M / 2`` query rows."""

_STAGES: Final = 3
"""Steps of k and v that shared memory holds: with head_dim 128 no more fit."""
_INT8_STAGES: Final = 4
"""The same where keys have 8 bits."""
OPTIONS: Final = {"num_warps": 4, "maxnreg": 168}
"""Warps of a group that computes, and registers of a thread when the program starts: three times 4
warps share 65,536."""
_CONSUMER_REGISTERS: Final = 240
"""Of a thread that computes, once the copying warp has given up its own."""
_PRODUCER_REGISTERS: Final = 24


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    count: Tensor,
    order: Tensor,
    queue: Tensor,
    *,
    scale: float,
    key_mask: Tensor | None = None,
    tokens: Tensor | None = None,
    int8: tuple[Tensor, Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of each query tile over the key tiles of its list.

    Args:
        q: ``[B, H, q_len, D]``, any strides; k ``[B, Hk, kv_len, D]``, v ``[B, Hk, kv_len, Dv]``,
            strides that TMA takes; bf16 or fp16; ``D`` and ``Dv`` multiples of 8 up to 128.
            With ``int8`` q and k are int8, and ``D`` is 128.
        index, count, order, queue: of :class:`~cef_compile.kernels.lists.Lists`.
        scale: factor of the scores.
        key_mask: bool ``[B or 1, kv_len]``, any strides.
        tokens: int32 ``[length]``, a token order: as for the Triton kernel.
        int8: ``row_scale``, ``row_shift`` and ``key_scale`` of q and k in 8 bits, all contiguous:
            see :class:`~cef_compile.kernels.eight_bits.EightBits`.

    Returns:
        out ``[B, H, q_len, Dv]`` in (B, q_len, H, Dv) memory order, and lse float32
        ``[B, H, q_len]`` of the listed tiles.
    """
    batch, heads, q_len, head_dim = q.shape
    _, key_heads, kv_len, value_dim = v.shape
    positions = q_len if tokens is None else len(tokens)
    n_m, n_n = c.tiles(positions, c.BLOCK_M), c.tiles(kv_len, c.BLOCK_N)
    out = v.new_empty(batch, q_len, heads, value_dim).transpose(1, 2)
    lse = torch.empty(batch, heads, q_len, dtype=torch.float32, device=q.device)
    if not lse.numel():
        return out, lse
    total = batch * heads * n_m
    _attend[(min(total, _multiprocessors(q.device)),)](
        q,
        describe(k, tile_block(line(k))),
        describe(v, tile_block(line(v))),
        q if key_mask is None else key_mask,
        index if tokens is None else tokens,
        index,
        count,
        order,
        queue,
        out,
        lse,
        q_len,
        positions,
        kv_len,
        n_m,
        n_n,
        heads,
        heads // key_heads,
        total,
        scale,
        *q.stride(),
        *out.stride()[:3],
        *c.mask_strides(key_mask),
        *(int8 or (None, None, None)),
        **constants(
            head_dim,
            value_dim,
            masked=key_mask is not None,
            ordered=tokens is not None,
            int8=int8 is not None,
        ),
        **OPTIONS,
    )
    return out, lse


def constants(
    head_dim: int, value_dim: int, *, masked: bool, ordered: bool, int8: bool = False
) -> dict[str, object]:
    """What the kernel is compiled for."""
    return {
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_M": c.BLOCK_M,
        "BLOCK_N": c.BLOCK_N,
        "STAGES": _INT8_STAGES if int8 else _STAGES,
        "HAS_MASK": masked,
        "ORDERED": ordered,
        "INT8": int8,
        "CONSUMER_REGISTERS": _CONSUMER_REGISTERS,
        "PRODUCER_REGISTERS": _PRODUCER_REGISTERS,
    }


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@gluon.constexpr_function
def _width(dim):
    """Channels that shared memory holds: TMA fills it with zeros beyond ``dim``."""
    return 64 if dim <= 64 else 128


@gluon.jit
def _place(slot, order, n_m, heads):
    """Query tile, batch, head and row of the lists of a slot, which is a place in ``order``."""
    row = gl.load(order + slot)
    batch_head = row // n_m
    return row % n_m, batch_head // heads, batch_head % heads, row.to(gl.int64)


@gluon.jit
def _copy(
    desc, batch, key_head, keys, tiles, stage, full, empty, free,
    WIDTH: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Two tiles of k or v into the memory of a step, once that is free."""
    CHANNELS: gl.constexpr = desc.block_type.shape[3]
    PARTS: gl.constexpr = WIDTH // CHANNELS
    mbarrier.wait(empty.index(stage), free)
    mbarrier.expect(full.index(stage), _PAIR * BLOCK_N * PARTS * 2 * SWIZZLE)
    for part in gl.static_range(PARTS):
        for i in gl.static_range(_PAIR):
            tma.async_copy_global_to_shared(
                desc,
                [batch, key_head, keys[i], part * CHANNELS],
                full.index(stage),
                tiles.index((stage * PARTS + part) * _PAIR + i),
            )


@gluon.jit
def _produce(
    k_desc, v_desc, k_tiles, v_tiles, bars, lists, sizes, queue, slots,
    K_WIDTH: gl.constexpr, V_WIDTH: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """One warp: takes query tiles from the queue and copies their listed tiles of k and v."""
    k_full, k_empty, v_full, v_empty, slot_full, slot_empty, _blanked = bars
    index, count, order = lists
    n_m, n_n, heads, heads_per_key_head, total_tiles, _q_len, _positions, _kv_len = sizes
    one_layout: gl.constexpr = gl.BlockedLayout([1], [32], [1], [0])
    step = 0
    turn = 0
    slot = gl.program_id(0)
    while slot < total_tiles:
        _tile, batch, head, row = _place(slot, order, n_m, heads)
        key_head = head // heads_per_key_head
        listed = gl.load(count + row)
        here = index + row * n_n
        last = gl.maximum(listed - 1, 0)
        # The numbers of the next tiles are read one step ahead. Where a list has an odd length its
        # last tile comes twice, and the second is masked.
        one = gl.load(here).to(gl.int32)
        two = gl.load(here + gl.minimum(1, last)).to(gl.int32)
        for first in range(0, listed, _PAIR):
            keys = (one * BLOCK_N, two * BLOCK_N)
            one = gl.load(here + gl.minimum(first + 2, last)).to(gl.int32)
            two = gl.load(here + gl.minimum(first + 3, last)).to(gl.int32)
            stage = step % STAGES
            free = (step // STAGES) & 1 ^ 1
            _copy(
                k_desc, batch, key_head, keys, k_tiles, stage, k_full, k_empty, free,
                K_WIDTH, BLOCK_N,
            )  # fmt: skip
            _copy(
                v_desc, batch, key_head, keys, v_tiles, stage, v_full, v_empty, free,
                V_WIDTH, BLOCK_N,
            )  # fmt: skip
            step += 1
        slot = gl.num_programs(0) + gl.atomic_add(queue, 1, sem="relaxed")
        mbarrier.wait(slot_empty, (turn & 1) ^ 1)
        slots.store(gl.full([1], 0, gl.int32, one_layout) + slot)
        mbarrier.arrive(slot_full, count=1)
        turn += 1


@gluon.jit
def _seen(
    first, listed, here, batch, mask, kv_len,
    KEYS: gl.constexpr, BLOCK_N: gl.constexpr, HAS_MASK: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Which of KEYS keys, from a place in a list on, count: of a listed tile, in k, not masked."""
    key_mask, mask_b, mask_l = mask
    column = gl.arange(0, KEYS, layout)
    place = first + column // BLOCK_N
    seen = place < listed
    key = gl.load(here + place, mask=seen, other=0).to(gl.int32) * BLOCK_N + column % BLOCK_N
    seen = seen & (key < kv_len)
    if HAS_MASK:
        hidden = batch.to(gl.int64) * mask_b + key.to(gl.int64) * mask_l
        seen = seen & (gl.load(key_mask + hidden, mask=seen, other=0) != 0)
    return seen


@gluon.jit
def _blank(
    values, first, listed, here, batch, mask, kv_len, blanked, phase,
    GROUP: gl.constexpr, BLOCK_N: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Zeroes the values of hidden keys, which may be NaN: each group those of one listed tile."""
    row_layout: gl.constexpr = gl.SliceLayout(1, layout)
    own = values.slice(GROUP * BLOCK_N, BLOCK_N, 0)
    seen = _seen(
        first + GROUP, listed, here, batch, mask, kv_len, BLOCK_N, BLOCK_N, True, row_layout
    )
    own.store(gl.where(gl.expand_dims(seen, 1), own.load(layout), 0.0))
    fence_async_shared()
    mbarrier.arrive(blanked, count=1)
    mbarrier.wait(blanked, phase)


@gluon.jit
def _softmax_step(score, top, total, scale2):
    """Weights of a score tile against the new row maximum, and what the past shrinks by."""
    new_top = gl.maximum(top, gl.max(score, 1) * scale2)
    # Subtracting a maximum of -inf would make NaN of rows that have met nothing yet.
    anchor = gl.where(new_top == float("-inf"), 0.0, new_top)
    weight = gl.exp2(score * scale2 - gl.expand_dims(anchor, 1))
    shrink = gl.exp2(top - anchor)
    sums = part_sums(weight)
    layout: gl.constexpr = gl.SliceLayout(1, sums.type.layout)
    total = total * gl.expand_dims(gl.convert_layout(shrink, layout), 1) + sums
    return weight, shrink, new_top, total


@gluon.jit
def _inside(real, dims, DIM: gl.constexpr):
    """Mask of the rows and channels that there are."""
    mask = gl.expand_dims(real, 1)
    if dims.shape[0] > DIM:
        mask = mask & gl.expand_dims(dims < DIM, 0)
    return mask


@gluon.jit
def _load_rows(
    query, slot, lists, sizes, tokens,
    GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr, ORDERED: gl.constexpr,
    layout: gl.constexpr,
):  # fmt: skip
    """A group's rows of q, zeros where there is none."""
    WIDTH: gl.constexpr = _width(HEAD_DIM)
    row_layout: gl.constexpr = gl.SliceLayout(1, layout)
    q, q_b, q_h, q_l, q_d = query
    _index, _count, order = lists
    n_m, _n_n, heads, _group, _total_tiles, _q_len, positions, _kv_len = sizes
    tile, batch, head, _row = _place(slot, order, n_m, heads)
    q += batch.to(gl.int64) * q_b + head.to(gl.int64) * q_h
    ROWS: gl.constexpr = BLOCK_M // _GROUPS
    own = tile * BLOCK_M + GROUP * ROWS
    at, real = rows_at(own, tokens, positions, ROWS, ORDERED, row_layout)
    dims = gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    where = gl.expand_dims(at.to(gl.int64) * q_l, 1) + gl.expand_dims(dims.to(gl.int64) * q_d, 0)
    return gl.load(q + where, mask=_inside(real, dims, HEAD_DIM), other=0.0)


@gluon.jit
def _consume(
    q_rows, rows, k_steps, v_steps, bars, lists, sizes, slots, mask, tokens,
    query, eight, output, lse, scale,
    GROUP: gl.constexpr, HEAD_DIM: gl.constexpr, VALUE_DIM: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, STAGES: gl.constexpr, HAS_MASK: gl.constexpr, ORDERED: gl.constexpr,
    INT8: gl.constexpr,
):  # fmt: skip
    """Four warps: attention of half of each query tile over its listed tiles."""
    k_full, k_empty, v_full, v_empty, slot_full, slot_empty, blanked = bars
    index, count, order = lists
    n_m, n_n, heads, heads_per_key_head, total_tiles, q_len, positions, kv_len = sizes
    out, out_b, out_h, out_l = output
    ROWS: gl.constexpr = BLOCK_M // _GROUPS
    KEYS: gl.constexpr = _PAIR * BLOCK_N
    Q_BITS: gl.constexpr = q_rows.dtype.primitive_bitwidth
    score_layout: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [4, 1], [16, KEYS, 256 // Q_BITS]
    )
    MAIN: gl.constexpr = main_part(VALUE_DIM)
    REST: gl.constexpr = rest_part(VALUE_DIM)
    VALUE_WIDTH: gl.constexpr = _width(VALUE_DIM)
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, MAIN, 16])
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, score_layout)
    key_layout: gl.constexpr = gl.SliceLayout(0, score_layout)
    q_layout: gl.constexpr = whole_lines(_width(HEAD_DIM), 4, Q_BITS)
    value_layout: gl.constexpr = whole_lines(VALUE_WIDTH, 4)
    one_layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    dtype: gl.constexpr = v_steps.dtype

    # Rows of q lie where those of the output will.
    q_rows = q_rows.index(GROUP * (16 // Q_BITS)).slice(0, _width(HEAD_DIM), 1)
    rows = rows.index(GROUP)
    out_rows = rows.slice(0, VALUE_WIDTH, 1)
    scale2 = scale * _LOG2E
    score = gl.zeros([ROWS, KEYS], gl.float32, score_layout)
    step = 0
    turn = 0
    blanks = 0
    slot = gl.program_id(0)
    q_rows.store(
        _load_rows(query, slot, lists, sizes, tokens, GROUP, HEAD_DIM, BLOCK_M, ORDERED, q_layout)
    )
    fence_async_shared()
    while slot < total_tiles:
        tile, batch, head, row = _place(slot, order, n_m, heads)
        listed = gl.load(count + row)
        whole = gl.load(count + total_tiles + row) // _PAIR * _PAIR
        here = index + row * n_n
        if INT8:
            row_scales, row_shifts, key_scales = eight
            at, real = rows_at(
                tile * BLOCK_M + GROUP * ROWS, tokens, positions, ROWS, ORDERED, row_layout
            )
            own_head = (batch * heads + head).to(gl.int64) * q_len
            row_scale = gl.load(row_scales + own_head + at, mask=real, other=0.0) * scale2
            key_head = (batch * heads + head) // heads_per_key_head
            key_scales += key_head.to(gl.int64) * n_n
            # Scales of the tiles of a step, and the numbers of those of the next.
            last = gl.maximum(listed - 1, 0)
            some = listed > 0
            one = gl.load(here, mask=some, other=0).to(gl.int32)
            two = gl.load(here + gl.minimum(1, last), mask=some, other=0).to(gl.int32)
            one_scale = gl.load(key_scales + one)
            two_scale = gl.load(key_scales + two)
            one = gl.load(here + gl.minimum(2, last), mask=some, other=0).to(gl.int32)
            two = gl.load(here + gl.minimum(3, last), mask=some, other=0).to(gl.int32)
        top = gl.full([ROWS], float("-inf"), gl.float32, row_layout)
        total = part_sums(gl.zeros([ROWS, KEYS], gl.float32, score_layout))
        accs = no_values(ROWS, VALUE_DIM)
        weight = gl.zeros([ROWS, KEYS], dtype, weight_layout)
        stage = step % STAGES
        phase = (step // STAGES) & 1
        if listed > 0:
            mbarrier.wait(k_full.index(stage), phase)
            keys = k_steps.index(stage).permute((1, 0))
            if INT8:
                summed = int8_scores(q_rows, keys, score)
            else:
                summed = scores(q_rows, keys, score, HEAD_DIM)
            score = as_numbers(warpgroup_mma_wait(0, deps=(summed,)))
            mbarrier.arrive(k_empty.index(stage), count=1)
            if whole == 0:
                seen = _seen(
                    0, listed, here, batch, mask, kv_len, KEYS, BLOCK_N, HAS_MASK, key_layout
                )
                score = gl.where(gl.expand_dims(seen, 0), score, float("-inf"))
            if INT8:
                exact, _shrink, top, total = int8_softmax_step(
                    score, top, total, row_scale, one_scale, two_scale
                )
            else:
                exact, _shrink, top, total = _softmax_step(score, top, total, scale2)
            weight = gl.convert_layout(exact.to(dtype), weight_layout)
            step += 1
            after = step % STAGES
            after_phase = (step // STAGES) & 1
            mbarrier.wait(k_full.index(after), after_phase, pred=listed > _PAIR)

            for first in range(_PAIR, listed, _PAIR):
                before = stage
                before_phase = phase
                stage = after
                phase = after_phase
                keys = k_steps.index(stage).permute((1, 0))
                if INT8:
                    summed = int8_scores(q_rows, keys, score)
                    one_scale = gl.load(key_scales + one)
                    two_scale = gl.load(key_scales + two)
                    one = gl.load(here + gl.minimum(first + 2, last)).to(gl.int32)
                    two = gl.load(here + gl.minimum(first + 3, last)).to(gl.int32)
                else:
                    summed = scores(q_rows, keys, score, HEAD_DIM)
                mbarrier.wait(v_full.index(before), before_phase)
                if HAS_MASK:
                    if first > whole:
                        _blank(
                            v_steps.index(before), first - _PAIR, listed, here, batch, mask,
                            kv_len, blanked, blanks & 1, GROUP, BLOCK_N, value_layout,
                        )  # fmt: skip
                        blanks += 1
                accs = add_values(accs, weight, v_steps.index(before))
                score = as_numbers(warpgroup_mma_wait(len(accs), deps=(summed,)))
                if first >= whole:
                    seen = _seen(
                        first, listed, here, batch, mask, kv_len, KEYS, BLOCK_N, HAS_MASK,
                        key_layout,
                    )  # fmt: skip
                    score = gl.where(gl.expand_dims(seen, 0), score, float("-inf"))
                if INT8:
                    exact, shrink, top, total = int8_softmax_step(
                        score, top, total, row_scale, one_scale, two_scale
                    )
                else:
                    exact, shrink, top, total = _softmax_step(score, top, total, scale2)
                fresh = exact.to(dtype)
                # The next keys are awaited here, and the fresh weights go through the wait below,
                # for what it keeps the assembler from: moving the exponentials behind that wait,
                # where no product runs beside them. (Triton has no stars in tuples.)
                step += 1
                after = step % STAGES
                after_phase = (step // STAGES) & 1
                mbarrier.wait(k_full.index(after), after_phase, pred=first + _PAIR < listed)
                waited = warpgroup_mma_wait(0, deps=(weight, fresh) + accs)  # noqa: RUF005
                fresh = waited[1]
                accs = waited[2:]
                mbarrier.arrive(k_empty.index(stage), count=1)
                mbarrier.arrive(v_empty.index(before), count=1)
                accs = times(accs, shrink)
                weight = gl.convert_layout(fresh, weight_layout)

        # The next rows are on their way while these are finished.
        mbarrier.wait(slot_full, turn & 1)
        following = gl.max(slots.load(one_layout), 0)
        mbarrier.arrive(slot_empty, count=1)
        turn += 1
        known = gl.minimum(following, total_tiles - 1)
        next_rows = _load_rows(
            query, known, lists, sizes, tokens, GROUP, HEAD_DIM, BLOCK_M, ORDERED, q_layout
        )

        if listed > 0:
            mbarrier.wait(v_full.index(stage), phase)
            if HAS_MASK:
                if whole < listed:
                    _blank(
                        v_steps.index(stage), (listed - 1) // _PAIR * _PAIR, listed, here, batch,
                        mask, kv_len, blanked, blanks & 1, GROUP, BLOCK_N, value_layout,
                    )  # fmt: skip
                    blanks += 1
            accs = add_values(accs, weight, v_steps.index(stage))
            accs = warpgroup_mma_wait(0, deps=(weight,) + accs)[1:]  # noqa: RUF005
            mbarrier.arrive(v_empty.index(stage), count=1)

        row_total = gl.convert_layout(gl.sum(total, 1), row_layout)
        own = tile * BLOCK_M + GROUP * ROWS
        at, real = rows_at(own, tokens, positions, ROWS, ORDERED, row_layout)
        log_energy = (top + gl.log2(row_total)) * _LN2
        if INT8:
            log_energy += gl.load(row_shifts + own_head + at, mask=real, other=0.0)
        gl.store(lse + (batch * heads + head).to(gl.int64) * q_len + at, log_energy, mask=real)
        means = times(accs, 1.0 / gl.where(row_total == 0, 1.0, row_total))
        # Through the memory of the rows, so that whole lines are written.
        out_rows.slice(0, MAIN, 1).store(means[0].to(dtype))
        if REST:
            out_rows.slice(MAIN, REST, 1).store(means[1].to(dtype))
        mean = out_rows.load(value_layout)
        at, real = rows_at(own, tokens, positions, ROWS, ORDERED, gl.SliceLayout(1, value_layout))
        dims = gl.arange(0, VALUE_WIDTH, gl.SliceLayout(0, value_layout))
        # Rows begin at multiples of 8 channels, which strides that are none of 16 do not tell.
        base = out + gl.multiple_of(batch.to(gl.int64) * out_b, 8)
        base += gl.multiple_of(head.to(gl.int64) * out_h, 8)
        row_start = gl.multiple_of(at.to(gl.int64) * out_l, 8)
        where = gl.expand_dims(row_start, 1) + gl.expand_dims(dims, 0)
        gl.store(base + where, mean, mask=_inside(real, dims, VALUE_DIM))
        q_rows.store(next_rows)
        fence_async_shared()
        slot = following


@gluon.jit(
    do_not_specialize=[
        "q_len",
        "positions",
        "kv_len",
        "n_m",
        "n_n",
        "heads",
        "heads_per_key_head",
        "total_tiles",
    ]
)
def _attend(
    q, k_desc, v_desc, key_mask, tokens, index, count, order, queue, out, lse,
    q_len, positions, kv_len, n_m, n_n, heads, heads_per_key_head, total_tiles, scale,
    q_b, q_h, q_l, q_d, out_b, out_h, out_l, mask_b, mask_l, row_scale, row_shift, key_scale,
    HEAD_DIM: gl.constexpr, VALUE_DIM: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr, HAS_MASK: gl.constexpr, ORDERED: gl.constexpr, INT8: gl.constexpr,
    CONSUMER_REGISTERS: gl.constexpr, PRODUCER_REGISTERS: gl.constexpr,
):  # fmt: skip
    """One program per multiprocessor: memory and barriers, then three groups of warps."""
    dtype: gl.constexpr = v_desc.dtype
    k_type: gl.constexpr = k_desc.dtype
    KEYS: gl.constexpr = _PAIR * BLOCK_N
    K_WIDTH: gl.constexpr = _width(HEAD_DIM)
    V_WIDTH: gl.constexpr = _width(VALUE_DIM)
    BITS: gl.constexpr = k_type.primitive_bitwidth
    layout: gl.constexpr = gl.NVMMASharedLayout(128, 16, 2)
    k_layout: gl.constexpr = gl.NVMMASharedLayout(128, BITS, 2)
    one: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    bar: gl.constexpr = mbarrier.MBarrierLayout()
    rows = gl.allocate_shared_memory(
        dtype, [_GROUPS, BLOCK_M // _GROUPS, max(K_WIDTH, V_WIDTH)], layout
    )
    q_rows = rows
    if INT8:
        q_rows = rows._reinterpret(k_type, [2 * _GROUPS, BLOCK_M // _GROUPS, K_WIDTH], k_layout)
    k_steps = gl.allocate_shared_memory(k_type, [STAGES, KEYS, K_WIDTH], k_layout)
    v_steps = gl.allocate_shared_memory(dtype, [STAGES, KEYS, V_WIDTH], layout)
    # The same memory as TMA fills it: for each row of 128 bytes one tile of keys after the other.
    K_CHANNELS: gl.constexpr = k_desc.block_type.shape[3]
    V_CHANNELS: gl.constexpr = v_desc.block_type.shape[3]
    K_COPIES: gl.constexpr = STAGES * _PAIR * K_WIDTH // K_CHANNELS
    V_COPIES: gl.constexpr = STAGES * _PAIR * V_WIDTH // V_CHANNELS
    k_tiles = k_steps._reinterpret(k_type, [K_COPIES, 1, 1, BLOCK_N, K_CHANNELS], k_desc.layout)
    v_tiles = v_steps._reinterpret(dtype, [V_COPIES, 1, 1, BLOCK_N, V_CHANNELS], v_desc.layout)
    k_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    v_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], bar)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_full.index(stage), count=1)
        mbarrier.init(v_full.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=_GROUPS)
        mbarrier.init(v_empty.index(stage), count=_GROUPS)
    slots = gl.allocate_shared_memory(gl.int32, [1], one)
    slot_full = gl.allocate_shared_memory(gl.int64, [1], bar)
    slot_empty = gl.allocate_shared_memory(gl.int64, [1], bar)
    mbarrier.init(slot_full, count=1)
    mbarrier.init(slot_empty, count=_GROUPS)
    blanked = gl.allocate_shared_memory(gl.int64, [1], bar)
    mbarrier.init(blanked, count=_GROUPS)
    fence_async_shared()

    bars = (k_full, k_empty, v_full, v_empty, slot_full, slot_empty, blanked)
    lists = (index, count, order)
    sizes = (n_m, n_n, heads, heads_per_key_head, total_tiles, q_len, positions, kv_len)
    mask = (key_mask, mask_b, mask_l)
    query = (q, q_b, q_h, q_l, q_d)
    eight = (row_scale, row_shift, key_scale) if INT8 else ()
    output = (out, out_b, out_h, out_l)
    gl.warp_specialize(
        [
            (_consume, (
                q_rows, rows, k_steps, v_steps, bars, lists, sizes, slots, mask, tokens,
                query, eight, output, lse, scale,
                0, HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_N, STAGES, HAS_MASK, ORDERED, INT8,
            )),
            (_consume, (
                q_rows, rows, k_steps, v_steps, bars, lists, sizes, slots, mask, tokens,
                query, eight, output, lse, scale,
                1, HEAD_DIM, VALUE_DIM, BLOCK_M, BLOCK_N, STAGES, HAS_MASK, ORDERED, INT8,
            )),
            (_produce, (
                k_desc, v_desc, k_tiles, v_tiles, bars, lists, sizes, queue, slots,
                K_WIDTH, V_WIDTH, BLOCK_N, STAGES,
            )),
        ],
        [4, 1],
        [CONSUMER_REGISTERS, PRODUCER_REGISTERS],
    )  # fmt: skip
