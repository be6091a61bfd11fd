"""The clock of the card's multiprocessors while something runs, as ``nvidia-smi`` reads it."""

from __future__ import annotations

import statistics
import subprocess
import threading
import time
from types import TracebackType

import torch

EVERY_MS = 20
"""Between two readings: a card's power management is slower than that."""


class Clock:
    """Reads the clock in the background, from entering to leaving the context."""

    def __init__(self) -> None:
        self._read: list[tuple[float, int]] = []

    def __enter__(self) -> Clock:
        self._process = subprocess.Popen(
            ["nvidia-smi", "--query-gpu=clocks.sm", "--format=csv,noheader,nounits",
             f"--id=GPU-{torch.cuda.get_device_properties().uuid}", f"--loop-ms={EVERY_MS}"],
            stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._process.terminate()
        self._process.wait()
        self._thread.join()

    def _follow(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._read.append((time.perf_counter(), int(line)))

    def mhz(self, begin: float, end: float) -> list[int]:
        """Readings between two values of ``time.perf_counter``."""
        return [mhz for at, mhz in list(self._read) if begin <= at <= end]


def median_mhz(readings: list[int]) -> int | None:
    """None where a turn was too short to be read."""
    return round(statistics.median(readings)) if readings else None
