"""Scores from queries and keys in 8 bits, emulated: what the engine "hopper-int8" computes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from cef_compile.kernels import config as c
from cef_compile.kernels.reference.common import by_tile, full_key_mask, work_dtype
from cef_compile.kernels.reference.planned import attend


@dataclass(frozen=True)
class EightBits:
    """Queries and keys as integers up to 127.

    A score, ``scale * q . k``, is about ``scale * row_scale * key_scale * q8 . k8 + row_shift``.

    Attributes:
        q: int8 ``[B, H, q_len, D]``.
        row_scale: ``[B, H, q_len]``, size of a unit; NaN where a row is not finite.
        row_shift: ``[B, H, q_len]``, what the keys' mean adds to every score of a row.
        k: int8 ``[B, Hk, kv_len, D]``, less the mean of the visible keys; 0 where hidden.
        key_scale: ``[B, Hk, Tn]``, size of a unit in a tile; NaN where a visible key is not finite.
    """

    q: Tensor
    row_scale: Tensor
    row_shift: Tensor
    k: Tensor
    key_scale: Tensor


def eight_bits(q: Tensor, k: Tensor, scale: float, key_mask: Tensor | None = None) -> EightBits:
    """Round q and k; softmax does not see the mean that keys lose, and the rest is smaller."""
    work = work_dtype(q)
    group = q.shape[1] // k.shape[1] if k.shape[1] else 1
    seen = full_key_mask(k, key_mask)[:, None, :, None]
    keys = torch.where(seen, k.to(work), 0)
    mean = keys.sum(-2, keepdim=True) / seen.sum(-2, keepdim=True).clamp_min(1)
    keys = by_tile(torch.where(seen, keys - mean, 0), c.BLOCK_N)
    key_scale = _unit(keys.abs().amax((-2, -1)))
    rows = q.to(work)
    row_scale = _unit(rows.abs().amax(-1))
    return EightBits(
        _rounded(rows, row_scale[..., None]),
        row_scale + (rows - rows).sum(-1),
        scale * (rows @ mean.repeat_interleave(group, 1).mT)[..., 0],
        _rounded(keys, key_scale[..., None, None]).flatten(2, 3)[:, :, : k.shape[2]],
        key_scale + (keys - keys).sum((-2, -1)),
    )


def attend_eight_bits(
    eight: EightBits,
    v: Tensor,
    kept: Tensor,
    scale: float,
    key_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over the kept tiles alone, as :func:`attend`, of what the integers stand for.

    It is computed in the dtype of ``v``.
    """
    per_key = eight.key_scale.repeat_interleave(c.BLOCK_N, -1)[..., : eight.k.shape[2], None]
    rows = eight.q.to(v.dtype) * eight.row_scale[..., None].to(v.dtype)
    keys = eight.k.to(v.dtype) * per_key.to(v.dtype)
    out, lse = attend(rows, keys, v, kept, scale, key_mask)
    return out, lse + eight.row_shift.to(lse.dtype)


def _unit(largest: Tensor) -> Tensor:
    return largest.nan_to_num(nan=c.INT8_LEAST).clamp_min(c.INT8_LEAST) / c.INT8_LIMIT


def _rounded(value: Tensor, unit: Tensor) -> Tensor:
    whole = torch.floor(value / unit + 0.5)
    return torch.where(value.isfinite(), whole, 0).to(torch.int8)
