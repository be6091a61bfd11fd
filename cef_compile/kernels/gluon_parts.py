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

PAIR = gl.constexpr(2)
"""Listed tiles of one step of the attention over lists."""
GROUPS = gl.constexpr(2)
"""Groups of 4 warps that compute it; each has ``BLOCK_M / 2`` query rows."""


def tile_block(channels: int) -> list[int]:
    """Block of so many channels of a tile of keys ``[B, H, L, D]``."""
    return [1, 1, c.BLOCK_N, channels]


def line(x: Tensor) -> int:
    """Channels of a tensor that fill a swizzled row of shared memory."""
    return 2 * SWIZZLE.value // x.element_size()


def block_layout(block: list[int], bits: int = 16) -> gl.NVMMASharedLayout:
    """How TMA lays a block of numbers of so many bits into shared memory."""
    return gl.NVMMASharedLayout(128, bits, len(block))


def describe(x: Tensor, block: list[int]) -> TensorDescriptor:
    """Descriptor of blocks of a tensor of four dimensions, zeros beyond its edges."""
    layout = block_layout(block, 8 * x.element_size())
    return TensorDescriptor(x, list(x.shape), strides(x), block, layout)


@gluon.constexpr_function
def whole_lines(width, warps, bits=16):
    """Layout of rows in which threads side by side access memory side by side, 16 bytes each."""
    own = 128 // bits
    return gl.BlockedLayout([1, own], [32 * own // width, width // own], [warps, 1], [1, 0])


@gluon.jit
def part_sums(weight):
    """Sums ``[ROWS, 4]`` over what each thread holds of a row: adding them up can wait."""
    ROWS: gl.constexpr = weight.shape[0]
    KEYS: gl.constexpr = weight.shape[1]
    return gl.sum(gl.sum(gl.reshape(weight, [ROWS, KEYS // 8, 4, 2]), 3), 1)


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


@gluon.constexpr_function
def width(dim):
    """Channels that shared memory holds: TMA fills it with zeros beyond ``dim``."""
    return 64 if dim <= 64 else 128


@gluon.jit
def place(slot, order, n_m, heads):
    """Query tile, batch, head and row of the lists of a slot, which is a place in ``order``."""
    row = gl.load(order + slot)
    batch_head = row // n_m
    return row % n_m, batch_head // heads, batch_head % heads, row.to(gl.int64)
