"""A group of 4 warps that computes half of each query tile's attention over its list, on Hopper."""

from __future__ import annotations

import math

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma_wait,
)

from cef_compile.kernels.gluon_parts import (
    GROUPS,
    PAIR,
    part_sums,
    place,
    rows_at,
    whole_lines,
    width,
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
from cef_compile.kernels.rescale import rescale

_LN2 = gl.constexpr(math.log(2.0))
_LOG2E = gl.constexpr(math.log2(math.e))


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
def _scores(rows, keys, score, HEAD_DIM: gl.constexpr, INT8: gl.constexpr):
    """Starts the product of a group's rows with the keys of a step, where scores are like these."""
    if INT8:
        summed = int8_scores(rows, keys, score)
    else:
        summed = scores(rows, keys, score, HEAD_DIM)
    return summed


@gluon.jit
def _weights(score, top, total, scale2, scales, INT8: gl.constexpr):
    """As :func:`_softmax_step`; of scores in 8 bits with the scales of rows and of both tiles."""
    if INT8:
        found = int8_softmax_step(score, top, total, scales[0], scales[1], scales[2])
    else:
        found = _softmax_step(score, top, total, scale2)
    return found


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
    WIDTH: gl.constexpr = width(HEAD_DIM)
    row_layout: gl.constexpr = gl.SliceLayout(1, layout)
    q, q_b, q_h, q_l, q_d = query
    _index, _count, order = lists
    n_m, _n_n, heads, _group, _total_tiles, _q_len, positions, _kv_len = sizes
    tile, batch, head, _row = place(slot, order, n_m, heads)
    q += batch.to(gl.int64) * q_b + head.to(gl.int64) * q_h
    ROWS: gl.constexpr = BLOCK_M // GROUPS
    own = tile * BLOCK_M + GROUP * ROWS
    at, real = rows_at(own, tokens, positions, ROWS, ORDERED, row_layout)
    dims = gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    where = gl.expand_dims(at.to(gl.int64) * q_l, 1) + gl.expand_dims(dims.to(gl.int64) * q_d, 0)
    return gl.load(q + where, mask=_inside(real, dims, HEAD_DIM), other=0.0)


@gluon.jit
def consume(
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
    ROWS: gl.constexpr = BLOCK_M // GROUPS
    KEYS: gl.constexpr = PAIR * BLOCK_N
    Q_BITS: gl.constexpr = q_rows.dtype.primitive_bitwidth
    score_layout: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [4, 1], [16, KEYS, 256 // Q_BITS]
    )
    MAIN: gl.constexpr = main_part(VALUE_DIM)
    REST: gl.constexpr = rest_part(VALUE_DIM)
    VALUE_WIDTH: gl.constexpr = width(VALUE_DIM)
    acc_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, MAIN, 16])
    weight_layout: gl.constexpr = gl.DotOperandLayout(0, acc_layout, 2)
    row_layout: gl.constexpr = gl.SliceLayout(1, score_layout)
    key_layout: gl.constexpr = gl.SliceLayout(0, score_layout)
    q_layout: gl.constexpr = whole_lines(width(HEAD_DIM), 4, Q_BITS)
    value_layout: gl.constexpr = whole_lines(VALUE_WIDTH, 4)
    one_layout: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    dtype: gl.constexpr = v_steps.dtype

    # Rows of q lie where those of the output will.
    q_rows = q_rows.index(GROUP * (16 // Q_BITS)).slice(0, width(HEAD_DIM), 1)
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
        tile, batch, head, row = place(slot, order, n_m, heads)
        listed = gl.load(count + row)
        whole = gl.load(count + total_tiles + row) // PAIR * PAIR
        here = index + row * n_n
        scales = eight  # empty where scores are exact
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
            scales = (row_scale, gl.load(key_scales + one), gl.load(key_scales + two))
            one = gl.load(here + gl.minimum(2, last), mask=some, other=0).to(gl.int32)
            two = gl.load(here + gl.minimum(3, last), mask=some, other=0).to(gl.int32)
        top = gl.full([ROWS], float("-inf"), gl.float32, row_layout)
        total = part_sums(gl.zeros([ROWS, KEYS], gl.float32, score_layout))
        accs = no_values(ROWS, VALUE_DIM)
        exact = gl.zeros([ROWS, KEYS], gl.float32, score_layout)
        shrink = gl.full([ROWS], 1.0, gl.float32, row_layout)
        stage = step % STAGES
        phase = (step // STAGES) & 1
        # Memory of values to be freed; a value of its own, since a loop in Triton does not carry a
        # name for what has another name outside.
        spent = step % STAGES
        if listed > 0:
            mbarrier.wait(k_full.index(stage), phase)
            keys = k_steps.index(stage).permute((1, 0))
            summed = _scores(q_rows, keys, score, HEAD_DIM, INT8)
            score = as_numbers(warpgroup_mma_wait(0, deps=(summed,)))
            mbarrier.arrive(k_empty.index(stage), count=1)
            if whole == 0:
                seen = _seen(
                    0, listed, here, batch, mask, kv_len, KEYS, BLOCK_N, HAS_MASK, key_layout
                )
                score = gl.where(gl.expand_dims(seen, 0), score, float("-inf"))
            exact, shrink, top, total = _weights(score, top, total, scale2, scales, INT8)
            step += 1
            after = step % STAGES
            after_phase = (step // STAGES) & 1
            mbarrier.wait(k_full.index(after), after_phase, pred=listed > PAIR)

            for first in range(PAIR, listed, PAIR):
                before = stage
                before_phase = phase
                stage = after
                phase = after_phase
                keys = k_steps.index(stage).permute((1, 0))
                summed = _scores(q_rows, keys, score, HEAD_DIM, INT8)
                accs = rescale(accs, shrink)
                # The group frees memory behind a barrier, which stands where a product runs.
                mbarrier.arrive(v_empty.index(spent), count=1, pred=first > PAIR)
                spent = before
                if INT8:
                    scales = (row_scale, gl.load(key_scales + one), gl.load(key_scales + two))
                    one = gl.load(here + gl.minimum(first + 2, last)).to(gl.int32)
                    two = gl.load(here + gl.minimum(first + 3, last)).to(gl.int32)
                mbarrier.wait(v_full.index(before), before_phase)
                if HAS_MASK:
                    if first > whole:
                        _blank(
                            v_steps.index(before), first - PAIR, listed, here, batch, mask,
                            kv_len, blanked, blanks & 1, GROUP, BLOCK_N, value_layout,
                        )  # fmt: skip
                        blanks += 1
                weight = gl.convert_layout(exact.to(dtype), weight_layout)
                accs = add_values(accs, weight, v_steps.index(before))
                score = as_numbers(warpgroup_mma_wait(len(accs), deps=(summed,)))
                mbarrier.arrive(k_empty.index(stage), count=1)
                if first >= whole:
                    seen = _seen(
                        first, listed, here, batch, mask, kv_len, KEYS, BLOCK_N, HAS_MASK,
                        key_layout,
                    )  # fmt: skip
                    score = gl.where(gl.expand_dims(seen, 0), score, float("-inf"))
                exact, shrink, top, total = _weights(score, top, total, scale2, scales, INT8)
                # The next keys are awaited here, and the weights go through the wait below, for
                # what it keeps the assembler from: moving the exponentials behind that wait, where
                # no product runs beside them. (Triton has no stars in tuples.) They are rounded
                # beside the next product: a step's weights of 16 bits would be copied to be kept
                # from one step to the next.
                step += 1
                after = step % STAGES
                after_phase = (step // STAGES) & 1
                mbarrier.wait(k_full.index(after), after_phase, pred=first + PAIR < listed)
                waited = warpgroup_mma_wait(0, deps=(weight, exact) + accs)  # noqa: RUF005
                exact = waited[1]
                accs = waited[2:]

        mbarrier.arrive(v_empty.index(spent), count=1, pred=listed > PAIR)
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
                        v_steps.index(stage), (listed - 1) // PAIR * PAIR, listed, here, batch,
                        mask, kv_len, blanked, blanks & 1, GROUP, BLOCK_N, value_layout,
                    )  # fmt: skip
                    blanks += 1
            weight = gl.convert_layout(exact.to(dtype), weight_layout)
            accs = add_values(rescale(accs, shrink), weight, v_steps.index(stage))
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
