"""What a calibration measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Candidate:
    """One recall of one node, tried with all other nodes dense.

    Attributes:
        recall: the recall that was asked for.
        output_error: of the model's output, relative to the dense one: root mean square over the
            calls of ``|filtered - dense| / |dense|`` (Euclidean norms over the whole output).
        attention_error: the same of the attention's output.
        density: kept tiles / visible tiles, mean over the calls.
    """

    recall: float
    output_error: float
    attention_error: float
    density: float


@dataclass(frozen=True)
class MeasuredNode:
    """The candidates of one node at one noise level.

    Attributes:
        path, ordinal: which node.
        noise_level: as it was set; None where none was.
        candidates: what was tried, the highest recall first.
    """

    path: str
    ordinal: int
    noise_level: float | None
    candidates: tuple[Candidate, ...]


@dataclass(frozen=True)
class Tried:
    """A whole policy that was tried.

    Attributes:
        recall: its recall; None for a calibrated one, which has many.
        error: of the model's output, as :attr:`Candidate.output_error`, all nodes together.
        predicted_time: of the attention nodes that may be filtered, relative to all of them dense.
        density: of the same nodes, mean weighted by their dense time.
    """

    recall: float | None
    error: float
    predicted_time: float
    density: float


@dataclass(frozen=True)
class Calibration:
    """Measurements behind a calibrated policy.

    Attributes:
        max_error: the budget.
        calls: how many calls of the model were measured.
        chosen: the policy that came out, measured as a whole.
        balanced: ``Balanced`` at several recalls, the fastest first.
        uniform: ``Uniform`` at several recalls, the fastest first.
        nodes: what was measured of each node and noise level.
    """

    max_error: float
    calls: int
    chosen: Tried
    balanced: tuple[Tried, ...]
    uniform: tuple[Tried, ...]
    nodes: tuple[MeasuredNode, ...]

    @property
    def balanced_error(self) -> float | None:
        """Error of Balanced at the chosen policy's predicted time, None beyond what was tried.

        Between two recalls that were tried, the logarithm of the error is taken as linear in time.
        """
        return _error_at(self.balanced, self.chosen.predicted_time)

    @property
    def beats_balanced(self) -> bool | None:
        """Whether the policy's error is below Balanced's at equal time; None if that is unknown."""
        error = self.balanced_error
        return None if error is None else self.chosen.error < error

    @property
    def best_uniform(self) -> Tried | None:
        """The fastest single recall that met the budget; None if none did."""
        return self._best(self.uniform)

    @property
    def best_balanced(self) -> Tried | None:
        """The fastest Balanced that met the budget; None if none did."""
        return self._best(self.balanced)

    def _best(self, tried: Sequence[Tried]) -> Tried | None:
        fine = [one for one in tried if one.error <= self.max_error]
        return min(fine, key=lambda one: one.predicted_time, default=None)

    def __str__(self) -> str:
        """The outcome in a few lines."""
        lines = [
            f"error {self.chosen.error:.4f} of the allowed {self.max_error:.4f} over {self.calls}"
            f" calls; predicted attention time {self.chosen.predicted_time:.3f} of dense,"
            f" density {self.chosen.density:.3f}"
        ]
        for name, best in (("single recall", self.best_uniform), ("Balanced", self.best_balanced)):
            lines.append(
                f"no {name} that was tried meets the budget"
                if best is None
                else f"best {name} that meets it: {best.recall:g}, error {best.error:.4f},"
                f" predicted time {best.predicted_time:.3f}"
            )
        if self.beats_balanced is None:
            lines.append("Balanced was not tried at so short a predicted time")
        else:
            verb = "beats" if self.beats_balanced else "does NOT beat"
            lines.append(
                f"{verb} Balanced at equal predicted time, where its error is"
                f" {self.balanced_error:.4f}"
            )
        return "\n".join(lines)


def _error_at(tried: Sequence[Tried], time: float) -> float | None:
    """Error at a predicted time, between the neighbours in time."""
    points = sorted((one.predicted_time, one.error) for one in tried)
    for (left, high), (right, low) in pairwise(points):
        if left <= time <= right:
            if right == left or high <= 0 or low <= 0:
                return min(high, low)
            part = (time - left) / (right - left)
            return math.exp((1 - part) * math.log(high) + part * math.log(low))
    return None
