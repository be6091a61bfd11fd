"""Scores in 8 bits on Hopper: integers that are read as numbers, and their scales in the softmax.

A product of rows and keys is a sum of 128 products of integers up to 127, below 2^22. Sums that
start at the bits of 1.5 * 2^23 are the bits of that number plus the sum: no integer is converted,
and the number leaves in the multiply-add that each score has anyway, with the scales.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma

from cef_compile.kernels.gluon_parts import part_sums

_START_BITS = gl.constexpr(0x4B400000)
_START = gl.constexpr(12582912.0)
"""1.5 * 2^23, and its bits."""


@gluon.jit
def int8_scores(rows, keys, score):
    """Starts the product of a group's rows with the keys of a step, where scores are like these."""
    start = gl.full(score.shape, _START_BITS, gl.int32, score.type.layout)
    return warpgroup_mma(rows, keys, start, is_async=True)


@gluon.jit
def as_numbers(score):
    """Sums as numbers that are 1.5 * 2^23 too large."""
    return score.to(gl.float32, bitcast=True)


@gluon.jit
def int8_softmax_step(score, top, total, row_scale, one, two):
    """``hopper_consumer._softmax_step`` of such numbers.

    A row has a scale in base 2, times ``one`` in the first tile of the step, ``two`` in the other.
    """
    ROWS: gl.constexpr = score.shape[0]
    KEYS: gl.constexpr = score.shape[1]
    # Of what a thread holds of a row: tiles first, lanes last.
    part = gl.max(gl.max(gl.reshape(score, [ROWS, 2, KEYS // 16, 4, 2]), 4), 2)
    part_layout: gl.constexpr = part.type.layout
    tile_layout: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, part_layout))
    tile = gl.where(gl.arange(0, 2, tile_layout) == 0, one, two)
    rows = gl.convert_layout(row_scale, gl.SliceLayout(1, gl.SliceLayout(2, part_layout)))
    factor = gl.expand_dims(rows, 1) * gl.expand_dims(tile, 0)
    highest = gl.max(gl.max((part - _START) * gl.expand_dims(factor, 2), 1), 1)
    new_top = gl.maximum(top, gl.convert_layout(highest, top.type.layout))
    # Subtracting a maximum of -inf would make NaN of rows that have met nothing yet.
    anchor = gl.where(new_top == float("-inf"), 0.0, new_top)

    tall = gl.reshape(score, [ROWS, 2, KEYS // 2])
    less = gl.expand_dims(gl.convert_layout(anchor, gl.SliceLayout(1, factor.type.layout)), 1)
    less = less + _START * factor
    pair_layout: gl.constexpr = gl.SliceLayout(2, tall.type.layout)
    factor = gl.expand_dims(gl.convert_layout(factor, pair_layout), 2)
    less = gl.expand_dims(gl.convert_layout(less, pair_layout), 2)
    weight = gl.reshape(gl.exp2(tall * factor - less), [ROWS, KEYS])
    weight = gl.convert_layout(weight, score.type.layout, assert_trivial=True)
    shrink = gl.exp2(top - anchor)
    sums = part_sums(weight)
    layout: gl.constexpr = gl.SliceLayout(1, sums.type.layout)
    total = total * gl.expand_dims(gl.convert_layout(shrink, layout), 1) + sums
    return weight, shrink, new_top, total
