"""The token order of the reference: inputs are put into it, outputs are put back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cef_compile.kernels import config as c
from cef_compile.kernels.order import Layout, token_order
from cef_compile.kernels.reference.common import full_key_mask


@dataclass(frozen=True)
class Places:
    """Where tokens lie when tiles are cut; all None where they stay where they are.

    Attributes:
        order: int64 ``[length]``, the token at each position; any token where there is none.
        real: bool ``[length]``, positions with a token.
        back: int64 ``[tokens]``, the position of each token.
        exact: bool ``[Tm, Tn]``, pairs with exact tokens on either side.
    """

    order: Tensor | None = None
    real: Tensor | None = None
    back: Tensor | None = None
    exact: Tensor | None = None

    @classmethod
    def of(cls, layout: Layout | None, device: torch.device) -> Places:
        """The places of a layout's tokens."""
        if layout is None:
            return cls()
        order = token_order(layout, device)
        real = order >= 0
        back = torch.empty(layout.tokens, dtype=torch.int64, device=device)
        back[order[real]] = real.nonzero()[:, 0]
        exact = None
        if layout.exact_tiles is not None:
            query_tile, key_tile = (
                torch.arange(c.tiles(layout.length, block), device=device) >= first
                for block, first in zip((c.BLOCK_M, c.BLOCK_N), layout.exact_tiles, strict=True)
            )
            exact = query_tile[:, None] | key_tile
        return cls(order.clamp_min(0), real, back, exact)

    def put(self, x: Tensor) -> Tensor:
        """``[B, H, tokens, D]`` in order, ``[B, H, length, D]``; zeros where there is no token."""
        if self.order is None or self.real is None:
            return x
        return torch.where(self.real[:, None], x.index_select(2, self.order), 0)

    def put_mask(self, k: Tensor, key_mask: Tensor | None) -> Tensor:
        """The mask of ``put(k)``, bool ``[B, length]``; false where there is no token."""
        mask = full_key_mask(k, key_mask)
        if self.order is None or self.real is None:
            return mask
        return mask[:, self.order] & self.real

    def restore(self, rows: Tensor) -> Tensor:
        """``[B, H, length, ...]`` back to ``[B, H, tokens, ...]``, in an output's memory order."""
        if self.back is None:
            return rows
        return rows.transpose(1, 2).index_select(1, self.back).transpose(1, 2)
