"""Lists of the tiles that a kernel of the online filter keeps, which only decides."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from cef_compile.kernels import config as c
from cef_compile.kernels.schedule import Lists, append, list_block, room, take_longest_first

_WARPS = 4


def judged_lists(judged: Tensor, *, partial: bool, together: int) -> Lists:
    """Compact lists of the tiles that are kept.

    Args:
        judged: uint8 ``[B, H, Tm, Tn]``, ``JUDGED_WHOLE`` or ``JUDGED_PARTLY`` where a tile is
            kept, else 0.
        partial: whether a tile may be partly visible.
        together: of :func:`~cef_compile.kernels.schedule.heads_together`.
    """
    batch, heads, n_m, n_n = judged.shape
    found = room(judged, want_kept=False)
    _judged[(max(n_m, 1), max(heads, 1), max(batch, 1))](
        judged,
        found.index,
        found.count,
        found.queue,
        n_n if judged.numel() else 0,
        batch * heads * n_m,
        PARTIAL=partial,
        WHOLE=c.JUDGED_WHOLE,
        PARTLY=c.JUDGED_PARTLY,
        STEP=list_block(n_n),
        num_warps=_WARPS,
    )
    take_longest_first(found, together)
    return found


@triton.jit(do_not_specialize=["total"])
def _judged(
    judged, index, counts, queue, n_n, total,
    PARTIAL: tl.constexpr, WHOLE: tl.constexpr, PARTLY: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One program per (query tile, head, batch): its list from the verdicts on all key tiles."""
    n_m, heads = tl.num_programs(0), tl.num_programs(1)
    row = (tl.program_id(2).to(tl.int64) * heads + tl.program_id(1)) * n_m + tl.program_id(0)
    if row == 0:
        tl.store(queue, 0)
    judged += row * n_n
    index += row * n_n
    listed = 0
    whole = 0
    for phase in tl.static_range(2 if PARTIAL else 1):
        for start in range(0, n_n, STEP):
            at = start + tl.arange(0, STEP)
            keep = tl.load(judged + at, mask=at < n_n, other=0) == (PARTLY if phase else WHOLE)
            listed = append(index, listed, at, keep)
        if phase == 0:
            whole = listed
    tl.store(counts + row, listed, mask=row < total)
    tl.store(counts + total + row, whole, mask=row < total)
