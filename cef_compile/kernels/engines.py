"""Which implementation computes the attention over lists: a pure choice, made without tensors."""

from __future__ import annotations

import functools
import importlib.util
from typing import Final

import torch

_HOPPER: Final = 90
"""Compute capability whose instructions the hopper engine is written in; newer GPUs lack them."""
_HEAD_DIMS: Final = (64, 128)
_DTYPES: Final = (torch.bfloat16, torch.float16)
LIST_ENGINES: Final = ("triton", "hopper", "fa4")


def list_engine(
    architecture: int,
    dtype: torch.dtype,
    dim: int,
    value_dim: int,
    *,
    described: bool,
    masked: bool,
    compensate: bool,
    wanted: str | None = None,
) -> str:
    """The engine of ``planned`` for a call: "hopper" where it fits, "triton" everywhere else.

    Args:
        architecture: CUDA compute capability, 90 for Hopper; 0 for anything else.
        dtype, dim, value_dim: of q and k, and of v.
        described: TMA can read k and v.
        masked: there is a key mask.
        compensate: dropped tiles are put back as pseudo-tokens.
        wanted: one of ``LIST_ENGINES``, in place of the choice.

    Raises:
        ValueError: the wanted engine does not exist, or cannot compute this call.
    """
    if wanted is None:
        return (
            "triton"
            if hopper_lacks(
                architecture, dtype, dim, value_dim, described=described, compensate=compensate
            )
            else "hopper"
        )
    if wanted not in LIST_ENGINES:
        raise ValueError(f"engine must be one of {LIST_ENGINES} or None, not {wanted!r}")
    lacks = ""
    if wanted == "hopper":
        lacks = hopper_lacks(
            architecture, dtype, dim, value_dim, described=described, compensate=compensate
        )
    elif wanted == "fa4":
        lacks = fa4_lacks(architecture, dtype, dim, value_dim, masked=masked, compensate=compensate)
    if lacks:
        raise ValueError(f"engine {wanted!r} cannot compute this call: {lacks}; leave engine out")
    return wanted


def hopper_lacks(
    architecture: int,
    dtype: torch.dtype,
    dim: int,
    value_dim: int,
    *,
    described: bool,
    compensate: bool,
) -> str:
    """What keeps the hopper engine from a call; empty where nothing does."""
    if architecture != _HOPPER:
        return "the GPU is not a Hopper"
    if dtype not in _DTYPES:
        return f"dtype {dtype}"
    if dim != value_dim or dim not in _HEAD_DIMS:
        return f"head_dim {dim} and {value_dim}, not one of {_HEAD_DIMS} for both"
    if not described:
        return "TMA cannot read k and v as they are laid out"
    if compensate:
        return "compensate=True"
    if not _installed("triton.experimental.gluon"):
        return "Triton has no Gluon"
    return ""


def fa4_lacks(
    architecture: int,
    dtype: torch.dtype,
    dim: int,
    value_dim: int,
    *,
    masked: bool,
    compensate: bool,
) -> str:
    """What keeps FlashAttention-4 from a call; empty where nothing does."""
    if architecture < _HOPPER:
        return "the GPU is older than Hopper"
    if dtype not in _DTYPES:
        return f"dtype {dtype}"
    if dim != value_dim or dim not in _HEAD_DIMS:
        return f"head_dim {dim} and {value_dim}, not one of {_HEAD_DIMS} for both"
    if masked:
        return "there is a key mask"
    if compensate:
        return "compensate=True"
    if not _installed("flash_attn.cute"):
        return "it is not installed (pip install cef-compile[fa4])"
    return ""


@functools.cache
def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a parent package is missing
        return False
