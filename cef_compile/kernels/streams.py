"""Launches beside others, on a second stream of the device."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def event(device: torch.device) -> torch.cuda.Event | None:
    """When what was launched so far is done; None where nothing is asynchronous."""
    return torch.cuda.current_stream(device).record_event() if device.type == "cuda" else None


@contextmanager
def beside(device: torch.device, since: torch.cuda.Event | None) -> Iterator[None]:
    """What is launched here runs beside all that was launched since, and before all that follows.

    Worth it where that is small kernels, which leave most multiprocessors free. Memory that is
    written here must come from outside, so that the allocator knows of one stream alone.
    """
    if since is None:
        yield
        return
    side = _side_stream(device)
    side.wait_event(since)
    with torch.cuda.stream(side):
        yield
    torch.cuda.current_stream(device).wait_stream(side)


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
