"""What the kernels of the online filter, in whatever language, have in common: what they return."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cef_compile.kernels import config as c

_LOWEST = tl.constexpr(-3.4028234663852886e38)
_RECALL_UNIT = tl.constexpr(c.RECALL_UNIT)
_WARPS = 4


def accounts(q: Tensor, query_tiles: int) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for what a filter says of itself, of which the sums begin at 0.

    Returns:
        recall, float32 ``[B, H, q_len]``; kept int32 ``[B, H, Tm]``; sums int64
        ``[ONLINE_SUMS]``.
    """
    batch, heads, q_len, _ = q.shape
    recall = torch.empty(batch, heads, q_len, dtype=torch.float32, device=q.device)
    kept = torch.empty(batch, heads, query_tiles, dtype=torch.int32, device=q.device)
    sums = torch.zeros(c.ONLINE_SUMS, dtype=torch.int64, device=q.device)
    return recall, kept, sums


def measures(
    sums: Tensor,
    control: Tensor,
    even: float,
    *,
    rule: str,
    certify: str,
    bound: bool,
    engine: str,
) -> Tensor:
    """float32 ``[MEASURE_SIZE]`` from the sums over all query tiles.

    Args:
        sums: int64 ``[ONLINE_SUMS]``.
        control, rule, certify, bound: of the call.
        even: what a tile has of the energy where all keys have as much.
        engine: one of ``ENGINES``.
    """
    found = torch.empty(c.MEASURE_SIZE, device=sums.device)
    _measure[(1,)](
        sums,
        control,
        found,
        even,
        RULE=rule,
        CERTIFY=certify,
        BOUND=bound,
        TARGET=c.CONTROL_TARGET,
        LOG2_THRESHOLD=c.CONTROL_LOG2_THRESHOLD,
        FIXED=c.CONTROL_FIXED,
        DENSITY=c.MEASURE_DENSITY,
        ESTIMATE=c.MEASURE_ESTIMATE,
        RECALL=c.MEASURE_RECALL,
        STDERR=c.MEASURE_STDERR,
        ERROR=c.MEASURE_ERROR,
        SIZE=c.MEASURE_SIZE,
        APPLIED=c.MEASURE_LOG2_THRESHOLD,
        ENGINE=c.MEASURE_ENGINE,
        NUMBER=c.ENGINES.index(engine),
        num_warps=_WARPS,
    )
    return found


@triton.jit
def log2_threshold_of(
    control,
    even,
    RULE: tl.constexpr,
    CERTIFY: tl.constexpr,
    TARGET: tl.constexpr,
    LOG2_THRESHOLD: tl.constexpr,
    FIXED: tl.constexpr,
):
    """log2 of the threshold given in ``control``, else of the rule's own for the wanted recall."""
    own = tl.log2((1.0 - tl.load(control + TARGET)) * even)
    if RULE == "share" and CERTIFY != "none":
        own = float("inf")
    return tl.where(tl.load(control + FIXED) > 0, tl.load(control + LOG2_THRESHOLD), own)


@triton.jit
def _measure(
    sums,
    control,
    measures,
    even,
    RULE: tl.constexpr,
    CERTIFY: tl.constexpr,
    BOUND: tl.constexpr,
    TARGET: tl.constexpr,
    LOG2_THRESHOLD: tl.constexpr,
    FIXED: tl.constexpr,
    DENSITY: tl.constexpr,
    ESTIMATE: tl.constexpr,
    RECALL: tl.constexpr,
    STDERR: tl.constexpr,
    ERROR: tl.constexpr,
    SIZE: tl.constexpr,
    APPLIED: tl.constexpr,
    ENGINE: tl.constexpr,
    NUMBER: tl.constexpr,
):
    """One program: the measures from the sums over all query tiles."""
    kept, pairs = tl.load(sums), tl.load(sums + 1)
    units, rows, nan = tl.load(sums + 2), tl.load(sums + 3), tl.load(sums + 4)
    density = kept.to(tl.float64) / tl.maximum(pairs, 1).to(tl.float64)
    recall = units.to(tl.float64) / _RECALL_UNIT / tl.maximum(rows, 1).to(tl.float64)
    recall = tl.where(rows > 0, recall, 1.0).to(tl.float32)
    recall = tl.where(nan > 0, float("nan"), recall)
    applied = log2_threshold_of(control, even, RULE, CERTIFY, TARGET, LOG2_THRESHOLD, FIXED)
    applied = tl.where(applied == float("inf"), float("nan"), tl.maximum(applied, _LOWEST))
    tl.store(measures + DENSITY, tl.where(pairs > 0, density, 1.0).to(tl.float32))
    tl.store(measures + ESTIMATE, recall)
    # The ledger is exact, unless it holds bounds.
    tl.store(measures + RECALL, float("nan") if BOUND else recall)
    tl.store(measures + STDERR, float("nan") if BOUND else 0.0)
    for at in tl.static_range(ERROR, SIZE):  # an audit's alone
        tl.store(measures + at, float("nan"))
    tl.store(measures + APPLIED, applied)
    tl.store(measures + ENGINE, NUMBER)
