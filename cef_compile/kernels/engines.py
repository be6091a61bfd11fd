"""Which implementation computes a filter's attention: a pure choice, made without tensors."""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import dataclass
from typing import Final

import torch

LIST_ENGINES: Final = ("triton", "hopper", "hopper-int8", "fa4")
"""Of the attention over the lists of the planned filter."""
HOPPER_ENGINES: Final = ("hopper-int8", "hopper")
"""Of them those in Gluon, the faster first."""
ONLINE_ENGINES: Final = ("triton", "hopper")
"""Of the online filter."""
_HOPPER: Final = 90
"""Compute capability whose instructions the hopper engine is written in; newer GPUs lack them."""
_HEAD_DIMS: Final = (64, 128)
"""Of k and v alike, for FlashAttention-4; of k, for what decides in the online filter on Hopper."""
_HOPPER_LIST_DIMS: Final = range(8, 129, 8)
"""Of k and v each, for the hopper engine over lists."""
_INT8_HEAD_DIM: Final = 128
"""Of k, for scores in 8 bits: they were measured with this one."""
_INT8_LEAST_LENGTH: Final = 24_576
"""Of queries and keys each, for scores in 8 bits to be chosen: making them costs with the length
what they gain with its square. At 16,384 they lost time at a density of .18 and gained at .4, at
32,256 they gained at both (H100)."""
_DTYPES: Final = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Call:
    """What an engine must be able to compute.

    Attributes:
        architecture: CUDA compute capability, 90 for Hopper; 0 for anything else.
        dtype, dim, value_dim: of q and k, and of v.
        described: TMA can read k and v.
        masked: there is a key mask.
        ordered: there is a token order.
        compensate: dropped tiles are put back as pseudo-tokens.
        online: it is the online filter's, not one over lists.
        bound, certified: its tiles are judged by bounds of their energy; with a certificate.
        scores: one of ``SCORES``, what is allowed.
        q_len, kv_len: of the tokens that are read.
    """

    architecture: int
    dtype: torch.dtype
    dim: int
    value_dim: int
    described: bool = True
    masked: bool = False
    ordered: bool = False
    compensate: bool = False
    online: bool = False
    bound: bool = False
    certified: bool = False
    scores: str = "exact"
    q_len: int = 0
    kv_len: int = 0


def find_engine(call: Call, wanted: str | None = None) -> str:
    """The wanted engine, or the fastest of this package that fits a call.

    Raises:
        ValueError: the wanted engine does not exist, or cannot compute this call.
    """
    if wanted is None:
        if call.bound and not call.certified:
            return "triton"  # as fast or faster at every density, with the least to compute
        long = min(call.q_len, call.kv_len) >= _INT8_LEAST_LENGTH
        worth = HOPPER_ENGINES if long else HOPPER_ENGINES[1:]
        return next((name for name in worth if not lacks(name, call)), "triton")
    among = ONLINE_ENGINES if call.online else LIST_ENGINES
    if wanted not in among:
        raise ValueError(f"engine must be one of {among} or None, not {wanted!r}")
    reason = lacks(wanted, call)
    if reason:
        raise ValueError(f"engine {wanted!r} cannot compute this call: {reason}; leave engine out")
    return wanted


def lacks(engine: str, call: Call) -> str:
    """What keeps an engine from a call; empty where nothing does."""
    if engine == "triton":
        return ""
    if engine == "hopper-int8":
        if call.scores != "int8":
            return f"scores={call.scores!r}"
        if call.online:
            return "the filter is online"
        if call.dim != _INT8_HEAD_DIM:
            return f"head_dim {call.dim}, not {_INT8_HEAD_DIM}"
        return lacks("hopper", call)
    if call.dtype not in _DTYPES:
        return f"dtype {call.dtype}"
    if call.compensate:
        return "compensate=True"
    dims = f"head_dim {call.dim} and {call.value_dim}"
    if engine == "hopper":
        if not {call.dim, call.value_dim} <= set(_HOPPER_LIST_DIMS):
            return f"{dims}, not multiples of 8 up to {max(_HOPPER_LIST_DIMS)}"
        if call.online and call.dim not in _HEAD_DIMS:
            return f"head_dim {call.dim}, not one of {_HEAD_DIMS}"
    elif call.dim != call.value_dim or call.dim not in _HEAD_DIMS:
        return f"{dims}, not one of {_HEAD_DIMS} for both"
    if engine == "hopper":
        if call.architecture != _HOPPER:
            return "the GPU is not a Hopper"
        if not call.described:
            return "TMA cannot read k and v as they are laid out"
        return "" if _installed("triton.experimental.gluon") else "Triton has no Gluon"
    if call.architecture < _HOPPER:
        return "the GPU is older than Hopper"
    if call.masked:
        return "there is a key mask"
    if call.ordered:
        return "there is a token order"
    installed = _installed("flash_attn.cute")
    return "" if installed else "it is not installed (pip install cef-compile[fa4])"


@functools.cache
def _installed(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # a package that it is part of is missing
        return False
