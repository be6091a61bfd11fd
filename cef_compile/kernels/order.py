"""Token order: where the tokens of a grid, and the text beside them, lie when tiles are cut.

A key tile is kept or dropped whole, so it should hold tokens that are attended to together. Of a
video those are neighbours in all three axes, while raster order puts a row of one frame into a
tile. The *ordered* sequence has the grid's tokens first, cut into cubes; then positions without a
token up to the next query tile; then the exact tokens (text), those before the grid and those
after it. Attention does not depend on the order of keys, and the order of queries is undone on the
output, so that the result at recall 1 is the dense one whatever the grid is.

Importing this file needs torch only; :mod:`cef_compile.kernels.centroids` has the same order as
arithmetic of a kernel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cef_compile.kernels import config as c


@dataclass(frozen=True)
class Layout:
    """What the tokens of a sequence are.

    Attributes:
        before: exact tokens before the grid: they keep tiles of their own, which are kept for every
            query, and attend to everything.
        frames, height, width: of the grid, whose tokens are in raster order, width innermost.
        after: exact tokens after the grid.
    """

    before: int
    frames: int
    height: int
    width: int
    after: int

    @classmethod
    def of(cls, numbers: Sequence[int], q_len: int, kv_len: int) -> Layout | None:
        """The layout ``[before, frames, height, width, after]``; None (raster order) for ``[]``.

        Raises:
            ValueError: ``numbers`` is neither, or does not fit the lengths.
        """
        if not numbers:
            return None
        if len(numbers) != 5:
            raise ValueError(
                f"layout must be [] or [before, frames, height, width, after], got {list(numbers)}"
            )
        layout = cls(*numbers)
        if min(layout.grid) < 1 or min(layout.before, layout.after) < 0:
            raise ValueError(f"a layout needs a grid of at least 1 x 1 x 1, got {layout}")
        if not layout.tokens == q_len == kv_len:
            raise ValueError(
                f"{layout} has {layout.tokens} tokens, but there are {q_len} queries and"
                f" {kv_len} keys"
            )
        return layout

    @property
    def grid(self) -> tuple[int, int, int]:
        """Frames, height and width."""
        return (self.frames, self.height, self.width)

    @property
    def cube(self) -> tuple[int, int, int]:
        """Frames, height and width of a cube: the tokens of one key tile."""
        return c.IMAGE_CUBE if self.frames == 1 else c.VIDEO_CUBE

    @property
    def grid_tokens(self) -> int:
        """Tokens of the grid."""
        return self.frames * self.height * self.width

    @property
    def tokens(self) -> int:
        """Tokens of the sequence."""
        return self.before + self.grid_tokens + self.after

    @property
    def has_exact(self) -> bool:
        """Whether there are exact tokens."""
        return self.before + self.after > 0

    @property
    def exact_start(self) -> int:
        """First ordered position of the exact tokens, which share no tile with the grid."""
        if not self.has_exact:
            return self.grid_tokens
        return c.tiles(self.grid_tokens, c.BLOCK_M) * c.BLOCK_M

    @property
    def length(self) -> int:
        """Ordered positions, those without a token included."""
        return self.exact_start + self.before + self.after

    @property
    def has_gap(self) -> bool:
        """Whether some ordered positions hold no token."""
        return self.length > self.tokens

    @property
    def exact_tiles(self) -> tuple[int, int] | None:
        """First query tile and first key tile of exact tokens, as are all later ones."""
        if not self.has_exact:
            return None
        return c.tiles(self.exact_start, c.BLOCK_M), c.tiles(self.exact_start, c.BLOCK_N)


def token_order(layout: Layout, device: torch.device | str = "cpu") -> Tensor:
    """The token at each ordered position, int64 ``[length]``; -1 where there is none.

    Cubes are in raster order, and tokens are inside a cube. At the far edges of the grid cubes are
    thinner, and tokens simply follow each other, so that a tile may then hold parts of two cubes.
    """
    grid = torch.arange(layout.grid_tokens, device=device).view(layout.grid) + layout.before
    frames, height, width = layout.cube
    cubes = [
        cube.flatten()
        for slab in grid.split(frames, 0)
        for row in slab.split(height, 1)
        for cube in row.split(width, 2)
    ]
    tokens = torch.arange(layout.tokens, device=device)
    before, after = tokens[: layout.before], tokens[layout.before + layout.grid_tokens :]
    ordered = F.pad(torch.cat(cubes), (0, layout.exact_start - layout.grid_tokens), value=-1)
    return torch.cat((ordered, before, after))
