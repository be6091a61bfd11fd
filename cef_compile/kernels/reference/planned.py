"""The planned filter: energies from tile centroids, so that QK^T is dropped too."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cef_compile.kernels import config as c
from cef_compile.kernels.order import Layout
from cef_compile.kernels.reference.audit import audit
from cef_compile.kernels.reference.common import (
    CHUNK_ROWS,
    Result,
    by_tile,
    full_key_mask,
    new_measures,
    new_output,
    work_dtype,
)
from cef_compile.kernels.reference.places import Places


@dataclass(frozen=True)
class Centroids:
    """What the planned filter knows of a key tile.

    Attributes:
        mean: mean of the visible keys, ``[B, Hk, Tn, D]``.
        variance: their per-channel variance, ``[B, Hk, Tn, D]``.
        count: number of visible keys, ``[B, Tn]``, in the dtype of ``mean``.
    """

    mean: Tensor
    variance: Tensor
    count: Tensor


@dataclass(frozen=True)
class Plan:
    """Rank and energy of every (query tile, key tile) pair.

    Attributes:
        bins: uint8 ``[B, H, Tm, Tn]``, bin of the largest share that a row of the query tile gives
            the key tile; the best key tile of each query tile is in the top bin.
        energy: ``[B, H, Tm, Tn]``, share summed over the rows that were looked at.
        visible: bool ``[B, Tn]``, tiles with at least one visible key.
        exact: bool ``[Tm, Tn]``, pairs that every rule keeps, which are in the top bin; None where
            there are none.
    """

    bins: Tensor
    energy: Tensor
    visible: Tensor
    exact: Tensor | None = None

    def histogram(self) -> Tensor:
        """Energy and number of the visible tile pairs by rank bin, ``[2, RANK_BINS]``.

        Each row sums to 1 (to 0 where nothing is visible).
        """
        seen = self.visible[:, None, None].expand_as(self.bins)
        where = self.bins[seen].long()
        sums = torch.stack((self.energy[seen], torch.ones_like(self.energy[seen])))
        totals = sums.new_zeros(2, c.RANK_BINS).index_add_(1, where, sums)
        return totals / totals.sum(-1, keepdim=True).clamp_min(torch.finfo(totals.dtype).tiny)


def centroids(k: Tensor, key_mask: Tensor | None = None) -> Centroids:
    """Mean and per-channel variance of the visible keys of every key tile."""
    work = work_dtype(k)
    seen = by_tile(full_key_mask(k, key_mask)[..., None], c.BLOCK_N)[:, None]  # [B, 1, Tn, BN, 1]
    keys = torch.where(seen, by_tile(k.to(work), c.BLOCK_N), 0)
    count = seen.sum(-2).to(work)  # [B, 1, Tn, 1]
    mean = keys.sum(-2) / count.clamp_min(1)
    spread = torch.where(seen, keys - mean.unsqueeze(-2), 0)
    variance = spread.square().sum(-2) / count.clamp_min(1)
    return Centroids(mean, variance, count[:, 0, :, 0])


def plan(
    q: Tensor,
    cents: Centroids,
    scale: float,
    row_stride: int = c.PLAN_ROW_STRIDE,
    *,
    real: Tensor | None = None,
    exact: Tensor | None = None,
) -> Plan:
    """Rank and energy of every tile pair, from centroids alone.

    With key mean k and variance s2 of tile j, row i is taken to give it the energy
    ``log E_ij = log n_j + scale * q_i.k_j + scale^2 / 2 * sum_d q_id^2 s2_jd``: the exact mean of
    exp over a Gaussian tile. Its share is the softmax of that over j.

    Args:
        q, cents, scale: see the package.
        row_stride: every so-manieth row of a query tile is looked at.
        real: bool ``[q_len]``, rows that count; None for all.
        exact: as in :class:`Plan`.
    """
    batch, heads, q_len, _ = q.shape
    group = heads // cents.mean.shape[1] if cents.mean.shape[1] else 1
    mean = cents.mean.repeat_interleave(group, 1).mT
    variance = cents.variance.repeat_interleave(group, 1).mT
    visible = cents.count > 0
    log_count = cents.count.log()[:, None, None]
    n_m, n_n = c.tiles(q_len, c.BLOCK_M), cents.count.shape[1]
    rank = mean.new_zeros(batch, heads, n_m, n_n)
    energy = torch.zeros_like(rank)
    for start in range(0, q_len, CHUNK_ROWS):
        rows = q[:, :, start : min(start + CHUNK_ROWS, q_len) : row_stride].to(mean.dtype)
        logits = scale * (rows @ mean) + 0.5 * scale**2 * (rows.square() @ variance) + log_count
        shares = logits.softmax(-1)
        if real is not None:
            shares = torch.where(real[start : start + CHUNK_ROWS : row_stride, None], shares, 0)
        shares = by_tile(shares, c.BLOCK_M // row_stride)
        at = slice(start // c.BLOCK_M, start // c.BLOCK_M + shares.shape[2])
        rank[:, :, at] = shares.amax(-2)
        energy[:, :, at] = shares.nan_to_num(nan=0.0).sum(-2)
    # An invisible tile has share 0, or NaN where its whole row is hidden: never the best one.
    rank = torch.where(visible[:, None, None], rank, -1)
    bins = c.rank_bin(rank.clamp_min(0))
    if exact is not None:  # the best tile is one of the others
        rank, bins = rank.masked_fill(exact, -1), bins.masked_fill(exact, c.TOP_BIN)
    if n_n:
        bins.scatter_(-1, rank.nan_to_num(nan=2.0).argmax(-1, keepdim=True), c.TOP_BIN)
    return Plan(bins, torch.where(visible[:, None, None], energy, 0), visible, exact)


def choose(planned: Plan, histogram: Tensor, control: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    """The tile pairs that a rule keeps.

    ``threshold`` keeps the pairs whose bin is at or above the threshold's, given in ``control`` or
    read off the histogram for the wanted recall; ``top_k`` the best ``ceil(density * visible)``
    tiles of each query tile; ``top_p`` the best ones that together carry the wanted share of each
    query tile's energy. Equal bins are taken in the order of the keys. Exact pairs are kept in any
    case.

    Returns:
        kept bool ``[B, H, Tm, Tn]`` and the log2 of the threshold (NaN for top_k and top_p).
    """
    target = control[c.CONTROL_TARGET]
    visible = planned.visible[:, None, None]
    if rule == "threshold":
        own = c.threshold_bin(histogram[0], target)
        fixed = c.edge_bin(control[c.CONTROL_LOG2_THRESHOLD])
        bin_ = torch.where(control[c.CONTROL_FIXED] > 0, fixed, own)
        return (planned.bins >= bin_) & visible, c.log2_edge(bin_)
    order = torch.where(visible, planned.bins.to(torch.int16), -1)
    order = order.argsort(dim=-1, descending=True, stable=True)
    if rule == "top_k":
        wanted = (visible.sum(-1, keepdim=True) * target).ceil()
        first = torch.arange(order.shape[-1], device=order.device) < wanted
        first = first.expand(order.shape)
    else:
        energy = planned.energy.gather(-1, order)
        before = energy.cumsum(-1) - energy
        total = energy.sum(-1, keepdim=True)
        # Without any energy (all NaN) nothing tells the tiles apart, and a NaN is never dropped.
        first = (before < target * total) | (target >= 1) | (total == 0)
    kept = torch.zeros_like(first).scatter_(-1, order, first)
    if planned.exact is not None:
        kept = kept | planned.exact
    kept = kept & visible
    return kept, control.new_full((), torch.nan)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    kept: Tensor,
    scale: float,
    key_mask: Tensor | None = None,
    compensate: Centroids | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the kept tiles alone.

    With ``compensate``, every visible tile that was dropped takes part as one pseudo-token: score
    ``scale * q.k_mean + log n`` and the mean value of the tile.

    Returns:
        out as in :class:`Result`, and lse ``[B, H, q_len]`` of the kept tiles.
    """
    work = work_dtype(q)
    batch, heads, q_len, _ = q.shape
    group = heads // k.shape[1] if k.shape[1] else 1
    mask = full_key_mask(k, key_mask)
    out = new_output(q, v)
    lse = q.new_empty(batch, heads, q_len, dtype=work)
    offsets = torch.arange(c.BLOCK_N, device=q.device)
    v_mean = centroids(v, key_mask).mean if compensate is not None else None
    for b in range(batch):
        for h in range(heads):
            keys, values = k[b, h // group].to(work), v[b, h // group].to(work)
            for t in range(kept.shape[2]):
                at = slice(t * c.BLOCK_M, min((t + 1) * c.BLOCK_M, q_len))
                # A copy: a matrix product may round an operand otherwise where it lies unaligned.
                rows = q[b, h, at].to(work).clone()
                index = kept[b, h, t].nonzero()
                where = (index * c.BLOCK_N + offsets).flatten()
                where = where[where < keys.shape[0]]
                where = where[mask[b, where]]
                scores = scale * (rows @ keys[where].mT)
                taken = values[where]
                lse[b, h, at] = scores.logsumexp(-1)
                if compensate is not None and v_mean is not None:
                    dropped = ~kept[b, h, t] & (compensate.count[b] > 0)
                    pseudo = rows @ compensate.mean[b, h // group, dropped].mT
                    pseudo = scale * pseudo + compensate.count[b, dropped].log()
                    scores = torch.cat((scores, pseudo), -1)
                    taken = torch.cat((taken, v_mean[b, h // group, dropped]))
                # No energy at all, or no key at all, gives 0.
                nothing = (scores == -torch.inf).all(-1, keepdim=True)
                weights = torch.where(nothing, 0, scores.softmax(-1))
                out[b, h, at] = (weights @ taken).to(q.dtype)
    return out, lse


def planned(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    control: Tensor,
    *,
    scale: float,
    key_mask: Tensor | None = None,
    rule: str = "threshold",
    compensate: bool = False,
    audited: bool = False,
    layout: Layout | None = None,
    scores: str = "exact",
) -> Result:
    """Filter by a plan made from tile centroids, then attend to the listed tiles.

    Args:
        q, k, v, key_mask: see the package.
        control: float32 ``[CONTROL_SIZE]``, see :mod:`cef_compile.kernels.config`.
        scale: factor of the scores.
        rule: one of ``PLANNED_RULES``, see :func:`choose`.
        compensate: put dropped tiles back as pseudo-tokens, see :func:`attend`.
        audited: measure achieved recall and error on a sample of query tiles.
        layout: cut tiles in the order of these tokens, exact ones apart and always kept; None for
            the order in which they come.
        scores: one of ``SCORES``; they are exact in any case.
    """
    places = Places.of(layout, q.device)
    rows, keys, values = places.put(q), places.put(k), places.put(v)
    mask = places.put_mask(k, key_mask)
    cents = centroids(keys, mask)
    ranked = plan(rows, cents, scale, real=places.real, exact=places.exact)
    histogram = ranked.histogram()
    kept, log2_threshold = choose(ranked, histogram, control, rule)
    out, lse = attend(rows, keys, values, kept, scale, mask, cents if compensate else None)
    out, lse = places.restore(out), places.restore(lse)
    total = ranked.energy.sum()
    estimate = torch.where(total > 0, (ranked.energy * kept).sum() / total, 1)
    measures = new_measures(kept, ranked.visible, estimate, log2_threshold)
    if audited:
        seed = control[c.CONTROL_SEED]
        audit(q, k, v, out, lse, seed, scale=scale, key_mask=key_mask).write(measures)
    return Result(out, lse, kept, histogram.float(), measures)
