"""Times of attention for ``cef-compile bench``."""

from __future__ import annotations

import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from cef_compile.functional import attention

DENSE: Final = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "memory efficient": SDPBackend.EFFICIENT_ATTENTION,
}
"""The fused backends of SDPA; its unfused one needs the whole score matrix."""
PROBED: Final = 256
"""Tokens of the call that finds out whether the filter takes a shape and dtype at all."""
MEASURED_S: Final = 0.3
"""Time that the runs of one row take together, about."""
MIN_RUNS: Final = 3
MAX_RUNS: Final = 50
FLUSH_BYTES: Final = 1 << 28
"""Overwritten before each run: empties the L2 cache, and outlasts the launches that follow."""

Row = dict[str, Any]


def measure(
    shape: tuple[int, int, int, int], densities: Sequence[float], dtype: str, device: str
) -> list[Row]:
    """Rows for one shape: the dense backends, then the filter at each density.

    Args:
        shape: batch, heads, length, head_dim.
        densities: shares of the key tiles to compute.
        dtype: name of a torch dtype.
        device: "cuda" or "cpu".

    Returns:
        rows with shape, attention, density, recall, ms, speed and note; None where there is no
        number. Speed is the fastest dense time over this one.

    Raises:
        ValueError: the filter does not take this shape or dtype.
    """
    batch, heads, length, dim = shape
    q, k, v = _inputs(batch, heads, length, dim, getattr(torch, dtype), device)
    # A shape or dtype that it does not take is an error before any work.
    attention(q[:, :, :PROBED], k[:, :, :PROBED], v[:, :, :PROBED])
    name = "x".join(map(str, shape))
    rows: list[Row] = []

    def add(way: str, ms: float | None, note: str = "", **numbers: float | None) -> None:
        row = {"shape": name, "attention": way, "density": None, "recall": None}
        rows.append({**row, "ms": ms, "speed": None, "note": note, **numbers})

    for way, backend in DENSE.items():
        ms = _dense_ms(q, k, v, backend, device)
        add(way, ms, "" if ms is not None else "not available")
    times = [row["ms"] for row in rows if row["ms"] is not None]
    for density in densities:
        _, stats = attention(q, k, v, rule="top_k", density=density, return_stats=True)
        filtered = partial(attention, q, k, v, rule="top_k", density=density)
        ms = median_ms(filtered, device)
        add("cef_compile", ms, density=stats.density, recall=stats.recall)
    for row in rows:
        if times and row["ms"] is not None:
            row["speed"] = min(times) / row["ms"]
    return rows


def _dense_ms(q: Tensor, k: Tensor, v: Tensor, backend: SDPBackend, device: str) -> float | None:
    """Time of a backend of SDPA; None where it does not take these tensors."""
    try:
        with warnings.catch_warnings(), sdpa_kernel(backend):
            warnings.simplefilter("ignore")  # torch warns of each reason apart
            return median_ms(partial(F.scaled_dot_product_attention, q, k, v), device)
    except RuntimeError as error:
        if "out of memory" in str(error):
            raise
        return None


def median_ms(function: Callable[[], object], device: str) -> float:
    """Median time of a call, after two to warm up."""
    for _ in range(2):
        started = time.perf_counter()
        function()
        _wait(device)
        once = time.perf_counter() - started
    runs = max(MIN_RUNS, min(MAX_RUNS, round(MEASURED_S / once)))
    clock = _cuda_ms if device == "cuda" else _cpu_ms
    return statistics.median(clock(function) for _ in range(runs))


def _cuda_ms(function: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda").zero_()
    begin.record()
    function()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end))


def _cpu_ms(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return 1000 * (time.perf_counter() - started)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _inputs(
    batch: int, heads: int, length: int, dim: int, dtype: torch.dtype, device: str
) -> list[Tensor]:
    """Normal q, k, v in (B, L, H, D) memory order, as models have them.

    Nothing in them stands out, so the recall of a density is low; the times do not depend on it.
    """
    generator = torch.Generator(device).manual_seed(0)
    shape = (batch, length, heads, dim)
    return [
        torch.randn(shape, generator=generator, dtype=dtype, device=device).transpose(1, 2)
        for _ in range(3)
    ]
