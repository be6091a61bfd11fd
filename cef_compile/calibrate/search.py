"""From measured nodes to a policy: the steps from dense to fast, and the search along them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from math import fsum, prod, sqrt
from typing import Final

from cef_compile.calibrate.checkpoint import MeasuredCall
from cef_compile.calibrate.choose import (
    Option,
    Step,
    TimeModel,
    prefix_within,
    recalls_after,
    steps,
)
from cef_compile.calibrate.lab import Lab, ModelCall, check_repeats
from cef_compile.calibrate.progress import progress_bar
from cef_compile.calibrate.watch import Key
from cef_compile.policy import (
    Bands,
    Calibration,
    Candidate,
    Decision,
    MeasuredNode,
    NodeEntry,
    NodePolicy,
    Reason,
    Tried,
    join_bands,
)

COMPARED: Final = (0.995, 0.99, 0.97, 0.95, 0.9, 0.8, 0.7)
"""Recalls at which Balanced and Uniform are tried beside the calibrated policy."""
GUESSES: Final = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.15, 1.3, 1.5, 1.8)
"""Policies tried first: as far along the steps as these parts of the budget go, if the errors of
single nodes add up as assumed."""
REFINED: Final = 6
"""Policies tried between the fastest of those that met the budget and the next one."""
ABOVE: Final = 1.01
"""A calibrated schedule is dense from this factor above the highest noise level it was made at:
what happens there has not been measured. The 1 % is for levels that rounding has moved."""


@dataclass
class _Trial:
    """A whole policy that is being tried.

    Attributes:
        decide: its decisions at a noise level.
        recall: of a policy with one recall.
        squares: its squared errors, and density and time, of each call so far.
    """

    decide: Callable[[float | None], Mapping[Key, Decision]]
    recall: float | None = None
    squares: list[float] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    densities: list[float] = field(default_factory=list)

    @property
    def result(self) -> Tried:
        """The means over the calls."""
        count = len(self.squares)
        return Tried(
            recall=self.recall,
            error=sqrt(fsum(self.squares) / count),
            predicted_time=fsum(self.times) / count,
            density=min(fsum(self.densities) / count, 1.0),  # rounding may add a little
        )


class Search:
    """The steps from dense to the fastest policy, and the search along them."""

    def __init__(self, lab: Lab, calls: list[MeasuredCall], time_model: TimeModel) -> None:
        self._lab = lab
        self._calls = calls
        self._time = time_model
        self._entries = lab.target.filtered
        work = [prod(e.q_shape) * e.k_shape[-2] for e in self._entries]
        self._weights = {e.key: one / sum(work) for e, one in zip(self._entries, work, strict=True)}
        self._levels = sorted({call.noise_level for call in calls}, key=lambda x: (x is None, x))
        self._items = [(entry, level) for level in self._levels for entry in self._entries]
        self._measured = [self._summary(i, level) for level, i in self._pairs()]
        self._path: list[Step] = steps([self._options(i) for i in range(len(self._items))])

    def _pairs(self) -> Iterator[tuple[float | None, int]]:
        for level in self._levels:
            for i in range(len(self._entries)):
                yield level, i

    def _summary(self, node: int, level: float | None) -> MeasuredNode:
        """One node at one level, over the calls at that level."""
        at = [call.nodes[node] for call in self._calls if call.noise_level == level]
        candidates = []
        for same in zip(*at, strict=True):
            count = len(same)
            candidates.append(
                Candidate(
                    recall=same[0].recall,
                    output_error=sqrt(fsum(c.output_error**2 for c in same) / count),
                    attention_error=sqrt(fsum(c.attention_error**2 for c in same) / count),
                    density=fsum(c.density for c in same) / count,
                )
            )
        entry = self._entries[node]
        return MeasuredNode(entry.path, entry.ordinal, level, tuple(candidates))

    def _options(self, item: int) -> list[Option]:
        entry, level = self._items[item]
        part = sum(call.noise_level == level for call in self._calls) / len(self._calls)
        weight = part * self._weights[entry.key]
        dense = Option(None, 0.0, weight)
        return [dense] + [
            Option(one.recall, part * one.output_error**2, weight * self._time(one.density))
            for one in self._measured[item].candidates
        ]

    def policy(self, max_error: float) -> NodePolicy:
        """Try policies along the steps, and take the fastest one that meets the budget."""
        prefixes = {prefix_within(self._path, (part * max_error) ** 2) for part in GUESSES}
        uniform = [self._alike(Decision(recall)) for recall in COMPARED]
        balanced = [self._alike(Decision(recall, group="balanced")) for recall in COMPARED]
        # Uniform first: Balanced takes its thresholds from the pass before.
        tried = self._try({0, *prefixes}, "policies", [*uniform, *balanced])
        best = _best(tried, max_error)
        slower = [length for length in tried if length > best]
        if slower:
            gap = min(slower) - best
            between = {best + gap * i // (REFINED + 1) for i in range(1, REFINED + 1)} - set(tried)
            if between:
                tried |= self._try(between, "refining", [])
                best = _best(tried, max_error)
        calibration = Calibration(
            max_error=max_error,
            calls=len(self._calls),
            chosen=tried[best],
            balanced=tuple(sorted((t.result for t in balanced), key=lambda t: t.predicted_time)),
            uniform=tuple(sorted((t.result for t in uniform), key=lambda t: t.predicted_time)),
            nodes=tuple(self._measured),
        )
        _warn_if_no_better(calibration)
        target, recalls = self._lab.target, self._recalls(best)
        assert target.entries is not None, "known after the first call"
        entries = [self._decided(entry, recalls) for entry in target.entries]
        return NodePolicy(target.model, entries, calibration)

    def _try(self, prefixes: set[int], label: str, others: list[_Trial]) -> dict[int, Tried]:
        """Try the policies after so many steps, and others, in one more run."""
        mine = {length: self._after(length) for length in sorted(prefixes)}
        trials = [*others, *mine.values()]
        number = 0

        def on_call(call: ModelCall) -> None:
            nonlocal number
            if number == len(self._calls):
                raise ValueError(f"run called the model more than {number} times, as it did before")
            check_repeats(call, self._calls[number], number)
            number += 1
            with progress_bar(
                f"call {number}, {label}", len(trials), self._lab.progress
            ) as advance:
                for trial in trials:
                    error, densities = call.try_all(trial.decide(call.noise_level))
                    self._add(trial, error, densities)
                    advance()

        self._lab.run(on_call)
        if number < len(self._calls):
            raise ValueError(
                f"run called the model {number} times, and {len(self._calls)} times before: it must"
                " do the same each time"
            )
        return {length: trial.result for length, trial in mine.items()}

    def _add(self, trial: _Trial, error: float, densities: Mapping[Key, float]) -> None:
        trial.squares.append(error**2)
        weights = self._weights.items()
        trial.densities.append(fsum(w * densities.get(key, 1.0) for key, w in weights))
        trial.times.append(
            fsum(
                w * (self._time(densities[key]) if key in densities else 1.0) for key, w in weights
            )
        )

    def _alike(self, decision: Decision) -> _Trial:
        """The same decision for all nodes."""
        decisions = {entry.key: decision for entry in self._entries}
        return _Trial(lambda level: decisions, decision.recall)

    def _after(self, length: int) -> _Trial:
        """The policy after so many steps."""
        recalls = self._recalls(length)

        def decide(level: float | None) -> Mapping[Key, Decision]:
            found = {}
            for key, by_level in recalls.items():
                recall = by_level[level]
                if recall is not None:
                    found[key] = Decision(recall)
            return found

        return _Trial(decide)

    def _recalls(self, length: int) -> dict[Key, dict[float | None, float | None]]:
        """Recalls after so many steps, by node and noise level."""
        found: dict[Key, dict[float | None, float | None]] = {e.key: {} for e in self._entries}
        taken = recalls_after(self._path, length, len(self._items))
        for (entry, level), recall in zip(self._items, taken, strict=True):
            found[entry.key][level] = recall
        return found

    def _decided(
        self, entry: NodeEntry, recalls: Mapping[Key, Mapping[float | None, float | None]]
    ) -> NodeEntry:
        if entry.key not in recalls:
            return entry
        bands = calibrated_bands(recalls[entry.key])
        return replace(entry, bands=bands)


def calibrated_bands(recalls: Mapping[float | None, float | None]) -> Bands:
    """Decisions by noise level, from the recalls at the levels that were measured.

    Bands meet half way between neighbouring levels, and above the highest one it is dense.
    """
    levels = sorted(level for level in recalls if level is not None)
    if not levels:
        return ((0.0, _decision(recalls[None])),)
    edges = [0.0] + [(low + high) / 2 for low, high in pairwise(levels)]
    bands = [(edge, _decision(recalls[level])) for edge, level in zip(edges, levels, strict=True)]
    top = levels[-1] * ABOVE
    if top > edges[-1]:
        bands.append((top, _decision(None)))
    return join_bands(bands)


def _decision(recall: float | None) -> Decision:
    if recall is None:
        return Decision.dense(Reason.POLICY, "calibrated")
    return Decision(recall)


def _best(tried: Mapping[int, Tried], max_error: float) -> int:
    """The fastest policy that meets the budget; dense, after 0 steps, always does."""
    fine = [length for length, one in tried.items() if one.error <= max_error]
    return min(fine, key=lambda length: (tried[length].predicted_time, length))


def _warn_if_no_better(calibration: Calibration) -> None:
    best = calibration.best_balanced
    slower = best is not None and best.predicted_time < calibration.chosen.predicted_time
    if calibration.beats_balanced is False or slower:
        warnings.warn(
            f"the calibrated policy is no better than Balanced here: {calibration}",
            UserWarning,
            stacklevel=4,
        )
