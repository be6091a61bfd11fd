"""Exact energies: the audit of a sample of query tiles, and of everything for studies."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from cef_compile.kernels import config as c
from cef_compile.kernels.reference.common import CHUNK_ROWS, by_tile, full_key_mask, work_dtype


def audit(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    seed: Tensor,
    *,
    scale: float,
    key_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Achieved recall on a random sample of query tiles, from exact energies of all their keys.

    Args:
        lse: log of the kept energy of each row, ``[B, H, q_len]``.
        seed: number whose hash draws the sample (:func:`~cef_compile.kernels.config.audit_tiles`).

    Returns:
        mean recall over the sampled rows that see a key, and its standard error (0 where every
        query tile was looked at).
    """
    batch, heads, q_len, _ = q.shape
    n_m = c.tiles(q_len, c.BLOCK_M)
    total = batch * heads * n_m
    samples = c.audit_samples(total)
    if samples == 0:
        return lse.new_ones(()), lse.new_zeros(())
    picks = c.audit_tiles(total, samples, seed)
    group = heads // k.shape[1]
    mask = full_key_mask(k, key_mask)
    recalls = []
    for pick in picks.tolist():
        b, h, t = pick // (heads * n_m), pick // n_m % heads, pick % n_m
        at = slice(t * c.BLOCK_M, min((t + 1) * c.BLOCK_M, q_len))
        full = exact_lse(q[b, h, at], k[b, h // group], mask[b], scale)
        visible = full != -torch.inf  # a row that sees no key has no recall
        recalls.append((lse[b, h, at] - full).exp()[visible])
    found = torch.stack([rows.mean() for rows in recalls if rows.numel()] or [lse.new_ones(())])
    mean = torch.cat(recalls).mean() if any(r.numel() for r in recalls) else lse.new_ones(())
    unseen = 1 - samples / total
    spread = found.std() if found.numel() > 1 else torch.zeros_like(mean)
    return mean, spread * math.sqrt(unseen / found.numel())


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
