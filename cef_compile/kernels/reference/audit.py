"""Exact attention: the audit of a sample of query tiles, and energies of everything for studies."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from cef_compile.kernels import config as c
from cef_compile.kernels.reference.common import CHUNK_ROWS, by_tile, full_key_mask, work_dtype


class Audited(NamedTuple):
    """What an audit finds, each a tensor of one number.

    Attributes:
        recall: mean over the sampled rows that see a key.
        stderr: its standard error; 0 where every query tile was looked at.
        error: ``||out - exact|| / ||exact||`` over all sampled rows, with the exact attention
            output for ``exact``: 0 where they are the same, infinite where only the latter is 0.
        error_stderr: its standard error, as of a ratio of two means (the delta method).
        norm: mean square of a sampled row of the exact output.
    """

    recall: Tensor
    stderr: Tensor
    error: Tensor
    error_stderr: Tensor
    norm: Tensor

    def write(self, measures: Tensor, *, recall: bool = True) -> None:
        """Into a call's measures; without the recall where it is known exactly already."""
        if recall:
            measures[c.MEASURE_RECALL], measures[c.MEASURE_STDERR] = self.recall, self.stderr
        measures[c.MEASURE_ERROR] = self.error
        measures[c.MEASURE_ERROR_STDERR] = self.error_stderr
        measures[c.MEASURE_NORM] = self.norm


def audit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    seed: Tensor,
    *,
    scale: float,
    key_mask: Tensor | None = None,
) -> Audited:
    """Achieved recall and error on a random sample of query tiles, from all of their keys.

    Args:
        out: the output that was delivered, ``[B, H, q_len, Dv]``.
        lse: log of the kept energy of each row, ``[B, H, q_len]``.
        seed: number whose hash draws the sample (:func:`~cef_compile.kernels.config.audit_tiles`).
    """
    batch, heads, q_len, _ = q.shape
    n_m = c.tiles(q_len, c.BLOCK_M)
    total = batch * heads * n_m
    samples = c.audit_samples(total, c.tiles(k.shape[2], c.BLOCK_N))
    one, zero = lse.new_ones(()), lse.new_zeros(())
    if samples == 0:
        return Audited(one, zero, zero, zero, zero)
    picks = c.audit_tiles(total, samples, seed)
    group = heads // k.shape[1]
    mask = full_key_mask(k, key_mask)
    recalls, wrong, size = [], [], []
    for pick in picks.tolist():
        b, h, t = pick // (heads * n_m), pick // n_m % heads, pick % n_m
        at = slice(t * c.BLOCK_M, min((t + 1) * c.BLOCK_M, q_len))
        exact, full = exact_attention(
            q[b, h, at], k[b, h // group], v[b, h // group], mask[b], scale
        )
        visible = full != -torch.inf  # a row that sees no key has no recall
        if visible.any():
            recalls.append((lse[b, h, at] - full).exp()[visible])
            wrong.append((out[b, h, at].to(exact.dtype) - exact).square().sum())
            size.append(exact.square().sum())
    if not recalls:
        return Audited(one, zero, zero, zero, zero)
    spread = math.sqrt((1 - samples / total) / len(recalls))
    means = torch.stack([rows.mean() for rows in recalls])
    squared, norm = torch.stack(wrong), torch.stack(size)
    ratio = torch.where(squared.sum() == 0, 0, squared.sum() / norm.sum())
    error = ratio.sqrt()
    off = _deviation(squared - ratio * norm) * spread / norm.mean()
    return Audited(
        torch.cat(recalls).mean(),
        _deviation(means) * spread,
        error,
        torch.where(error == 0, 0, off / (2 * error)),
        norm.sum() / sum(rows.numel() for rows in recalls),
    )


def _deviation(values: Tensor) -> Tensor:
    """Standard deviation; 0 of a single value."""
    return values.std() if values.numel() > 1 else torch.zeros_like(values.sum())


def exact_attention(
    rows: Tensor, keys: Tensor, values: Tensor, mask: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Attention of ``rows`` to all visible keys, in float32 or wider.

    Args:
        rows: ``[n, D]``.
        keys, values: ``[kv_len, D]`` and ``[kv_len, Dv]``.
        mask: bool ``[kv_len]``.
        scale: factor of the scores.

    Returns:
        the output ``[n, Dv]``, 0 where nothing is visible, and :func:`exact_lse`.
    """
    lse = exact_lse(rows, keys, mask, scale)
    work = work_dtype(rows)
    # Of a row that sees nothing every score is -inf: its weights are exp(-inf) = 0.
    anchor = torch.where(lse == -torch.inf, 0, lse)[:, None]
    out = rows.new_zeros(rows.shape[0], values.shape[1], dtype=work)
    chunks = (t.split(CHUNK_ROWS) for t in (keys, values, mask))
    for key, value, seen in zip(*chunks, strict=True):
        score = scale * (rows.to(work) @ key[seen].to(work).mT)
        out += (score - anchor).exp() @ value[seen].to(work)
    return out, lse


def exact_lse(rows: Tensor, keys: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Log of the energy of all visible keys for each of ``rows``; ``[n, D]``, ``[kv_len, D]``."""
    work = work_dtype(rows)
    parts = [
        (scale * (rows.to(work) @ part.to(work).mT)).masked_fill(~seen, -torch.inf).logsumexp(-1)
        for part, seen in zip(keys.split(CHUNK_ROWS), mask.split(CHUNK_ROWS), strict=True)
    ]
    nothing = rows.new_full((rows.shape[0],), -torch.inf, dtype=work)
    return torch.stack([nothing, *parts]).logsumexp(0)


def tile_energies(q: Tensor, k: Tensor, scale: float, key_mask: Tensor | None = None) -> Tensor:
    """Log of the exact energy that each row gives each key tile, ``[B, H, q_len, Tn]``.

    For studies and tests: the one tensor here that is larger than the inputs.
    """
    work = work_dtype(q)
    keys = by_tile(k.to(work), c.BLOCK_N).repeat_interleave(q.shape[1] // k.shape[1], 1)
    seen = by_tile(full_key_mask(k, key_mask)[..., None], c.BLOCK_N)[..., 0]
    parts = [
        (scale * (q.to(work) @ keys[:, :, j].mT))
        .masked_fill(~seen[:, None, None, j], -torch.inf)
        .logsumexp(-1)
        for j in range(keys.shape[2])
    ]
    empty = q.new_empty((*q.shape[:3], 0), dtype=work)
    return torch.stack(parts, -1) if parts else empty
