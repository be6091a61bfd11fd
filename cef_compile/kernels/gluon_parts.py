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

SWIZZLE = gl.constexpr(64)
"""16-bit channels of a swizzled row of shared memory, 128 bytes: what one TMA copy is wide."""


def tile_block(channels: int) -> list[int]:
    """Block of so many channels of a tile of keys ``[B, H, L, D]``."""
    return [1, 1, c.BLOCK_N, channels]


def block_layout(block: list[int]) -> gl.NVMMASharedLayout:
    """How TMA lays a block of 16-bit numbers into shared memory."""
    return gl.NVMMASharedLayout(128, 16, len(block))


def describe(x: Tensor, block: list[int]) -> TensorDescriptor:
    """Descriptor of blocks of a tensor of four dimensions, zeros beyond its edges."""
    return TensorDescriptor(x, list(x.shape), strides(x), block, block_layout(block))


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
