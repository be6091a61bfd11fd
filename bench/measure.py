"""What the benchmarks of attention share: inputs, times, dense attention to be beside, errors.

Parts of the launcher that are its own are used here: what is timed alone is launched as in a call.
"""

from __future__ import annotations

import datetime
import importlib.metadata
import statistics
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import TypeVar

import torch
import torch.nn.functional as F
import triton
from clock import Clock, median_mhz
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from cef_compile.kernels import config as c
from cef_compile.kernels import launch
from cef_compile.kernels.centroids import Centroids
from cef_compile.kernels.engines import LIST_ENGINES, ONLINE_ENGINES, Call, lacks
from cef_compile.kernels.order import Layout, token_order
from cef_compile.kernels.schedule import Lists

HEAD_DIM = 128
CUDNN, FLASH_2, FLASH_4 = "cuDNN", "FlashAttention-2", "FlashAttention-4"
MEASURED_S = 0.12
FLUSH_BYTES = 1 << 30  # far more than the L2, so that it outlasts the launches of a run too
MIN_RUNS, MAX_RUNS = 5, 60
ROUNDS = 2
Row = dict[str, object]
Key = TypeVar("Key", bound=Hashable)


def flusher() -> Tensor:
    """What is overwritten to empty the L2: one for all runs, so that no run waits for memory."""
    return torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")


def times_ms(function: Callable[[], object], runs: int) -> list[float]:
    """Of each run, between two events of the device."""
    flush = flusher()
    times = []
    for _ in range(runs):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        flush.zero_()
        begin.record()
        function()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end))
    return times


def median_ms(function: Callable[[], object]) -> float:
    """Median over runs, after two to warm up."""
    for _ in range(2):
        started = time.perf_counter()
        function()
        torch.cuda.synchronize()
        once = time.perf_counter() - started
    runs = max(MIN_RUNS, min(MAX_RUNS, round(MEASURED_S / once)))
    return statistics.median(times_ms(function, runs))


@dataclass(frozen=True)
class Settled:
    """Median milliseconds, and the clock they were at where it was read."""

    ms: float
    mhz: int | None


