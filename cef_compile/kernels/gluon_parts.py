"""What the kernels written in Gluon share: descriptors of tiles, and rows of query tiles."""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from cef_compile.kernels import config as c
from cef_compile.kernels.descriptor import strides

barrier = gl.thread_barrier if hasattr(gl, "thread_barrier") else gl.barrier
"""Of all threads of a program; Triton 3.7 gave it another name."""


def describe(x: Tensor, channels: int) -> TensorDescriptor:
    """Descriptor of so many channels of a tile of keys, zeros beyond the edges of ``x``."""
    block = [1, 1, c.BLOCK_N, channels]
    layout = gl.NVMMASharedLayout(128, 16, len(block))
    return TensorDescriptor(x, list(x.shape), strides(x), block, layout)


@gluon.constexpr_function
def whole_lines(width, warps):
    """Layout of 16-bit rows in which threads side by side access memory side by side."""
    return gl.BlockedLayout([1, 8], [256 // width, width // 8], [warps, 1], [1, 0])


@gluon.jit
def rows_of(position, tokens, positions, ORDERED: gl.constexpr):
    """Rows of q at some positions, and which of them there are."""
    real = position < positions
    if ORDERED:
        position = gl.load(tokens + position, mask=real, other=-1)
        real = position >= 0
    return position, real


@gluon.jit
def rows_at(
    first, tokens, positions,
    ROWS: gl.constexpr, ORDERED: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Rows of q at the positions from ``first`` on, and which of them there are."""
    return rows_of(first + gl.arange(0, ROWS, layout), tokens, positions, ORDERED)
