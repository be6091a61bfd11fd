"""Accumulators times what the past shrinks by, only in warps in which a row's maximum has risen.

Later tiles of a list seldom raise the maximum of any of a warp's 16 rows. The branch does more than
to spare these products: it stays where it is written, beside a product of the tensor cores, where
the assembler would move multiplications before that product.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from cef_compile.kernels.products import beside_rows

_THREADS = gl.constexpr(128)
"""Of a group of warps, which has the accumulators."""


@gluon.constexpr_function
def _multiply_unless_all_one(n):
    """PTX that multiplies n accumulators of a thread, unless all factors of its warp are 1.

    A thread has values of two rows, two of one after two of the other.
    """
    one = "0f3F800000"  # 1.0 in fp32
    products = [f"mul.f32 ${i}, ${i}, ${2 * n + i};" for i in range(n)]
    return "\n".join(
        [
            "{",
            ".reg .pred some, other;",
            f"setp.neu.f32 some, ${2 * n}, {one};",
            f"setp.neu.f32 other, ${2 * n + 2}, {one};",
            "or.pred some, some, other;",
            "vote.sync.any.pred some, some, 0xffffffff;",
            "@!some bra DONE;",
            *products,
            "DONE:",
            "}",
        ]
    )


@gluon.constexpr_function
def _operands(n):
    """Constraints: results, accumulators in the same registers, and factors."""
    return ",".join(["=f"] * n + [str(i) for i in range(n)] + ["f"] * n)


@gluon.jit
def _rescale_one(acc, factor):
    OWN: gl.constexpr = acc.shape[0] * acc.shape[1] // _THREADS
    acc, factor = gl.broadcast(acc, beside_rows(acc, factor))
    return gl.inline_asm_elementwise(
        _multiply_unless_all_one(OWN), _operands(OWN), [acc, factor], gl.float32, False, OWN
    )


@gluon.jit
def rescale(accs, factor):
    """Each row of one or two accumulators times its factor, which is 1 in most warps."""
    main = _rescale_one(accs[0], factor)
    return (main, _rescale_one(accs[1], factor)) if len(accs) == 2 else (main,)
