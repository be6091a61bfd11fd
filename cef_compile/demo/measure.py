"""Time and memory of steps."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

import torch


@dataclass(frozen=True)
class Cost:
    """What one way of running the model costs."""

    first_step_s: float
    """Seconds of the first step, compilation included."""
    step_s: float
    """Median seconds of a step in the steady state (two calls of the model)."""
    peak_bytes: int | None
    """Most memory allocated on the device during the timed steps; ``None`` on a CPU, where only
    the whole process has a peak (:func:`process_peak_bytes`)."""


def seconds(step: Callable[[], object], device: torch.device) -> float:
    """Wall time of ``step`` with the device's queue empty before and after."""
    _wait(device)
    start = time.perf_counter()
    step()
    _wait(device)
    return time.perf_counter() - start


def steady(
    step: Callable[[], object], repeats: int, device: torch.device
) -> tuple[float, int | None]:
    """Median seconds of ``repeats`` steps and the peak of device memory during them, in bytes."""
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    step_s = median(seconds(step, device) for _ in range(repeats))
    return step_s, torch.cuda.max_memory_allocated(device) if on_gpu else None


def process_peak_bytes() -> int:
    """Most resident memory that this process has had."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
