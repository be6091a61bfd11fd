"""TMA descriptors of key and value tiles, which Hopper and newer GPUs load asynchronously."""

from __future__ import annotations

from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

_ALIGNMENT = 16
"""Bytes to which TMA wants a tensor's address and strides aligned."""


def can_describe(x: Tensor) -> bool:
    """Whether TMA can read ``x [B, H, L, D]``: rows contiguous, no stride 0, all else aligned."""
    size = x.element_size()
    return (
        x.numel() > 0
        and x.stride(3) == 1
        and x.data_ptr() % _ALIGNMENT == 0
        and all(
            n == 1 or (s > 0 and s * size % _ALIGNMENT == 0)
            for n, s in zip(x.shape[:3], x.stride()[:3], strict=True)
        )
    )


def strides(x: Tensor) -> list[int]:
    """Strides of ``x [B, H, L, D]`` as TMA takes them."""
    # A dimension of size 1 is never stepped over: its stride, which may be anything, is replaced.
    step = _ALIGNMENT // x.element_size()
    return [s if n > 1 else step for n, s in zip(x.shape[:3], x.stride()[:3], strict=True)] + [1]


def describe(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
    """Descriptor that loads ``[1, 1, rows, columns]``, zeros beyond the edges of ``x``."""
    return TensorDescriptor(x, list(x.shape), strides(x), [1, 1, rows, columns])
