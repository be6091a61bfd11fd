"""The online filter: one pass over all key tiles with a moving threshold and an exact ledger."""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from cef_compile.kernels import config as c
from cef_compile.kernels.order import Layout
from cef_compile.kernels.reference.audit import audit
from cef_compile.kernels.reference.common import (
    Result,
    by_tile,
    new_measures,
    new_output,
    work_dtype,
)
from cef_compile.kernels.reference.places import Places


def online(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    control: Tensor,
    *,
    scale: float,
    key_mask: Tensor | None = None,
    rule: str = "share",
    certify: str = "mean",
    bound: bool = False,
    audited: bool = False,
    layout: Layout | None = None,
) -> Result:
    """Filter in one pass over all key tiles, with a ledger of kept and dropped energy.

    Each query tile starts at its own diagonal key tile and wraps round. A tile is dropped when for
    every row its energy is below the threshold's part of the energy met so far (``rule="share"``;
    no threshold under a certificate unless one is given), when its maximum less the running
    log-sum-exp is below ln threshold (``"lse"``, arXiv 2606.16317), or when its maximum less the
    running maximum is (``"max"``, BLASST, arXiv 2512.12087). ``certify`` adds a budget under which
    the mean recall of each query tile (``"mean"``) or of each row (``"row"``) is never below the
    target: with x = dropped / kept, a tile may go only while x stays at or below (1 - R) / R, and
    recall is 1 / (1 + x), convex in x.

    Args:
        q, k, v, key_mask, scale, control: as for :func:`planned`.
        rule: one of ``ONLINE_RULES``.
        certify: one of ``CERTIFICATES``.
        bound: judge a tile by ``n_j * exp(its maximum)`` instead of its exact energy; the ledger
            is then a lower bound of the recall.
        audited: measure the error on a sample of query tiles, and where the ledger holds bounds
            the achieved recall too.
        layout: as for :func:`planned`.
    """
    places = Places.of(layout, q.device)
    found = _online(
        places.put(q),
        places.put(k),
        places.put(v),
        places.put_mask(k, key_mask),
        places,
        control,
        scale,
        rule,
        certify,
        bound,
        k.shape[2],
    )
    assert found.row_recall is not None, "the online filter keeps a ledger"
    out, lse = places.restore(found.out), places.restore(found.lse)
    if audited:
        seed = control[c.CONTROL_SEED]
        sampled = audit(q, k, v, out, lse, seed, scale=scale, key_mask=key_mask)
        sampled.write(found.measures, recall=bound)
    return replace(found, out=out, lse=lse, row_recall=places.restore(found.row_recall))


