"""A program: its threads, how they wait for each other, and its barriers in shared memory."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

PATIENCE_S = 20.0
"""After which threads that wait for each other are called a deadlock."""
local = threading.local()
"""Of a thread: its program, and its products that are under way."""


class Program:
    """One program: its threads share a lock, under which barriers change."""

    def __init__(self, number: tuple[int, ...], grid: tuple[int, ...], chance: random.Random):
        self.number = number
        self.grid = grid
        self.chance = chance
        self.changed = threading.Condition()
        self.failed: BaseException | None = None

    def wait(self, done: Callable[[], bool]) -> None:
        """Until that is so, with the lock held while it is asked for."""
        with self.changed:
            if not self.changed.wait_for(lambda: done() or self.failed, PATIENCE_S):
                self.failed = TimeoutError("groups of warps wait for each other")
            if self.failed:
                raise self.failed


def program() -> Program:
    """That of this thread."""
    return local.program


def let_others() -> None:
    """Lets other threads go first, now and then."""
    if program().failed:
        raise RuntimeError("another group failed")
    if program().chance.random() < 0.05:
        threading.Event().wait(1e-5)


class Barriers:
    """Barriers in shared memory: those of an index, or one."""

    def __init__(self, number: int, program: Program) -> None:
        self.all = [Barrier(program) for _ in range(number)]

    def index(self, at: object) -> Barrier:
        return self.all[int(at)]


class Barrier:
    """Completes a phase when all have arrived and all bytes are there."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.count = 0
        self.pending = 0
        self.bytes = 0
        self.phase = 0
        self.copies: list[Callable[[], int]] = []

    def arrive(self, count: int = 1) -> None:
        self.pending -= count
        assert self.pending >= 0, "more arrivals than a phase has"
        self._complete()

    def finish_copies(self) -> None:
        copies, self.copies = self.copies, []
        for copy in copies:
            self.bytes -= copy()
        self._complete()

    def _complete(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.phase ^= 1
            self.pending = self.count
            self.program.changed.notify_all()
