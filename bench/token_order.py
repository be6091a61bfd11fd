"""Run a Wan transformer on its tokens in another order, from outside, for studies.

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
    places = torch.cartesian_prod(*(torch.arange(size) for size in grid))
    key = torch.zeros(len(places), dtype=torch.int64)
    for part in (places // torch.tensor(block), places % torch.tensor(block)):
        for axis in range(3):
            key = key * (max(grid) + 1) + part[:, axis]
    return key.argsort(stable=True)


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