def _online(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    places: Places,
    control: Tensor,
    scale: float,
    rule: str,
    certify: str,
    bound: bool,
    keys: int,
) -> Result:
    """:func:`online` with everything in its place; ``keys`` is their number without gaps."""
    work = work_dtype(q)
    batch, heads, q_len, _ = q.shape
    kv_len, n_m, n_n = k.shape[2], c.tiles(q_len, c.BLOCK_M), c.tiles(k.shape[2], c.BLOCK_N)
    target = control[c.CONTROL_TARGET].to(work)
    threshold = _online_threshold(control, rule, certify, keys).to(work)
    budget = (1 - target) / target
    rows = by_tile(q.to(work), c.BLOCK_M)  # [B, H, Tm, BM, D]
    every_row = torch.ones(q_len, dtype=torch.bool, device=q.device)
    real_rows = every_row if places.real is None else places.real
    real = by_tile(real_rows[:, None], c.BLOCK_M)[..., 0]
    key_tiles, value_tiles = by_tile(k, c.BLOCK_N), by_tile(v, c.BLOCK_N)
    seen = by_tile(mask[..., None], c.BLOCK_N)[..., 0]  # [B, Tn, BN]
    left = seen.any(-1).sum(-1)[:, None, None].expand(batch, heads, n_m).clone()

    top = torch.full((batch, heads, n_m, c.BLOCK_M), -torch.inf, dtype=work, device=q.device)
    gathered, lost = torch.zeros_like(top), torch.zeros_like(top)
    acc = top.new_zeros(batch, heads, n_m, c.BLOCK_M, v.shape[-1])
    kept = torch.zeros(batch, heads, n_m, n_n, dtype=torch.bool, device=q.device)
    b_of, h_of, t_of = torch.meshgrid(
        *(torch.arange(n, device=q.device) for n in (batch, heads, n_m)), indexing="ij"
    )
    g_of = h_of // (heads // k.shape[1] if k.shape[1] else 1)
    start = first_tile(n_m, n_n, q_len == kv_len, q.device)

    for step in range(n_n):
        j = ((start + step) % n_n).expand(batch, heads, n_m)
        in_sight = seen[b_of, j]  # [B, H, Tm, BN]
        live = in_sight.any(-1)
        scores = scale * (rows @ key_tiles[b_of, g_of, j].to(work).mT)
        scores = scores.masked_fill(~in_sight[..., None, :], -torch.inf)
        high = scores.amax(-1)
        new_top = torch.maximum(top, high)
        # Subtracting a top of -inf would make NaN of rows that have met nothing yet.
        anchor = torch.where(new_top == -torch.inf, 0, new_top)
        shrink = (top - anchor).exp()
        weights = (scores - anchor[..., None]).exp()
        energy = weights.sum(-1)
        kept_so_far, lost_so_far = gathered * shrink, lost * shrink
        judged = in_sight.sum(-1)[..., None] * (high - anchor).exp() if bound else energy
        if rule == "share":
            small = judged < threshold * (kept_so_far + lost_so_far)
        elif rule == "lse":
            small = (high - anchor).exp() < threshold * kept_so_far
        else:
            small = high - top < threshold.log()
        drop = (small | ~real).all(-1) & (target < 1) & live
        if certify != "none":
            drop &= _affordable(judged, kept_so_far, lost_so_far, real, budget, left, certify)
        if places.exact is not None:
            drop &= ~places.exact[t_of, j]
        keep = live & ~drop
        kept[b_of, h_of, t_of, j] = keep
        lost = lost_so_far + torch.where(drop[..., None], judged, 0)
        gathered = kept_so_far + torch.where(keep[..., None], energy, 0)
        acc = acc * shrink[..., None]
        # Only here is the value tile read: what a dropped tile saves.
        picked = torch.where(
            in_sight[keep][..., None], value_tiles[b_of[keep], g_of[keep], j[keep]], 0
        )
        acc[keep] += weights[keep] @ picked.to(work)
        top = torch.where(live[..., None], new_top, top)
        left -= live.to(left.dtype)

    mean = acc / torch.where(gathered == 0, 1, gathered)[..., None]
    out = new_output(q, v)
    out.copy_(mean.flatten(2, 3)[:, :, :q_len])
    lse = (top + gathered.log()).flatten(2)[..., :q_len]
    met = (gathered + lost).flatten(2)[..., :q_len]
    recall = torch.where(met == 0, 1, gathered.flatten(2)[..., :q_len] / met)
    # A row that sees no key has no recall.
    counted = recall[real_rows & (met != 0)]
    mean_recall = counted.mean() if counted.numel() else recall.new_ones(())
    log2_threshold = threshold.log2().nan_to_num(nan=torch.nan, posinf=torch.nan)
    measures = new_measures(kept, seen.any(-1), mean_recall, log2_threshold)
    if not bound:
        measures[c.MEASURE_RECALL], measures[c.MEASURE_STDERR] = mean_recall, 0
    histogram = torch.zeros(2, c.RANK_BINS, device=q.device)
    return Result(out, lse, kept, histogram, measures, recall)


def first_tile(n_m: int, n_n: int, same_length: bool, device: torch.device) -> Tensor:
    """Key tile that each query tile meets first: its own, where queries and keys are one sequence.

    Where they are not, the one at the same relative place. int64 ``[Tm]``.
    """
    t = torch.arange(n_m, device=device)
    if same_length:
        return (t * c.BLOCK_M // c.BLOCK_N).clamp_max(max(n_n - 1, 0))
    return t * n_n // max(n_m, 1)


def _online_threshold(control: Tensor, rule: str, certify: str, kv_len: int) -> Tensor:
    """The threshold given in ``control``, else the rule's own for the wanted recall.

    Without one given, ``share`` may lose ``1 - recall`` spread evenly over the tiles (under a
    certificate only the budget rules), and ``lse`` and ``max`` use the even share of one tile
    times ``1 - recall`` (arXiv 2606.16317: ``ln P + ln(BLOCK_N / kv_len)``).
    """
    even = (1 - control[c.CONTROL_TARGET]) * (c.BLOCK_N / max(kv_len, 1))
    own = torch.full_like(even, math.inf) if rule == "share" and certify != "none" else even
    given = control[c.CONTROL_LOG2_THRESHOLD].exp2()
    return torch.where(control[c.CONTROL_FIXED] > 0, given, own)


def _affordable(
    judged: Tensor,
    kept: Tensor,
    lost: Tensor,
    real: Tensor,
    budget: Tensor,
    left: Tensor,
    certify: str,
) -> Tensor:
    """Whether the budget of each query tile lets this tile go; ``[B, H, Tm]``."""
    spent, cost = lost / kept, judged / kept
    if certify == "mean":
        rows = real.sum(-1)
        spent = torch.where(real, spent, 0).sum(-1) / rows
        cost = torch.where(real, cost, 0).sum(-1) / rows
    part = c.ONLINE_MAX_STRIDE * (budget - spent) / (left if certify == "mean" else left[..., None])
    fits = (spent + cost <= budget) & (cost <= part)
    return fits if certify == "mean" else (fits | ~real).all(-1)
