"""Orders of a grid of tokens, and a Wan transformer run in them from outside, for studies.

Attention over a set of keys does not depend on their order, but how coherent a tile of 64 of them
is does. Tokens and their rotary tables are reordered once, after the patch embedding, and put back
before the last layer, by hooks; nothing in the model changes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def cubes(grid: tuple[int, int, int], block: tuple[int, int, int]) -> Tensor:
    """Order of a raster of tokens by cubes of ``block``, both in raster order; ragged edges too.

    Args:
        grid: frames, height and width in tokens.
        block: of a cube.

    Returns:
        int64 ``[tokens]``: the raster index of each token in the new order.
    """
    places = _places(grid)
    key = torch.zeros(len(places), dtype=torch.int64)
    for part in (places // torch.tensor(block), places % torch.tensor(block)):
        for axis in range(3):
            key = key * (max(grid) + 1) + part[:, axis]
    return key.argsort(stable=True)


def morton(grid: tuple[int, int, int]) -> Tensor:
    """Order along a Morton curve: by the bits of the three places, interleaved."""
    return _interleaved(_places(grid).T, _bits(grid)).argsort(stable=True)


def hilbert(grid: tuple[int, int, int]) -> Tensor:
    """Order along a Hilbert curve of the enclosing cube: each token is next to the one before it.

    Source: J. Skilling, Programming the Hilbert curve, AIP Conf. Proc. 707 (2004). Where the grid
    is not that cube the curve leaves it and comes back, and tokens on either side are not
    neighbours.
    """
    axes = list(_places(grid).T.clone())
    bits = _bits(grid)
    for bit in (1 << b for b in range(bits - 1, 0, -1)):
        for axis in range(3):
            inverted = (axes[axis] & bit) != 0
            swapped = torch.where(inverted, 0, (axes[0] ^ axes[axis]) & (bit - 1))
            axes[0] = torch.where(inverted, axes[0] ^ (bit - 1), axes[0] ^ swapped)
            axes[axis] = axes[axis] ^ swapped if axis else axes[0]
    for axis in (1, 2):
        axes[axis] = axes[axis] ^ axes[axis - 1]
    flips = torch.zeros_like(axes[0])
    for bit in (1 << b for b in range(bits - 1, 0, -1)):
        flips = torch.where((axes[2] & bit) != 0, flips ^ (bit - 1), flips)
    return _interleaved(torch.stack(axes) ^ flips, bits).argsort(stable=True)


def _places(grid: tuple[int, int, int]) -> Tensor:
    """Frame, row and column of each token, int64 ``[tokens, 3]``."""
    return torch.cartesian_prod(*(torch.arange(size) for size in grid))


def _bits(grid: tuple[int, int, int]) -> int:
    return max(1, (max(grid) - 1).bit_length())


def _interleaved(axes: Tensor, bits: int) -> Tensor:
    """One number of the bits of three, the highest first."""
    key = torch.zeros_like(axes[0])
    for bit in range(bits - 1, -1, -1):
        for axis in axes:
            key = key * 2 + (axis >> bit & 1)
    return key


@contextmanager
def reordered(model: nn.Module, order: Tensor) -> Iterator[None]:
    """Run ``model``, a Wan transformer, on its tokens in ``order`` while the block runs."""
    back = order.argsort()

    def tables(_: nn.Module, args: Any, output: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(table.index_select(1, order) for table in output)

    def enter(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (args[0].index_select(1, order), *args[1:])

    def leave(_: nn.Module, args: Any, output: Tensor) -> Tensor:
        return output.index_select(1, back)

    handles = [
        model.rope.register_forward_hook(tables),
        model.blocks[0].register_forward_pre_hook(enter),
        model.blocks[-1].register_forward_hook(leave),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
