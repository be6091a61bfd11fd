"""Lists of key tiles, and the order in which query tiles are taken: the longest list first."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from cef_compile.kernels import config as c

_LIST_BLOCK = 1024
"""Key tiles looked at in one step of a list."""
_ORDER_BLOCK = 32
"""Query tiles whose places in the order one program finds ..."""
_ORDER_OTHERS = 128
"""... and how many it compares them with in one step."""
_CACHE_BYTES = 24 << 20
"""Keys and values that are in use at a time should not be more: half of an H100's L2."""
_WARPS = 4


@dataclass(frozen=True)
class Lists:
    """Which key tiles each query tile attends to, for one attention over them.

    Attributes:
        index: int16 (int32 above ``INT16_TILES`` key tiles) ``[B, H, Tm, Tn]``; the first
            ``count`` numbers of a row are valid: wholly visible tiles ascending, then partly
            visible ones ascending.
        count: int32 ``[2, B, H, Tm]``: listed tiles, and how many of them are wholly visible.
        order: int32 ``[B * H * Tm]``, numbers of the query tiles (counted through batch, head and
            place) in the order in which to take them.
        queue: int32 ``[1]``, 0: in it programs count the query tiles that they take, so that it is
            used up.
        kept: uint8 ``[B, H, Tm, Tn]``, 1 where listed; None unless asked for.
    """

    index: Tensor
    count: Tensor
    order: Tensor
    queue: Tensor
    kept: Tensor | None

    @property
    def queued(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What programs need that take query tiles from the queue."""
        return self.index, self.count, self.order, self.queue


def heads_together(heads: int, k: Tensor, v: Tensor) -> int:
    """Heads whose keys and values fit into the cache, to be ordered as one.

    Where one head at a time is taken longest list first, all wait in the end for the last head's
    tiles, which are long if it keeps many. With the heads mixed they are short. But a mix of more
    heads than the cache holds would read their keys and values from memory again and again.
    """
    _, key_heads, length, dim = k.shape
    one = max(length * (dim + v.shape[3]) * k.element_size(), 1)
    return max(_CACHE_BYTES // one, 1) * (heads // max(key_heads, 1))


def room(pairs: Tensor, want_kept: bool) -> Lists:
    """Memory for lists; ``pairs`` is uint8 ``[B, H, Tm, Tn]``."""
    batch, heads, n_m, n_n = pairs.shape
    device = pairs.device
    dtype = torch.int16 if n_n <= c.INT16_TILES else torch.int32
    return Lists(
        index=torch.empty(pairs.shape, dtype=dtype, device=device),
        count=torch.empty(2, batch, heads, n_m, dtype=torch.int32, device=device),
        order=torch.empty(batch * heads * n_m, dtype=torch.int32, device=device),
        queue=torch.empty(1, dtype=torch.int32, device=device),
        kept=torch.empty_like(pairs) if want_kept else None,
    )


def list_block(n_n: int) -> int:
    """Key tiles that a program looks at in one step of a list."""
    return min(_LIST_BLOCK, triton.next_power_of_2(max(n_n, 1)))


@triton.jit
def append(index, listed, at, keep):
    """Numbers of kept tiles at the end of a list of so many, whose new length comes back."""
    place = listed + tl.cumsum(keep.to(tl.int32), 0) - 1
    tl.store(index + place, at.to(index.dtype.element_ty), mask=keep)
    return listed + tl.sum(keep.to(tl.int32), 0)


def take_longest_first(found: Lists, together: int) -> None:
    """Fills in the order; ``together`` is of :func:`heads_together`."""
    total = len(found.order)
    if total:
        span = min(together * found.index.shape[2], total)
        _order[(triton.cdiv(span, _ORDER_BLOCK), triton.cdiv(total, span))](
            found.count,
            found.order,
            span,
            total,
            BLOCK=_ORDER_BLOCK,
            OTHERS=_ORDER_OTHERS,
            num_warps=_WARPS,
        )


@triton.jit(do_not_specialize=["span", "total"])
def _order(counts, order, span, total, BLOCK: tl.constexpr, OTHERS: tl.constexpr):
    """One program per (block of query tiles, span of them): places in the span by falling count."""
    first = tl.program_id(1) * span
    size = tl.minimum(span, total - first)
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mine = tl.load(counts + first + at, mask=at < size, other=0)
    place = tl.zeros([BLOCK], tl.int32)
    for start in range(0, size, OTHERS):
        other = start + tl.arange(0, OTHERS)
        theirs = tl.load(counts + first + other, mask=other < size, other=-1)
        sooner = theirs[None, :] > mine[:, None]
        sooner |= (theirs[None, :] == mine[:, None]) & (other[None, :] < at[:, None])
        place += tl.sum(sooner.to(tl.int32), 1)
    tl.store(order + first + place, first + at, mask=at < size)
