"""From what single nodes cost and gain to recalls for all of them.

The errors of the nodes are taken as independent, so that their squares add up. Each node at each
noise level starts dense; then the recall is lowered step by step wherever that costs least error
per time saved. Every prefix of these steps is a policy. Which of them meets the budget is then
measured, all nodes together, so that the assumption only guides.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import NamedTuple


@dataclass(frozen=True)
class TimeModel:
    """Time of a filtered attention relative to the same one dense: ``fixed + slope * density``.

    The defaults are fitted to one H100 against cuDNN in bfloat16 (24 heads of 128 channels, 32,256
    tokens): 0.045 for centroids, plan and lists, and 1 a density of 1, which is what the engine for
    Hopper takes over lists. So a node is faster than dense below a density of 0.955.

    Raises:
        ValueError: a number is negative or not finite.
    """

    fixed: float = 0.045
    slope: float = 1.0

    def __post_init__(self) -> None:
        for name, value in (("fixed", self.fixed), ("slope", self.slope)):
            if not 0 <= value < math.inf:
                raise ValueError(f"{name} must be at least 0 and finite, got {value!r}")

    def __call__(self, density: float) -> float:
        """Predicted time of a node with this density; 1 is dense."""
        return self.fixed + self.slope * density


@dataclass(frozen=True)
class Option:
    """One recall of one item.

    Attributes:
        recall: None for dense.
        squared_error: its part of the squared error of the whole.
        time: its part of the predicted time of the whole, where all dense is 1.
    """

    recall: float | None
    squared_error: float
    time: float


class Step(NamedTuple):
    """One lowering of one item's recall.

    Attributes:
        rate: squared error added per time saved; infinite errors come last.
        item: index of the item.
        option: what it changes to.
        squared_error: what it adds.
    """

    rate: float
    item: int
    option: Option
    squared_error: float


def steps(items: Sequence[Sequence[Option]]) -> list[Step]:
    """All lowerings that may pay, the cheapest error per time first.

    Args:
        items: for each node and noise level its options, the dense one among them.
    """
    found = []
    for i, options in enumerate(items):
        hull = lower_hull(options)
        for before, after in pairwise(hull):
            added = after.squared_error - before.squared_error
            found.append(Step(added / (before.time - after.time), i, after, added))
    return sorted(found, key=lambda step: (step.rate, step.item, step.option.time))


def lower_hull(options: Sequence[Option]) -> list[Option]:
    """The options that no mixture of others beats, from the slowest to the fastest.

    Along them the error rises, and ever faster per time saved.
    """
    hull: list[Option] = []
    for option in sorted(options, key=lambda o: (-o.time, o.squared_error)):
        # What is slower and has no less error is beaten outright.
        while hull and hull[-1].squared_error >= option.squared_error:
            hull.pop()
        if hull and hull[-1].time == option.time:
            continue
        while len(hull) > 1 and _rate(hull[-2], hull[-1]) >= _rate(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def prefix_within(path: Sequence[Step], squared_error: float) -> int:
    """How many of the steps may be taken until the squared errors add up to more than allowed."""
    total, sums = 0.0, []
    for step in path:
        total += step.squared_error
        sums.append(total)
    return bisect_right(sums, squared_error)


def recalls_after(path: Sequence[Step], taken: int, items: int) -> list[float | None]:
    """The recall of each item after the first ``taken`` steps; None is dense."""
    recalls: list[float | None] = [None] * items
    for step in path[:taken]:
        recalls[step.item] = step.option.recall
    return recalls


def _rate(before: Option, after: Option) -> float:
    return (after.squared_error - before.squared_error) / (before.time - after.time)