def settled_by_turns(
    functions: dict[Key, Callable[[], object]], turn_s: float
) -> dict[Key, Settled]:
    """Of each function, which take turns, at the clock that is its own.

    A card at its power limit sets its clock by the power of the last tens of milliseconds. Of runs
    by turns each would have the clock of the one before it, so the first half of a turn of
    ``turn_s`` seconds is not counted.
    """
    times: dict[Key, list[float]] = {key: [] for key in functions}
    clocks: dict[Key, list[int]] = {key: [] for key in functions}
    with Clock() as clock:
        for key in [*functions] * ROUNDS:
            begin = time.perf_counter()
            ends: list[tuple[float, float]] = []
            while time.perf_counter() - begin < turn_s or len(ends) < 2 * MIN_RUNS:
                (ms,) = times_ms(functions[key], 1)
                ends.append((time.perf_counter(), ms))
            counted = ends[len(ends) // 2 :]
            times[key] += [ms for _, ms in counted]
            clocks[key] += clock.mhz(counted[0][0], counted[-1][0])
    return {
        key: Settled(statistics.median(found), median_mhz(clocks[key]))
        for key, found in times.items()
    }


def dense(q: Tensor, k: Tensor, v: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Dense attention by each implementation that is there."""

    def sdpa(backend: SDPBackend) -> Callable[[], Tensor]:
        def call() -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q, k, v)

        return call

    found = {CUDNN: sdpa(SDPBackend.CUDNN_ATTENTION), FLASH_2: sdpa(SDPBackend.FLASH_ATTENTION)}
    if "fa4" in list_engines(q, HEAD_DIM):  # of this head_dim, which limits its lists alone
        from flash_attn.cute.interface import flash_attn_func

        rows = [t.transpose(1, 2) for t in (q, k, v)]
        found[FLASH_4] = lambda: flash_attn_func(*rows)[0].transpose(1, 2)
    return found


def anchors(shape: str, q: Tensor, k: Tensor, v: Tensor) -> tuple[float, list[Row]]:
    """Milliseconds of cuDNN, against which speeds are, and a row of each dense attention."""
    calls = dense(q, k, v)
    times = {name: median_ms(call) for name, call in calls.items()}
    flops = 4 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2] * q.shape[3]
    rows = [
        row(
            name, shape, ms, times[CUDNN], tflops=round(flops / ms / 1e9),
            error=error(q, k, v, calls[name]()), **version(name),
        )
        for name, ms in times.items()
    ]  # fmt: skip
    return times[CUDNN], rows


def version(name: str) -> Row:
    """Of what comes neither with torch nor with this package."""
    return {"version": importlib.metadata.version("flash-attn-4")} if name == FLASH_4 else {}


def list_engines(q: Tensor, dim: int) -> list[str]:
    """Engines that are there for attention over lists with a head_dim, on the device of ``q``."""
    call = Call(launch._architecture(q.device), q.dtype, dim, dim, scores="int8")
    return [name for name in LIST_ENGINES if not lacks(name, call)]


def online_engines(q: Tensor, dim: int) -> list[str]:
    """Engines that are there for the online filter, on the device of ``q``."""
    call = Call(launch._architecture(q.device), q.dtype, dim, dim, online=True)
    return [name for name in ONLINE_ENGINES if not lacks(name, call)]


def over_lists(
    engine: str, q: Tensor, k: Tensor, v: Tensor, listed: Lists, known: Centroids
) -> Tensor:
    """Attention over lists by an engine; q and k are made 8 bits where that is part of it."""
    fresh = replace(listed, queue=torch.zeros_like(listed.queue))
    return launch._attend(
        engine, q, k, v, fresh, known, launch._tuning(q, v),
        scale=q.shape[3] ** -0.5, key_mask=None, tokens=None,
    )[0]  # fmt: skip


def inputs(heads: int, length: int, dim: int = HEAD_DIM, spread: float = 3.0) -> list[Tensor]:
    """bf16 q, k, v in (B, L, H, D) memory order; some key tiles matter more than others.

    Key tile j is shifted along one direction by a normal number times ``spread``, which shifts the
    scores that all queries give it by about as much.
    """
    draw = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, device="cuda", dtype=torch.bfloat16)

    direction = F.normalize(torch.randn(dim, generator=draw, device="cuda"), dim=0).bfloat16()
    n_n = c.tiles(length, c.BLOCK_N)
    shift = (spread * normal(n_n, 1, 1)).repeat_interleave(c.BLOCK_N, 0)[:length]
    q = normal(1, length, heads, dim) + dim**0.5 * direction
    k = normal(1, length, heads, dim) + shift * direction
    return [t.transpose(1, 2) for t in (q, k, normal(1, length, heads, dim))]


def error(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    index: Tensor | None = None,
    count: Tensor | None = None,
    layout: Layout | None = None,
) -> float:
    """Largest error of two query tiles of the first head against float64 on the same key tiles.

    In units of the values' root mean square, which learned ones can have of any size. Without lists
    these are all tiles; with a layout they are those of its token order.
    """
    tokens = torch.arange(k.shape[2]) if layout is None else token_order(layout)
    tokens = tokens.to(q.device)
    worst = []
    for t in (0, c.tiles(len(tokens), c.BLOCK_M) - 1):
        places = torch.arange(len(tokens), device=q.device)
        if index is not None and count is not None:
            tiles = index[0, 0, t, : int(count[0, 0, t])].long()
            places = (tiles[:, None] * c.BLOCK_N + places[: c.BLOCK_N]).flatten()
            places = places[places < len(tokens)]
        rows, keys = tokens[t * c.BLOCK_M : (t + 1) * c.BLOCK_M], tokens[places]
        rows, keys = rows[rows >= 0], keys[keys >= 0]  # -1: no token is there
        scores = q[0, 0, rows].double() @ k[0, 0, keys].double().mT * q.shape[3] ** -0.5
        exact = scores.softmax(-1) @ v[0, 0, keys].double()
        worst.append((out[0, 0, rows] - exact).abs().max())
    unit = v[0, 0].double().square().mean().sqrt()
    return (torch.stack(worst).max() / unit).item()  # NaN if there is one


def row(name: str, shape: str, ms: float, base: float, **more: object) -> Row:
    """A row of results."""
    return {"name": name, "shape": shape, "ms": round(ms, 4), "speed": round(base / ms, 3), **more}


def card() -> str:
    """Short name of the GPU, as in h100."""
    return torch.cuda.get_device_name().split()[1].lower()


def about() -> Row:
    """What the measurements are of."""
    return {
        "date": datetime.date.today().isoformat(),
        "card": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "dtype": "bfloat16",
        "speed": "against cuDNN's dense attention on the same tensors",
    }
