"""Products on Hopper's tensor cores over head sizes that are no powers of two: as one or two.

Shapes in Gluon are powers of two. A product over 96 channels is one over 64 and one over 32, a
quarter less than one over 128.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma


@gluon.constexpr_function
def main_part(dim):
    """Channels of the first of one or two products that together have ``dim``, or a few more.

    Shapes are powers of two, 16 at least: 96 channels are 64 and 32, a quarter less than 128.
    """
    main = max(16, 1 << (dim.bit_length() - 1))
    return main if dim <= main + main // 2 else 2 * main


@gluon.constexpr_function
def rest_part(dim):
    """Channels of the second product; 0 where there is none."""
    rest = dim - main_part(dim)
    return max(16, 1 << (rest - 1).bit_length()) if rest > 0 else 0


@gluon.jit
def scores(rows, keys, score, HEAD_DIM: gl.constexpr):
    """Starts the product of a group's rows with the keys of a step."""
    MAIN: gl.constexpr = main_part(HEAD_DIM)
    REST: gl.constexpr = rest_part(HEAD_DIM)
    # What begins anew ignores the accumulator; zeros in its place would cost instructions.
    score = warpgroup_mma(
        rows.slice(0, MAIN, 1), keys.slice(0, MAIN, 0), score, use_acc=False, is_async=True
    )
    if REST:
        score = warpgroup_mma(
            rows.slice(MAIN, REST, 1), keys.slice(MAIN, REST, 0), score, is_async=True
        )
    return score


@gluon.jit
def _zeros(ROWS: gl.constexpr, WIDTH: gl.constexpr):
    layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, WIDTH, 16])
    return gl.zeros([ROWS, WIDTH], gl.float32, layout)


@gluon.jit
def no_values(ROWS: gl.constexpr, VALUE_DIM: gl.constexpr):
    """Accumulators of the one or two products with values."""
    main = _zeros(ROWS, main_part(VALUE_DIM))
    return (main, _zeros(ROWS, rest_part(VALUE_DIM))) if rest_part(VALUE_DIM) else (main,)


@gluon.jit
def _add(acc, weight, values, FIRST: gl.constexpr):
    layout: gl.constexpr = gl.DotOperandLayout(0, acc.type.layout, 2)
    weight = gl.convert_layout(weight, layout, assert_trivial=True)
    return warpgroup_mma(weight, values.slice(FIRST, acc.shape[1], 1), acc, is_async=True)


@gluon.jit
def add_values(accs, weight, values):
    """Starts the products of the weights of a step with its values."""
    main = _add(accs[0], weight, values, 0)
    return (main, _add(accs[1], weight, values, accs[0].shape[1])) if len(accs) == 2 else (main,)


@gluon.jit
def beside_rows(acc, factor):
    """A factor of each row ``[ROWS, 1]``, laid out as the accumulator is."""
    layout: gl.constexpr = gl.SliceLayout(1, acc.type.layout)
    return gl.expand_dims(gl.convert_layout(factor, layout), 1)


@gluon.jit
def _times_one(acc, factor):
    return acc * beside_rows(acc, factor)


@gluon.jit
def times(accs, factor):
    """Each row times its factor."""
    main = _times_one(accs[0], factor)
    return (main, _times_one(accs[1], factor)) if len(accs) == 2 else (main,)
