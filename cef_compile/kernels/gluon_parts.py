"""What the kernels written in Gluon share: descriptors of tiles, and rows of query tiles."""

from __future__ import annotations

from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from cef_compile.kernels import config as c
from cef_compile.kernels.descriptor import strides


def describe(x: Tensor, channels: int) -> TensorDescriptor:
    """Descriptor of so many channels of a tile of keys, zeros beyond the edges of ``x``."""
    block = [1, 1, c.BLOCK_N, channels]
    layout = gl.NVMMASharedLayout(128, 16, len(block))
    return TensorDescriptor(x, list(x.shape), strides(x), block, layout)


@gluon.jit
def rows_at(
    first, tokens, positions,
    ROWS: gl.constexpr, ORDERED: gl.constexpr, layout: gl.constexpr,
):  # fmt: skip
    """Rows of q at the positions from ``first`` on, and which of them there are."""
    at = first + gl.arange(0, ROWS, layout)
    real = at < positions
    if ORDERED:
        at = gl.load(tokens + at, mask=real, other=-1)
        real = at >= 0
    return at, real
