"""What the kernels of this package take, checked before any of them is launched."""

from __future__ import annotations

import torch
from torch import Tensor

from cef_compile.kernels import config as c


def check(
    q: Tensor, k: Tensor, v: Tensor, control: Tensor, scale: float, key_mask: Tensor | None
) -> None:
    """Check shapes, dtypes and values of a call.

    Raises:
        ValueError: what is wrong, and what was got.
    """
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not (q.dim() == k.dim() == v.dim() == 4):
        raise ValueError(f"q, k and v must have 4 dimensions: {shapes}")
    if k.shape[:3] != v.shape[:3] or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q, k and v do not fit each other: {shapes}")
    if q.shape[1] and (not k.shape[1] or q.shape[1] % k.shape[1]):
        raise ValueError(f"query heads must be a multiple of key heads: {shapes}")
    limits = c.LIMITS["cuda"]
    if not (q.dtype == k.dtype == v.dtype) or q.dtype not in limits.dtypes:
        raise ValueError(
            f"q, k and v must share one dtype of {limits.dtypes}: {q.dtype}, {k.dtype}, {v.dtype}"
        )
    for dim in (q.shape[3], v.shape[3]):
        if not 0 < dim <= limits.max_head_dim or dim % limits.head_dim_multiple:
            raise ValueError(
                f"head_dim must be a multiple of {limits.head_dim_multiple} up to "
                f"{limits.max_head_dim}, not {dim}"
            )
    if control.shape != (c.CONTROL_SIZE,) or control.dtype != torch.float32:
        raise ValueError(f"control must be float32 [{c.CONTROL_SIZE}], not {control.dtype}")
    if not scale > 0:
        raise ValueError(f"scale must be above 0, not {scale}")
    if key_mask is not None and (
        key_mask.dtype != torch.bool
        or key_mask.dim() != 2
        or key_mask.shape[0] not in (1, k.shape[0])
        or key_mask.shape[1] != k.shape[2]
    ):
        raise ValueError(
            f"key_mask must be bool [B or 1, kv_len], not {key_mask.dtype} {tuple(key_mask.shape)}"
        )
