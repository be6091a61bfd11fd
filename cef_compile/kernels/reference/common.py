"""What the reference files share: the result, masks, tiles, the dtype of the work."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cef_compile.kernels import config as c

CHUNK_ROWS = 2048
"""Query rows planned or audited at once: bounds the workspace whatever q_len is."""


@dataclass(frozen=True)
class Result:
    """What a filter returns.

    Attributes:
        out: ``[B, H, q_len, Dv]`` in the dtype of ``q``, in (B, q_len, H, Dv) memory order.
        lse: log of the kept energy of each row, ``[B, H, q_len]``; -inf where nothing is visible.
        kept: bool ``[B, H, Tm, Tn]``.
        histogram: energy and number of the visible tile pairs by rank bin, ``[2, RANK_BINS]``,
            each summing to 1; zeros for the online filter.
        measures: ``[MEASURE_SIZE]``, see :mod:`cef_compile.kernels.config`.
        row_recall: recall of each row by the filter's exact ledger, ``[B, H, q_len]``; None for
            the planned filter, which does not know it.
    """

    out: Tensor
    lse: Tensor
    kept: Tensor
    histogram: Tensor
    measures: Tensor
    row_recall: Tensor | None = None


def work_dtype(x: Tensor) -> torch.dtype:
    """float64 for float64 inputs, else float32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def new_output(q: Tensor, v: Tensor) -> Tensor:
    """Output of attention in (B, L, H, D) memory order, so that a model's permute back is free."""
    batch, heads, q_len, _ = q.shape
    return q.new_empty((batch, q_len, heads, v.shape[-1])).transpose(1, 2)


def full_key_mask(k: Tensor, key_mask: Tensor | None) -> Tensor:
    """``key_mask`` for every batch, bool ``[B, kv_len]``; all true where there is none."""
    everything = torch.ones(k.shape[0], k.shape[2], dtype=torch.bool, device=k.device)
    return everything if key_mask is None else key_mask.expand_as(everything)


def by_tile(x: Tensor, block: int) -> Tensor:
    """``[..., L, D]`` cut into tiles, ``[..., T, block, D]``, the last one padded with zeros."""
    n = c.tiles(x.shape[-2], block)
    padded = F.pad(x, (0, 0, 0, n * block - x.shape[-2]))
    return padded.unflatten(-2, (n, block))


def new_measures(kept: Tensor, visible: Tensor, estimate: Tensor, log2_threshold: Tensor) -> Tensor:
    """What a call did, ``[MEASURE_SIZE]``, before an audit."""
    pairs = visible[:, None, None].expand_as(kept).sum()
    measures = torch.full((c.MEASURE_SIZE,), torch.nan, device=kept.device)
    measures[c.MEASURE_DENSITY] = torch.where(pairs > 0, kept.sum() / pairs, 1)
    measures[c.MEASURE_ESTIMATE] = estimate
    measures[c.MEASURE_LOG2_THRESHOLD] = log2_threshold
    measures[c.MEASURE_ENGINE] = c.ENGINES.index("reference")
    return measures
